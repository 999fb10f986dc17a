"""Recognises sums of per-row numbers in which each has a weight that is known before the numbers.

In ``(losses * mask).sum() / mask.sum()`` the weights are ``mask / mask.sum()``. The backward will
multiply each row's gradient by its weight and by one number for all, so the forward can compute the
gradients. The same holds for the squares of log-sum-exps in a z-loss.

The weights are the gradient of the sum with respect to the numbers, which autograd makes of the
part of the graph between them. If it does not depend on the numbers' values, the sum is linear in
them.
"""

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch.fx import Graph, Node, map_arg

from ..compat.aten_trace import bind_unbacked, trace
from ..compat.graphs import UNBACKED_BINDINGS, fake_mode_of, tree_leaves
from ..graph import (
    NARROW,
    Emitter,
    Refused,
    arguments,
    canonical_op,
    draws,
    gradients_are_recorded,
    in_fp32,
    is_cut_off,
    memory_of,
    mutation,
    tensor_of,
    value_of,
    wraps_none,
)
from .meeting_points import meeting_points


@dataclass(frozen=True)
class LinearReduction:
    """A single number that is a weighted sum of others, and perhaps of something else besides."""

    sum: Node
    reads_of: dict[Node, frozenset[Node]]
    """For each node between the numbers and the sum: the inputs of the weights that it reads."""
    squared: frozenset[Node]
    """The nodes that are squared, and those between them and the numbers."""
    graph: Graph
    """Computes the weights, in ATen operations."""
    given: tuple[tuple[Node, int | None], ...]
    """For each placeholder of ``graph`` the node that it stands for, and which item of that node's
    tuple. The numbers come first: only their shapes count, and any value will do."""
    weighted: tuple[tuple[Node, int], ...]
    """For each output of ``graph`` the number that it is the weight of, and the power: 1, or 2 for
    the weight of the number's square."""

    @property
    def reads(self) -> set[Node]:
        """The inputs of the weights."""
        return set().union(*self.reads_of.values())

    @property
    def shaped_by(self) -> set[Node]:
        """The numbers whose shapes the weights take."""
        numbers = {number for number, _ in self.weighted}
        placeholders = self.graph.find_nodes(op="placeholder")
        given = zip(placeholders, self.given, strict=True)
        return {node for place, (node, _) in given if place.users and node in numbers}

    @property
    def is_scaled(self) -> bool:
        """Whether something on the way to the sum is multiplied or divided."""
        return any(node.target in _SCALING for node in self.graph.nodes)


_ATEN = torch.ops.aten
_SCALING = (_ATEN.mul.Tensor, _ATEN.div.Tensor, _ATEN.neg.default, _ATEN.div.Scalar)


def sums(numbers: Iterable[Node], squarable: Iterable[Node] = ()) -> Iterator[LinearReduction]:
    """The weighted sums of ``numbers`` through which all their gradients pass, the last one first.

    A sum may contain squares of those numbers that are ``squarable``, and other things. Whoever
    else reads the numbers passes no gradient back to them.
    """
    numbers = sorted(numbers)
    for point in reversed(list(meeting_points(numbers))):
        try:
            yield _Tail(numbers, set(squarable), point).reduction()
        except Refused:
            continue


def can_be_made_behind(place: Node, reduction: LinearReduction) -> bool:
    """Whether the weights' inputs have the same values after ``place`` as on the way to the sum.

    Nor are they written to later: autograd would refuse the gradient of the sum.
    """
    end = place.graph.output_node()
    return not any(
        any(mutation.writers(mutation.nodes_between(min(node, place), end), of=reads))
        for node, reads in reduction.reads_of.items()
    )


class _Tail:
    """The part of a graph between ``numbers`` and the single number ``end``."""

    def __init__(self, numbers: list[Node], squarable: set[Node], end: Node):
        self.numbers, self.end = numbers, end
        changing, self.written = self._changing()
        self.steps = self._steps(changing)
        for node in self.steps:
            _check(node)
        read = {source for node in self.steps for source in node.all_input_nodes}
        self.given = sorted(read.difference(self.steps, numbers))
        self.squares, self.squared = self._squares(changing, squarable)

    def _changing(self) -> tuple[set[Node], set[int]]:
        """The nodes that depend on the numbers or share memory that such nodes write to, and that
        memory."""
        changing, written = set(self.numbers), set[int]()
        before = 0
        while before < len(changing):
            before = len(changing)
            for node in (*mutation.nodes_between(self.end.graph._root, self.end), self.end):
                memory = memory_of(node) | mutation.memory_written(node)
                if not (changing.isdisjoint(node.all_input_nodes) and written.isdisjoint(memory)):
                    changing.add(node)
                    written |= mutation.memory_written(node)
        return changing, written

    def _steps(self, changing: set[Node]) -> list[Node]:
        """Those nodes of ``changing`` that ``end`` depends on, in graph order."""
        steps, memory = {self.end}, memory_of(self.end)
        for node in sorted(changing.difference(self.numbers), reverse=True):
            if node in steps or not memory.isdisjoint(mutation.memory_written(node)):
                steps.add(node)
                sources = changing.intersection(node.all_input_nodes)
                steps |= sources.difference(self.numbers)
                memory = memory.union(*map(memory_of, sources))
        for number in self.numbers:
            if any(node < number and memory_of(node) & memory_of(number) for node in steps):
                raise Refused(f"{number} is written to by another name")
        return sorted(steps)

    def _squares(
        self, changing: set[Node], squarable: set[Node]
    ) -> tuple[dict[Node, Node], frozenset[Node]]:
        """Each node that squares a squarable number, perhaps times a known factor, with its root.

        And the roots, with all nodes between them and the numbers.
        """
        single, squares = dict.fromkeys(squarable, frozenset[Node]()), {}
        for node in self.steps:
            sources = changing.intersection(node.all_input_nodes)
            source = next(iter(sources), None)
            if len(sources) != 1 or source not in single or mutation.may_write(node):
                continue
            if _is_square(source, node) and tensor_of(node).requires_grad:
                squares[node] = source
            elif _keeps_numbers_apart(source, node):
                single[node] = single[source] | {source}
        squared = frozenset().union(*(single[node] | {node} for node in squares.values()))
        if any(memory_of(node) & self.written for node in squared):
            raise Refused("what is squared is written to")
        return squares, squared

    def reduction(self) -> LinearReduction:
        sources = (*self.numbers, *self.given)
        try:
            numbers = [_like(tensor_of(node)) for node in self.numbers]
            graph = trace(self._gradients, [*numbers, *map(_value, self.given)])
        except Exception as error:  # whatever a step does that cannot be traced
            raise Refused(f"{self.end} cannot be traced: {error}") from error
        placeholders = dict(zip(graph.find_nodes(op="placeholder"), _pieces(sources), strict=True))
        results = tree_leaves(graph.output_node().args)
        depending = _depending(graph, len(self.numbers))
        known = results[: len(self.numbers) + len(self.squares)]
        if not depending.isdisjoint(known):
            raise Refused(f"{self.end} is not a weighted sum")
        if not self.squares and any(_is_zero(weight) for weight in known):
            raise Refused(
                f"{self.end} takes nothing of one of its numbers, as far as the trace tells"
            )
        weighted = [(node, 1) for node in self.numbers]
        if self.squares:
            weighted += [(node, 2) for node in self.numbers]
        graph.output_node().args = ((*results[: len(self.numbers)], *results[len(known) :]),)
        graph.eliminate_dead_code()
        if any(draws(node) or node.op == "get_attr" for node in graph.nodes):
            raise Refused(f"{self.end} is random")
        used = {source for placeholder, (source, _) in placeholders.items() if placeholder.users}
        reads = used.difference(self.numbers)
        if any(isinstance(v := value_of(node), torch.Tensor) and v.requires_grad for node in reads):
            raise Refused(f"{self.end} has weights that have a gradient")
        return LinearReduction(
            sum=self.end,
            reads_of={
                node: frozenset(reads.intersection(node.all_input_nodes)) for node in self.steps
            },
            squared=self.squared,
            graph=graph,
            given=tuple(placeholders.values()),
            weighted=tuple(weighted),
        )

    def _gradients(self, *values: Any) -> list[Any]:
        """The sum's gradients by each number, then by each square, then by each number through its
        squares.

        The last are for numbers that are 1. Each square's gradient is multiplied by what is
        squared, and goes back to the single number that this is made of, which multiplies it by the
        same factor once more.
        """
        numbers, given = values[: len(self.numbers)], values[len(self.numbers) :]
        inputs = dict(zip(self.given, map(_widened, given), strict=True))

        def roots(*numbers: torch.Tensor) -> list[Any]:
            found = self._run(inputs | dict(zip(self.numbers, numbers, strict=True)))
            return [found[root] for root in self.squares.values()]

        def end(numbers: Sequence[torch.Tensor], squares: Sequence[torch.Tensor]) -> Any:
            known = zip((*self.numbers, *self.squares), (*numbers, *squares), strict=True)
            return self._run(inputs | dict(known))[self.end]

        back: Any
        back_to_numbers: Any
        if not self.squares:
            total, back = torch.func.vjp(lambda *numbers: end(numbers, []), *numbers)[:2]
            return list(back(_one(total)))
        squared, back_to_numbers = torch.func.vjp(roots, *numbers)[:2]
        total, back = torch.func.vjp(end, numbers, [root.square() for root in squared])[:2]
        of_numbers, of_squares = back(_one(total))
        of_roots = [of * root for of, root in zip(of_squares, squared, strict=True)]
        return [*of_numbers, *of_squares, *back_to_numbers(of_roots)]

    def _run(self, known: dict[Node, Any]) -> dict[Node, Any]:
        """Take the steps, in FP32 where they are in less."""
        found = dict(known)
        for number in self.numbers:
            found[number] = found[number].clone()  # it may be written to
        for node in self.steps:
            if node in found:
                continue
            given = map_arg((node.args, node.kwargs), found.__getitem__)
            function, args, kwargs = in_fp32(node, *given)
            if canonical_op(node) == "setitem" and not isinstance(args[2], torch.Tensor):
                args = (*args[:2], args[0].new_full((), args[2]))  # it would become a constant
            with torch.set_grad_enabled(gradients_are_recorded(node)):
                result = found[node] = function(*args, **kwargs)
            bind_unbacked(value_of(self.numbers[0]), node, result)
        return found


def _one(total: torch.Tensor) -> torch.Tensor:
    """1, not computed from ``total``: inputs of the sum's value are not those of the weights."""
    return torch.ones((), dtype=total.dtype, device=total.device)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in NARROW else value


def _check(node: Node) -> None:
    """Refused if ``node`` cannot be run again in a trace."""
    is_known = node.op in ("call_function", "call_method") and (
        mutation.writes(node) or not mutation.may_write(node)
    )
    tensors = [v for v in tree_leaves(value_of(node)) if isinstance(v, torch.Tensor)]
    if not is_known or is_cut_off(node) or not all(map(wraps_none, tensors)):
        raise Refused(f"{node} is not understood")
    # The trace would give it no gradient, and its weights would be 0 without a word.
    wants_gradient = any(tensor.requires_grad for tensor in tensors) and not mutation.writes(node)
    if wants_gradient and not gradients_are_recorded(node):
        raise Refused(f"{node} has a gradient where none are recorded")


def _like(value: torch.Tensor) -> torch.Tensor:
    """A contiguous fake tensor of the shape of ``value``, in FP32 or FP64."""
    with fake_mode_of([value]), torch.no_grad():
        return value.new_empty(value.shape, dtype=torch.promote_types(value.dtype, torch.float32))


def _value(node: Node) -> Any:
    value = value_of(node)
    is_tensor = isinstance(value, torch.Tensor)
    # A mask as it is remembers how many numbers it has chosen.
    return tensor_of(node).detach() if is_tensor and value.requires_grad else value


def _pieces(nodes: Iterable[Node]) -> Iterator[tuple[Node, int | None]]:
    """For each placeholder of a trace: the node that it stands for, and the place in a tuple."""
    for node in nodes:
        value = value_of(node)
        yield from zip(repeat(node), range(len(value)) if isinstance(value, tuple) else [None])


def _depending(graph: Graph, count: int) -> set[Node]:
    """The nodes of ``graph`` that depend on the values of its first ``count`` inputs."""
    depending = set(graph.find_nodes(op="placeholder")[:count])
    for node in graph.nodes:
        looks = getattr(node.target, "overloadpacket", None) in _LOOKING
        seen = {node.args[0]} if looks else set()
        if not depending.isdisjoint(set(node.all_input_nodes) - seen):
            depending.add(node)
            if UNBACKED_BINDINGS in node.meta:
                raise Refused(f"sizes depend on {node}")
    return depending


_LOOKING = (
    *(_ATEN.zeros_like, _ATEN.ones_like, _ATEN.full_like, _ATEN.empty_like, _ATEN.sym_size),
    *(_ATEN.new_zeros, _ATEN.new_ones, _ATEN.new_full, _ATEN.new_empty, _ATEN.sym_numel),
)


def _is_zero(node: Node) -> bool:
    """Whether torch.func.vjp has made ``node`` for an input that the result does not depend on."""
    return node.target is _ATEN.zeros_like.default


def _is_square(source: Node, node: Node) -> bool:
    name = canonical_op(node)
    if name == "pow":
        call = arguments(node, lambda input, exponent: locals())
        return call is not None and call["input"] is source and call["exponent"] in (2, 2.0)
    return name == "square" or (name == "mul" and node.args == (source, source))


_KEEPING = (
    *("neg", "div", "cast", "masked_fill", "reshape", "permute", "getitem", "select", "narrow"),
    *("index_select", "gather", "take_along_dim", "expand"),
)


def _keeps_numbers_apart(source: Node, node: Node) -> bool:
    """Whether each number of ``node`` is one of ``source`` times a known factor, or is known."""
    name, uses = canonical_op(node), sum(argument is source for argument in node.args)
    return uses == 1 and (name in ("mul", "where") or (name in _KEEPING and node.args[0] is source))


def emit_weights(
    emit: Emitter, reduction: LinearReduction, like: Mapping[Node, Node]
) -> dict[tuple[Node, int], Node]:
    """The weight of each number, under power 1, and of its square, under 2, in the number's shape.

    ``like`` has a tensor of the shape of each number in ``reduction.shaped_by``. The weights are in
    FP32, or FP64.
    """
    made: dict[Node, Any] = {}
    placeholders = reduction.graph.find_nodes(op="placeholder")
    given = dict(zip(placeholders, reduction.given, strict=True))
    for node in reduction.graph.nodes:
        if node.op == "output":
            (results,) = map_arg(node.args, made.__getitem__)
            return dict(zip(reduction.weighted, results, strict=True))
        source, piece = given.get(node, (None, None))
        if source is None:
            made[node] = emit.copied(node, made)
        elif node.users and source in like:
            made[node] = emit("to", like[source], node.meta["val"].dtype)
        elif node.users:
            made[node] = source if piece is None else emit(operator.getitem, source, piece)
    raise AssertionError("a graph has an output")
