"""Runs nodes of a graph on fake tensors again, and writes down what that is on chunks of rows."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node, map_arg

from ..compat.aten_trace import by_symbols, tree_map
from ..compat.graphs import fake_mode_of, tree_leaves
from ..graph import (
    Refused,
    canonical_op,
    describe,
    draws,
    gradients_are_recorded,
    hint,
    in_fp32,
    is_cut_off,
    memory_of,
    mutation,
    same,
    tensor_of,
    value_of,
    wraps_none,
)
from ..logits import Head
from ..op import RowCount
from .call import Mixes
from .call_tracer import CallTracer, IsWide
from .layout import Dim, Space, labels_in, reshaped
from .values import (
    Cell,
    Expression,
    HeadLeaf,
    Outer,
    RowLeaf,
    Traced,
)

# A node is run once more for each input that turns out to be as wide as the logits.
_MOST_RUNS = 32
_CREATES_NOTHING = ("requires_grad_", "retain_grad", "register_hook", "backward", "detach_")


class Tracer(CallTracer):
    """Traces nodes by tracing the calls that they make."""

    def __init__(
        self,
        most_words: int,
        dependents: set[Node],
        of_others: Mapping[Node, Head],
        like: torch.Tensor,
    ) -> None:
        """``dependents`` are the nodes that depend on the heads, and ``of_others`` those that
        depend on other heads; ``like`` is any fake tensor.
        """
        super().__init__(most_words)
        self.results: dict[Node, Any] = {}
        """What the nodes gave that were run again."""
        self.absorbed: dict[Node, None] = {}
        """Nodes that make an input by row, and are run in chunks instead."""
        self.expressions: dict[int, Expression] = {}
        """What results held when they were made."""
        self._dependents = dependents
        self._of_others = of_others
        self._like = like
        self._nodes: dict[Node, Any] = {}

    # Nodes.

    def head(self, node: Node, number: int, bias: Node | None, dims: tuple[Dim, ...],
             space: Space) -> None:  # fmt: skip
        """Begin with the logits that ``node`` computes."""
        value = tensor_of(node)
        leaf = Expression(HeadLeaf(number), space=space)
        if bias is not None:
            given = self._outside(bias)
            leaf = self.make(
                "aten.add.Tensor", leaf, self.constant(self.outer(given), tuple(given.shape))
            )
        inputs = [
            source for source in node.all_input_nodes if isinstance(value_of(source), torch.Tensor)
        ]
        if not value.requires_grad and any(value_of(source).requires_grad for source in inputs):
            leaf = self.make("aten.detach.default", leaf)
        traced = Traced(Cell(leaf, space), (), dims, tuple(value.shape), space)
        if len(traced.rest) > 1:  # a batch of one sequence has no rows in that dimension
            traced.cell.expression = self.make(
                "aten.reshape.default", leaf, [RowCount(), *traced.rest]
            )
        fake = self._fake(value)
        self._hold(fake, traced)
        self.results[node] = fake
        self.expressions[id(fake)] = self.read(traced)  # of one word, say, it leaves as it is

    def is_wide(self, node: Node) -> bool:
        """Whether ``node`` was run again and gave what stays in chunks."""
        leaves = tree_leaves(self.results.get(node))
        held = [found for leaf in leaves if (found := self.traced(leaf)) is not None]
        return any(one.words > self.most_words for one in held)

    def is_traced(self, node: Node) -> bool:
        """Whether ``node`` was run again and gave nothing but what is computed in chunks."""
        leaves = tree_leaves(self.results.get(node))
        return bool(leaves) and all(self.traced(leaf) is not None for leaf in leaves)

    def run(self, node: Node) -> None:
        """Run ``node`` again, and what it reads of dependents; Refused if that is impossible."""
        if node in self.results:
            return
        for source in node.all_input_nodes:
            if source in self._dependents and source not in self.results:
                if source.op == "output" or source.target == "size":
                    raise Refused("")
                self.run(source)
        result = self._run(node, self.results)
        self.results[node] = result
        for leaf in tree_leaves(result):
            if (held := self.traced(leaf)) is not None:
                self.expressions.setdefault(id(leaf), self.read(held))

    def _run(self, node: Node, known: Mapping[Node, Any]) -> Any:
        return self._until_known(lambda: self._run_once(node, known))

    def _until_known(self, run: Callable[[], Any]) -> Any:
        """What ``run`` gives, once all is known that it reads and that is as wide as the logits."""
        for _ in range(_MOST_RUNS):
            try:
                return run()
            except IsWide as wide:
                self._make_wide(wide)
        raise Refused("too much of it is made outside and as wide as the logits")

    def _called(self, function: Any, args: Any, kwargs: Any) -> Any:
        with fake_mode_of([self._like]), by_symbols(), self:
            return function(*args, **kwargs)

    def _run_once(self, node: Node, known: Mapping[Node, Any]) -> Any:
        _check(node)

        def given(source: Node) -> Any:
            return known[source] if source in known else self._outside(source)

        function, args, kwargs = in_fp32(node, *map_arg((node.args, node.kwargs), given))
        with fake_mode_of([self._like]), by_symbols(), self, torch.no_grad(), torch.autocast(
            self._like.device.type, enabled=False
        ):  # fmt: skip
            if canonical_op(node) == "setitem" and isinstance(args[2], int | float):
                # It would become a constant.
                number = torch.full((), args[2], dtype=args[0].dtype, device=args[0].device)
                args = (*args[:2], number)
            result = function(*args, **kwargs)
        if not mutation.writes(node):
            result = self._in_memory_of(node, result)
            cells = {
                held.cell for leaf in tree_leaves((args, kwargs)) if (held := self.traced(leaf))
            }
            self._stop_gradients(node, result, cells)
        elif not gradients_are_recorded(node) and _has_gradient(node.all_input_nodes):
            raise Refused(f"{describe(node)} writes where no gradients are recorded")
        return result

    def _in_memory_of(self, node: Node, result: Any) -> Any:
        """``result``, in memory of its own if ``node`` makes some: a cast may do so in the model's
        dtypes alone."""
        held = self.traced(result)
        if held is None or not isinstance(value_of(node), torch.Tensor):
            return result
        memory = memory_of(node)
        for source in node.all_input_nodes:
            given = self.traced(self.results.get(source))
            if given is None:
                continue
            is_alike, is_shared = given.cell is held.cell, not memory.isdisjoint(memory_of(source))
            if is_shared and not is_alike:
                given.cell.is_shared = held.cell.is_shared = True
            elif is_alike and not is_shared:
                with fake_mode_of([self._like]):
                    copy = torch.empty_like(result)
                cell = Cell(self.read(held), held.space)
                self._hold(copy, Traced(cell, (), held.dims, held.sizes, held.space))
                return copy
        return result

    def _stop_gradients(self, node: Node, result: Any, cells: set[Cell]) -> None:
        """Where the model's own result has no gradient, though what it is made of has one.

        ``cells`` are those of what it is made of.
        """
        if not _has_gradient(node.all_input_nodes):
            return
        for fake, value in zip(tree_leaves(result), tree_leaves(value_of(node)), strict=True):
            held = self.traced(fake)
            if held is None or value.requires_grad or not value.is_floating_point():
                continue
            cell = Cell(self.make("aten.detach.default", self.read(held)), held.space)
            cell.is_shared = held.cell.is_shared = held.cell in cells
            self._hold(fake, Traced(cell, (), held.dims, held.sizes, held.space))

    def _outside(self, node: Node) -> Any:
        if node not in self._nodes:
            value = value_of(node)
            if isinstance(value, torch.Tensor):
                tensor_of(node)  # Refused for what is no plain tensor
                other = self._of_others.get(node)
                if other is not None and node not in self._dependents and _is_large(node, other):
                    raise NeedsHead(other)
                fake = self._fake(value)
                self._know(fake, Outer(fake, node, depends=node in self._dependents))
                self._nodes[node] = fake
            elif isinstance(value, tuple | list):
                raise Refused(f"{describe(node)} gives several tensors")
            else:
                self._nodes[node] = value
        return self._nodes[node]

    # What is wide and made outside.

    def _make_wide(self, wide: "IsWide") -> Expression:
        """An input as wide as the logits: what makes it is run in chunks, if that is possible."""
        key = (wide.outer, wide.dims, wide.space)
        if key not in self._leaves:
            if set(labels_in(wide.dims)) != set(wide.space.finest):
                raise Refused("an input as wide as the logits has other rows")
            made = self._absorbed(wide)
            self._leaves[key] = made or Expression(RowLeaf(wide.outer, wide.dims), space=wide.space)
        return self._leaves[key]

    def _absorbed(self, wide: "IsWide") -> Expression | None:
        """What makes it in chunks; None if that is impossible."""
        node, call, before = wide.outer.node, wide.outer.call, dict(self.absorbed)
        try:
            if node is not None:
                if not self._can_absorb(node):
                    return None
                self.absorbed[node] = None
                inputs = {
                    source: self._input_of(self._outside(source), node, tensor_of(node), wide)
                    for source in node.all_input_nodes
                }
                result = self._run(node, inputs)
            elif call is not None and wide.outer.item is None:
                function, args, kwargs = tree_map(
                    lambda leaf: (
                        self._input_of(leaf.value, None, wide.outer.value, wide)
                        if isinstance(leaf, Outer)
                        else leaf
                    ),
                    call,
                )
                result = self._until_known(lambda: self._called(function, args, kwargs))
            else:
                return None
        except Refused:
            self.absorbed = before
            return None
        held = self.traced(result)
        if held is None or held.finest != wide.dims or held.space is not wide.space:
            self.absorbed = before
            return None
        return self.read(held)

    def _can_absorb(self, node: Node) -> bool:
        return (
            node.op in ("call_function", "call_method")
            and node not in self._dependents
            and not mutation.may_write(node)
            and not draws(node)
            and all(user in self._dependents or user in self.absorbed for user in node.users)
        )

    def _input_of(self, given: Any, node: Node | None, made: torch.Tensor, wide: "IsWide") -> Any:
        """``given`` ``made`` an input that is wide; as what it is in chunks if it has rows."""
        if not isinstance(given, torch.Tensor):
            return given
        dims = _dims_before(node, given.shape, made.shape, wide.dims)
        if all(dim is None for dim in dims):
            return given
        outer = self.outer(given)
        try:
            leaf = self.by_row(outer, dims, wide.space)
        except IsWide as inner:
            leaf = self._make_wide(inner)
        fake = self._fake(given)
        traced = Traced(Cell(leaf, wide.space), (), dims, tuple(given.shape), wide.space)
        self._hold(fake, traced)
        return fake


def _dims_before(
    node: Node | None, before: Sequence[Any], after: Sequence[Any], dims: tuple[Dim, ...]
) -> tuple[Dim, ...]:
    """The dimensions of an input of ``node``, if its result has ``dims``."""
    if node is not None and canonical_op(node) == "one_hot":
        return dims[:-1]
    if node is not None and canonical_op(node) == "reshape":
        return reshaped(dims, after, before)
    if len(before) > len(after):
        raise Refused("")
    offset = len(after) - len(before)
    return tuple(
        None if same(size, 1) else dim for dim, size in zip(dims[offset:], before, strict=True)
    )


class NeedsHead(Exception):
    """The logits of another head are put together with these."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head


def _is_large(node: Node, head: Head) -> bool:
    """Whether ``node`` has about as many numbers as the logits of ``head``."""
    return 4 * hint(tensor_of(node).numel()) >= hint(tensor_of(head.node).numel())


def _has_gradient(nodes: Iterable[Node]) -> bool:
    leaves = [leaf for node in nodes for leaf in tree_leaves(value_of(node))]
    return any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves)


def _check(node: Node) -> None:
    """Refused if ``node`` cannot be run again."""
    is_known = node.op in ("call_function", "call_method") and (
        mutation.writes(node) or not mutation.may_write(node)
    )
    tensors = [leaf for leaf in tree_leaves(value_of(node)) if isinstance(leaf, torch.Tensor)]
    # A graph that is called has no value.
    is_known &= all(value_of(source) is not None for source in node.all_input_nodes)
    if not is_known or str(node.target) in _CREATES_NOTHING or not all(map(wraps_none, tensors)):
        raise Mixes(f"{describe(node)} is not known to treat rows apart")
    if is_cut_off(node):
        raise Refused(f"{describe(node)} requires a gradient and has nowhere to pass it")
    if draws(node):
        raise Mixes(f"{describe(node)} draws random numbers")
    if (
        not mutation.writes(node)
        and _has_gradient([node])
        and not _has_gradient(node.all_input_nodes)
    ):
        raise Refused(f"{describe(node)} is where a gradient ends")
