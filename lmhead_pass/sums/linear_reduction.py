"""Recognises sums of numbers of each row, each times a weight that is known before these are.

``(losses * mask).sum() / mask.sum()``: what the backward will multiply each row's gradient by is,
but for one number, ``mask / mask.sum()``. So the gradients can be computed in the forward. The same
holds for the squares of log-sum-exps in a z-loss.

The weights are the gradient of the sum with respect to the numbers, and that is how they are made:
from the sum back, step by step. They are known before if each step is linear in the numbers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from ..compat.graphs import tree_leaves
from ..graph import (
    Emitter,
    Refused,
    arguments,
    canonical_op,
    gradients_are_recorded,
    is_cut_off,
    is_in_place,
    is_pieces,
    is_plain,
    mutation,
    same_shape,
    size_of,
    tensor_of,
    value_of,
)
from .linear_ops import SHAPED_BY_INPUT, STEPS, arguments_of, emit_again, read_by, unchanged
from .types import LinearReduction, Step


def weighted_sum(values: Node) -> LinearReduction | None:
    """How a single number is a weighted sum of ``values``, and of nothing else; None if none is.

    Nothing else reads any of what is on the way there.
    """
    found = next(sums([values]), None)
    if found is None or any(step.has_others for step in found.steps):
        return None
    users = {user for node in (values, *found.nodes[:-1]) for user in node.users}
    return found if users.issubset(found.nodes) else None


def sums(numbers: Iterable[Node], squarable: Iterable[Node] = ()) -> Iterator[LinearReduction]:
    """Each single number that all gradients of ``numbers`` come from, and how; the first one first.

    It is a weighted sum of them, of the squares of those that are ``squarable``, and of others.
    Others may read any of them, if no gradient comes from there.
    """
    try:
        yield from _Walk(numbers, squarable).run()
    except Refused:  # a tensor that is none
        return


def can_be_made_behind(place: Node, linear_reduction: LinearReduction) -> bool:
    """Whether what the weights are made of is behind ``place`` what the steps to the sum see.

    And stays so: of what is written to after them, autograd refuses the gradient.
    """
    end = place.graph.output_node()
    return not any(
        any(mutation.writers(mutation.nodes_between(min(step.node, place), end), of=step.reads))
        for step in linear_reduction.steps
    )


class _Walk:
    def __init__(self, numbers: Iterable[Node], squarable: Iterable[Node]):
        self.holds: dict[Node, Node] = {}
        """For each node that holds numbers, or what is made of them: which node has made that, the
        last that wrote to it."""
        self.waiting: dict[Node, set[Node]] = {}
        """Who passes gradients back to each of these, and was not visited yet."""
        self.steps: list[Step] = []
        self.squarable = set(squarable)
        """What holds numbers, or single numbers times weights, whose squares are understood."""
        for number in numbers:
            self._hold(number, number)

    def run(self) -> Iterator[LinearReduction]:
        while pending := set().union(*self.waiting.values()):
            node = min(pending)
            if not self._visit(node):
                return
            for users in self.waiting.values():
                users.discard(node)
            if isinstance(value_of(node), torch.Tensor):
                self._hold(node, node)
                waited_for = {name for name, users in self.waiting.items() if users}
                if waited_for == {node} and tensor_of(node).dim() == 0:
                    yield LinearReduction(tuple(self.steps))

    def _hold(self, name: Node, maker: Node) -> None:
        self.holds[name] = maker
        users = {user for user in _gradient_users(name) if user > maker}
        self.waiting[name] = users

    def _visit(self, node: Node) -> bool:
        """Add the steps that ``node`` takes; False if it is not understood."""
        names = [name for name in read_by(node) if name in self.holds]
        found = [self._step(node, name) for name in names]
        steps = [step for step in found if step is not None]
        if not steps or len(steps) < len(found):
            return False
        self.steps += steps
        if not mutation.may_write(node):
            if len(steps) == 1 and steps[0].kind in ("move", "scale"):
                self.squarable.update({node} if steps[0].source in self.squarable else ())
            return True
        if not is_in_place(node) or not gradients_are_recorded(node):
            return False
        written = node.args[0]
        before = self.holds.get(written, written)
        others = [name for name, maker in self.holds.items() if maker is before]
        if mutation.has_other_names(node, but={written, *others}):
            return False  # a gradient may come from there
        for name in {written, *others}:
            self._hold(name, node)
        return True

    def _step(self, node: Node, name: Node) -> Step | None:
        value, source = value_of(_tensor(node)), self.holds[name]
        if not is_plain(value) or not value.is_floating_point() or is_cut_off(node):
            return None
        if is_square(name, node):
            if source not in self.squarable or mutation.may_write(node):
                return None
            return Step(node, source, name, "square", unchanged)
        uses = sum(leaf is name for leaf in tree_leaves((arguments_of(node), node.kwargs)))
        if uses != 1 or "out" in node.kwargs or canonical_op(node) not in STEPS:
            return None
        found = STEPS[canonical_op(node)](node, name)
        if found is None or not (_keeps_shape(node, name) or self._has_shape(node)):
            return None
        return Step(node, source, name, **found)

    def _has_shape(self, node: Node) -> bool:
        """Whether the same, done to others of the same shapes, gives the shape of the result."""
        if canonical_op(node) == "stack":
            return all(part in self.holds for part in read_by(node))
        return canonical_op(node) in SHAPED_BY_INPUT


def _keeps_shape(node: Node, name: Node) -> bool:
    """Whether the result has the shape of ``name``, or one that depends on nothing."""
    sizes = tensor_of(_tensor(node)).shape
    return same_shape(_tensor(node), name) or all(isinstance(size, int) for size in sizes)


def _gradient_users(node: Node) -> Iterator[Node]:
    """Who passes a gradient back to ``node``."""
    for user in node.users:
        if _may_pass_gradient(user):
            yield from _gradient_users(user) if is_pieces(user) else (user,)


def _may_pass_gradient(node: Node) -> bool:
    """Whether one may come to ``node`` and go on to what it reads: not from what is detached."""
    seen: set[Node] = set()
    pending = [node]
    while pending:
        node = pending.pop()
        value = value_of(node)
        if isinstance(value, int | float | torch.SymInt | torch.SymFloat | torch.SymBool):
            continue
        if not is_plain(value):  # the graph's output, or not understood
            return True
        if value.requires_grad and node not in seen:
            if mutation.may_write(node):
                return True
            seen.add(node)
            pending += node.users
    return False


def is_square(before: Node, after: Node) -> bool:
    """Whether ``after`` is the square of ``before``."""
    name = canonical_op(after)
    if name == "pow":
        call = arguments(after, lambda input, exponent: locals())
        return call is not None and call["input"] is before and call["exponent"] in (2, 2.0)
    return name == "square" or (name == "mul" and after.args == (before, before))


def emit_weights(
    emit: Emitter,
    linear_reduction: LinearReduction,
    ones: Mapping[Node, Callable[[], Node]],
    like: Node,
) -> dict[tuple[Node, int], Node]:
    """By what each number is multiplied in the sum, and the square of each (power 2), in its shape.

    ``ones`` makes a tensor in the shape of each number; ``like`` is a tensor where they are.
    """
    dtype = torch.promote_types(tensor_of(like).dtype, torch.float32)
    weights = {(linear_reduction.sum, 1): emit("new_ones", like, (), dtype=dtype)}
    shapes = _Shapes(emit, linear_reduction, ones)
    for step in reversed(linear_reduction.steps):
        sizes = partial(shapes.sizes, step.source)
        for power in (1, 2):
            if (step.node, power) not in weights:
                continue
            weight = step.back(emit, weights[step.node, power], sizes)
            if power == 2 and step.kind == "scale":
                weight = step.back(emit, weight, sizes)
            if not same_shape(weight, _tensor(step.source)):
                weight = emit("sum_to_size", weight, sizes())
            key = (step.source, 2 if step.kind == "square" else power)
            weights[key] = emit("add", weights[key], weight) if key in weights else weight
    return weights


def _tensor(node: Node) -> Node:
    """What holds the numbers that ``node`` has made: what it writes to, if it is nothing itself."""
    return node.args[0] if canonical_op(node) == "setitem" else node


class _Shapes:
    """The sizes of what is on the way to a sum, before any of it is computed."""

    def __init__(
        self,
        emit: Emitter,
        linear_reduction: LinearReduction,
        ones: Mapping[Node, Callable[[], Node]],
    ):
        self.emit = emit
        self.steps: dict[Node, list[Step]] = {}
        for step in linear_reduction.steps:
            self.steps.setdefault(step.node, []).append(step)
        self.ones = ones
        self.known: dict[Node, Node] = {}

    def sizes(self, node: Node) -> list[Any]:
        shape = tensor_of(_tensor(node)).shape
        if all(isinstance(size, int) for size in shape):
            return list(shape)
        return [size_of(self.emit, self._like(node), dim) for dim in range(len(shape))]

    def _like(self, node: Node) -> Node:
        if node not in self.known:
            self.known[node] = self._made_like(node)
        return self.known[node]

    def _made_like(self, node: Node) -> Node:
        if node in self.ones:
            return self.ones[node]()
        likes = {}
        for step in self.steps[node]:
            like = self._like(step.source)
            if same_shape(_tensor(node), step.name):
                return like
            like = self.emit("to", like, tensor_of(step.name).dtype)
            likes[step.name] = self.emit("contiguous", like)  # it may be viewed
        return emit_again(self.emit, node, likes)
