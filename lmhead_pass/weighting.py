"""Recognises sums of numbers of each row, each times a weight that is known before these are.

``(losses * mask).sum() / mask.sum()``: what the backward will multiply each row's gradient by is,
but for one number, ``mask / mask.sum()``. So the gradients can be computed in the forward. The same
holds for the squares of log-sum-exps in a z-loss.

The weights are the gradient of the sum with respect to the numbers, and that is how they are made:
from the sum back, step by step. They are known before if each step is linear in the numbers.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from . import mutation
from .emitter import Emitter, size_of
from .match import Refused, Step, Weighting
from .softmaxes import summed_dims
from .spelling import arguments, is_in_place, operation
from .tensors import (
    gradients_are_recorded,
    is_cut_off,
    is_number,
    is_plain,
    same,
    same_shape,
    tensor_of,
    value_of,
)

Sizes = Callable[[], list[Any]]


def weighted_sum(values: Node) -> Weighting | None:
    """How a single number is a weighted sum of ``values``, and of nothing else; None if none is.

    Nothing else reads any of what is on the way there.
    """
    found = next(sums([values]), None)
    if found is None or any(step.has_others for step in found.steps):
        return None
    users = {user for node in (values, *found.nodes[:-1]) for user in node.users}
    return found if users.issubset(found.nodes) else None


def sums(numbers: Iterable[Node], squarable: Iterable[Node] = ()) -> Iterator[Weighting]:
    """Each single number that all gradients of ``numbers`` come from, and how; the first one first.

    It is a weighted sum of them, of the squares of those that are ``squarable``, and of others.
    Others may read any of them, if no gradient comes from there.
    """
    try:
        yield from _Walk(numbers, squarable).run()
    except Refused:  # a tensor that is none
        return


def can_be_made_behind(place: Node, weighting: Weighting) -> bool:
    """Whether what the weights are made of is behind ``place`` what the steps to the sum see."""
    for step in weighting.steps:
        first, last = (step.node, place.next) if step.node < place else (place, step.node)
        if any(mutation.writers(mutation.nodes_between(first, last), of=step.reads)):
            return False
    return True


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

    def run(self) -> Iterator[Weighting]:
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
                    yield Weighting(tuple(self.steps))

    def _hold(self, name: Node, maker: Node) -> None:
        self.holds[name] = maker
        users = {user for user in _gradient_users(name) if user > maker}
        self.waiting[name] = users

    def _visit(self, node: Node) -> bool:
        """Add the steps that ``node`` takes; False if it is not understood."""
        names = [name for name in _read_by(node) if name in self.holds]
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
            return Step(node, source, name, "square", _unchanged)
        uses = sum(leaf is name for leaf in tree_leaves((_parts(node), node.kwargs)))
        if uses != 1 or "out" in node.kwargs or operation(node) not in _STEPS:
            return None
        found = _STEPS[operation(node)](node, name)
        if found is None or not (_keeps_shape(node, name) or self._has_shape(node)):
            return None
        return Step(node, source, name, **found)

    def _has_shape(self, node: Node) -> bool:
        """Whether the same, done to others of the same shapes, gives the shape of the result."""
        if operation(node) == "stack":
            return all(part in self.holds for part in _read_by(node))
        return operation(node) in _SHAPED_BY_INPUT


def _keeps_shape(node: Node, name: Node) -> bool:
    """Whether the result has the shape of ``name``, or one that depends on nothing."""
    sizes = tensor_of(_tensor(node)).shape
    return same_shape(_tensor(node), name) or all(isinstance(size, int) for size in sizes)


def _parts(node: Node) -> tuple[Any, ...]:
    """The arguments of ``node``; for a piece of a tensor, those of what cuts it."""
    pieces = node.args[0] if node.args else None
    if operation(node) == "getitem" and isinstance(pieces, Node) and _is_pieces(pieces):
        return (*pieces.args, *pieces.kwargs.values(), node.args[1])
    return node.args


def _is_pieces(node: Node) -> bool:
    return operation(node) in ("pieces", "unbind")


def _read_by(node: Node) -> list[Node]:
    leaves = tree_leaves((_parts(node), node.kwargs))
    return list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, Node)))


def _gradient_users(node: Node) -> Iterator[Node]:
    """Who passes a gradient back to ``node``."""
    for user in node.users:
        if _may_pass_gradient(user):
            yield from _gradient_users(user) if _is_pieces(user) else (user,)


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
    name = operation(after)
    if name == "pow":
        call = arguments(after, lambda input, exponent: locals())
        return call is not None and call["input"] is before and call["exponent"] in (2, 2.0)
    return name == "square" or (name == "mul" and after.args == (before, before))


def _is_known(factor: Any) -> bool:
    value = value_of(factor)
    return is_number(factor) or (is_plain(value) and not value.requires_grad)


def _unchanged(emit: Emitter, gradient: Node, sizes: Sizes) -> Node:
    return gradient


def _scaled(node: Node, name: Node) -> dict[str, Any] | None:
    operand = other_operand(name, node)
    if operand is None or not _is_known(operand):
        return None
    return {
        "kind": "scale",
        "back": lambda emit, gradient, sizes: emit(operation(node), gradient, operand),
        "reads": (operand,) if isinstance(operand, Node) else (),
    }


def other_operand(before: Node, after: Node) -> Any:
    """What ``after`` multiplies ``before`` with, or divides it by; None if it is not that."""
    call = arguments(after, lambda input, other: locals())
    if call is None:
        return None
    if call["input"] is before:
        return call["other"]
    return call["input"] if operation(after) == "mul" else None


def _negated(node: Node, name: Node) -> dict[str, Any] | None:
    return {"kind": "scale", "back": lambda emit, gradient, sizes: emit("neg", gradient)}


def _cast(node: Node, name: Node) -> dict[str, Any] | None:
    # Weights are made where the values are.
    is_there = tensor_of(name).device == tensor_of(node).device
    return {"kind": "move", "back": _unchanged} if is_there and _is_first(node, name) else None


def _is_first(node: Node, name: Node) -> bool:
    """Whether it is ``name`` that ``node`` moves, and not what the result is to look like."""
    return _parts(node)[:1] == (name,)


def _added(node: Node, name: Node) -> dict[str, Any] | None:
    call = arguments(node, lambda input, other: locals())
    if call is None:
        return None
    is_negated = operation(node) == "sub" and call["other"] is name
    back = (lambda emit, gradient, sizes: emit("neg", gradient)) if is_negated else _unchanged
    return {"kind": "sum", "back": back, "has_others": True}


def _summed(node: Node, name: Node) -> dict[str, Any] | None:
    reduction = _reduced_dims(node, tensor_of(name).dim())
    if reduction is None:
        return None
    dims, keeps_dims = reduction

    def back(emit: Emitter, gradient: Node, sizes: Sizes) -> Node:
        for dim in () if keeps_dims else sorted(dims):
            gradient = emit("unsqueeze", gradient, dim)
        for dim in dims if operation(node) == "mean" else ():
            gradient = emit("div", gradient, sizes()[dim])
        return emit("expand", gradient, sizes())

    return {"kind": "sum", "back": back}


def _reduced_dims(node: Node, rank: int) -> tuple[tuple[int, ...], bool] | None:
    """The dimensions that a sum or mean runs over, counted from the front, and whether it keeps
    them; None if that is not clear."""
    reduction = summed_dims(node)
    if reduction is None:
        return None
    dims, keeps = reduction
    if dims is None:
        return tuple(range(rank)), keeps
    dims = (dims,) if isinstance(dims, int) else dims
    if not isinstance(dims, tuple | list) or not all(isinstance(dim, int) for dim in dims):
        return None
    return tuple(dim % max(rank, 1) for dim in dims if rank) or tuple(range(rank)), keeps


def _contracted(node: Node, name: Node) -> dict[str, Any] | None:
    """A product that is summed over some dimensions, as einsum has it."""
    found = _equation(node)
    if found is None:
        return None
    (first, second, result), operands = found
    factor = operands[1] if operands[0] is name else operands[0]
    own, others = (first, second) if operands[0] is name else (second, first)
    # What is summed of the numbers alone has no gradient that einsum could tell of.
    if not _is_known(factor) or not set(own).issubset(others + result):
        return None
    sizes_of = dict(zip(own, tensor_of(name).shape, strict=True))
    if not all(
        same(size, sizes_of.setdefault(letter, size))
        for letter, size in zip(others, tensor_of(factor).shape, strict=True)
    ):
        return None  # one is repeated

    def back(emit: Emitter, gradient: Node, sizes: Sizes) -> Node:
        weights = emit("to", factor, tensor_of(gradient).dtype)
        return emit(torch.einsum, f"{result},{others}->{own}", gradient, weights)

    return {"kind": "sum", "back": back, "reads": (factor,)}


def _equation(node: Node) -> tuple[tuple[str, str, str], tuple[Node, Node]] | None:
    """A product of two tensors: the letters of both and of the result, and both."""
    if operation(node) == "einsum":
        equation, *operands = node.args
        if not isinstance(equation, str) or len(operands) != 2:
            return None
        parts = equation.replace(" ", "").replace("->", ",").split(",")
        is_plain_one = (
            "->" in equation
            and all(part.isalpha() or not part for part in parts)
            and all(len(set(part)) == len(part) for part in parts)
        )
        return ((parts[0], parts[1], parts[2]), tuple(operands)) if is_plain_one else None
    call = arguments(node, lambda input, other: locals())
    if call is None:
        return None
    both = call["input"], call["other"]
    ranks = tensor_of(both[0]).dim(), tensor_of(both[1]).dim()
    letters = _LETTERS.get(ranks) if operation(node) != "linear" or ranks == (1, 1) else None
    return None if letters is None else (letters, both)


_LETTERS = {
    (1, 1): ("i", "i", ""),
    (2, 1): ("ij", "j", "i"),
    (1, 2): ("i", "ij", "j"),
    (2, 2): ("ij", "jk", "ik"),
    (3, 3): ("bij", "bjk", "bik"),
}


def _chosen(node: Node, name: Node) -> dict[str, Any] | None:
    call: dict[str, Any] | None
    if node.op == "call_method":  # losses.where(mask, 0)
        call = arguments(node, lambda input, condition, other: locals())
    else:
        call = arguments(node, lambda condition, input=None, other=None: locals())
    if call is None or name not in (call["input"], call["other"]):
        return None
    mask, is_first = call["condition"], call["input"] is name

    def back(emit: Emitter, gradient: Node, sizes: Sizes) -> Node:
        dropped = emit("logical_not", mask) if is_first else mask
        return emit("masked_fill", gradient, dropped, 0)

    other = call["other"] if is_first else call["input"]
    return {"kind": "move", "back": back, "reads": (mask,), "has_others": not _is_zero(other)}


def _filled(node: Node, name: Node) -> dict[str, Any] | None:
    call = arguments(node, lambda input, mask, value: locals())
    if call is None or call["input"] is not name:
        return None
    mask, has_others = call["mask"], not _is_zero(call["value"])
    back = lambda emit, gradient, sizes: emit("masked_fill", gradient, mask, 0)  # noqa: E731
    return {"kind": "move", "back": back, "reads": (mask,), "has_others": has_others}


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value == 0


def _set(node: Node, name: Node) -> dict[str, Any] | None:
    """``losses[~mask] = 0``, ``total[2] = loss``"""
    call = arguments(node, lambda input, index, value: locals())
    if call is None or name not in (call["input"], call["value"]):
        return None
    index = call["index"]

    def back(emit: Emitter, gradient: Node, sizes: Sizes) -> Node:
        if call["value"] is name:
            return emit(operator.getitem, gradient, index)
        gradient = emit("clone", gradient, memory_format=torch.contiguous_format)
        emit(operator.setitem, gradient, index, 0)
        return gradient

    reads = tuple(leaf for leaf in tree_leaves(index) if isinstance(leaf, Node))
    return {"kind": "move", "back": back, "reads": reads, "has_others": True}


def _put(node: Node, name: Node) -> dict[str, Any] | None:
    """What is added to the places of another tensor that an index says."""
    call = arguments(node, lambda input, dim, index, source=None, *, src=None: locals())
    if call is None:
        return None
    dim, index = call["dim"], call["index"]
    if call["input"] is name:
        return {"kind": "sum", "back": _unchanged, "has_others": True}
    if operation(node) == "index_add":
        get = "index_select"
    elif same_shape(index, name):
        get = "gather"
    else:
        return None
    back = lambda emit, gradient, sizes: emit(get, gradient, dim, index)  # noqa: E731
    return {"kind": "sum", "back": back, "reads": (index,), "has_others": True}


def _put_together(node: Node, name: Node) -> dict[str, Any] | None:
    call = arguments(node, lambda tensors, dim=0, *, axis=0: locals())
    if call is None or not isinstance(call["tensors"], tuple | list):
        return None
    parts, dim = list(call["tensors"]), call["dim"] or call["axis"]
    number = parts.index(name)
    if operation(node) == "stack":
        back = lambda emit, gradient, sizes: emit("select", gradient, dim, number)  # noqa: E731
        return {"kind": "sum", "back": back, "has_others": True}
    if any(tensor_of(part).dim() != tensor_of(node).dim() for part in parts):
        return None
    lengths = [tensor_of(part).size(dim) for part in parts]
    if not all(isinstance(length, int) for length in lengths):
        return None
    start = sum(lengths[:number])
    return {
        "kind": "sum",
        "back": lambda emit, gradient, sizes: emit("narrow", gradient, dim, start, lengths[number]),
        "has_others": True,
    }


def _reshaped(node: Node, name: Node) -> dict[str, Any] | None:
    if not _is_first(node, name):
        return None
    back = lambda emit, gradient, sizes: emit("reshape", gradient, sizes())  # noqa: E731
    return {"kind": "move", "back": back, "reads": _sources(node, name)}


def _moved(node: Node, name: Node) -> dict[str, Any] | None:
    """Each number of the result is one of the source: what is done to places tells which."""
    if not _is_first(node, name):
        return None

    def back(emit: Emitter, gradient: Node, sizes: Sizes) -> Node:
        source = emit("new_zeros", gradient, sizes())
        flat = emit("reshape", source, -1)
        counted = emit("cumsum", emit(torch.ones_like, flat, dtype=torch.int64), 0)
        places = emit("view_as", emit("sub", counted, 1), source)
        places = emit("reshape", emit_again(emit, node, {name: places}), -1)
        flat = emit("index_add", flat, 0, places, emit("reshape", gradient, -1))
        return emit("view_as", flat, source)

    return {"kind": "move", "back": back, "reads": _sources(node, name)}


def _sources(node: Node, name: Node) -> tuple[Node, ...]:
    return tuple(source for source in _read_by(node) if source is not name)


def emit_again(emit: Emitter, node: Node, values: dict[Node, Node]) -> Node:
    """Do what ``node`` does, to other values than it reads."""

    def replaced(part: Node) -> Node:
        return emit_again(emit, part, values) if _is_pieces(part) else values.get(part, part)

    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), replaced)
    return emit(node.target, *args, **kwargs)


_MOVING = (
    *("getitem", "select", "narrow", "index_select", "permute"),
    *("gather", "take_along_dim", "expand"),
)
# What else they read is there before.
_SHAPED_BY_INPUT = (
    *(*_MOVING, "reshape", "sum", "mean", "mul", "div"),
    *("linear", "matmul", "product", "einsum"),
)
_STEPS: dict[str | None, Callable[[Node, Node], dict[str, Any] | None]] = {
    "mul": _scaled,
    "div": _scaled,
    "neg": _negated,
    "cast": _cast,
    "add": _added,
    "sub": _added,
    "sum": _summed,
    "mean": _summed,
    "linear": _contracted,
    "matmul": _contracted,
    "product": _contracted,
    "einsum": _contracted,
    "where": _chosen,
    "masked_fill": _filled,
    "setitem": _set,
    "index_add": _put,
    "scatter_add": _put,
    "stack": _put_together,
    "cat": _put_together,
    "reshape": _reshaped,
    **dict.fromkeys(_MOVING, _moved),
}


def emit_weights(
    emit: Emitter, weighting: Weighting, ones: Mapping[Node, Callable[[], Node]], like: Node
) -> dict[tuple[Node, int], Node]:
    """By what each number is multiplied in the sum, and the square of each (power 2), in its shape.

    ``ones`` makes a tensor in the shape of each number; ``like`` is a tensor where they are.
    """
    dtype = torch.promote_types(tensor_of(like).dtype, torch.float32)
    weights = {(weighting.sum, 1): emit("new_ones", like, (), dtype=dtype)}
    shapes = _Shapes(emit, weighting, ones)
    for step in reversed(weighting.steps):
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
    return node.args[0] if operation(node) == "setitem" else node


class _Shapes:
    """The sizes of what is on the way to a sum, before any of it is computed."""

    def __init__(
        self, emit: Emitter, weighting: Weighting, ones: Mapping[Node, Callable[[], Node]]
    ):
        self.emit = emit
        self.steps: dict[Node, list[Step]] = {}
        for step in weighting.steps:
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
