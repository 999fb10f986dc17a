"""Carves out of a graph what can be run in chunks of rows: from heads to numbers without a
vocabulary."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch.fx import Graph, Node

from .. import config
from ..compat.graphs import tree_leaves
from ..graph import (
    Refused,
    at,
    canonical_op,
    describe,
    given_a_gradient,
    hint,
    in_inference,
    memory_of,
    mutation,
    passing,
    same,
    tensor_of,
    value_of,
)
from ..logits import Head
from ..sums import sums
from .call import Mixes
from .dependents import Dependents
from .expressions import exits_of, nodes_of
from .layout import Dim, Label, Space
from .placing import Placing
from .row_calls import row_calls
from .tracer import NeedsHead, Tracer
from .types import Region, RowCall
from .values import Exit, Outer

# What has at most this share of a vocabulary has none.
_SHARE = 4
_PRODUCTS = ("linear", "matmul", "product", "addmm", "einsum", "conv1d")


def may_be_carved(head: Head) -> bool:
    """False if a matrix product reads what ``head`` computes, as in the blocks of a model.

    Said quickly: a model has many such layers.
    """
    least = hint(tensor_of(head.node).numel()) // 2
    seen, pending = {head.node}, [head.node]
    while pending:
        for user in pending.pop().users:
            if canonical_op(user) in _PRODUCTS or "attention" in describe(user):
                return False
            tensors = [v for v in tree_leaves(value_of(user)) if isinstance(v, torch.Tensor)]
            if user not in seen and any(hint(tensor.numel()) >= least for tensor in tensors):
                seen.add(user)
                pending.append(user)
    return True


def carve(head: Head, heads: Sequence[Head]) -> Region:
    """The region that begins with ``head``, and with those of ``heads`` whose logits it meets.

    Refused if there is none.
    """
    graph = head.node.graph
    dependents = Dependents(heads)
    of_others = dependents.of_single_heads()
    roots = [head]
    while True:
        of_roots = dependents.of(roots)
        others = {node: one for node, one in of_others.items() if one not in roots}
        try:
            region = _Carver(graph, roots, of_roots, others).region()
        except NeedsHead as needs:
            roots.append(needs.head)
            continue
        if ends_in_a_sum(region):
            return region
        try:
            longer = _Carver(graph, roots, of_roots, others).region(goes_on=True)
        except (Refused, NeedsHead):
            return region
        return replace(longer, node=region.node) if ends_in_a_sum(longer) else region


def ends_in_a_sum(region: Region) -> bool:
    """Whether all gradients of ``region`` pass through one sum with known weights, or there are
    none."""
    on_the_way = passing(region.node.graph)
    ends = [node for node in region.results if tensor_of(node).requires_grad and node in on_the_way]
    known_later = Dependents(region.heads).of(region.heads)
    return not ends or any(known_later.isdisjoint(found.reads) for found in sums(ends))


class _Carver:
    def __init__(
        self, graph: Graph, heads: list[Head], dependents: set[Node], others: Mapping[Node, Head]
    ) -> None:
        self.graph, self.heads = graph, heads
        self.order = {node: number for number, node in enumerate(graph.nodes)}
        words = min(hint(head.vocab_size) for head in heads)
        like = tensor_of(heads[0].node)
        self.tracer = Tracer(max(1, words // _SHARE), dependents, others, like)
        self.dependents = dependents
        self.root, self.dims = _rows_of(heads)
        self.sizes: dict[Node, Node] = {}

    def region(self, goes_on: bool = False) -> Region:
        """What there is to be run in chunks.

        It ends with numbers without a vocabulary, or ``goes_on`` with what is computed of these
        for each row.
        """
        for number, (head, dims) in enumerate(zip(self.heads, self.dims, strict=True)):
            self.tracer.head(head.node, number, head.bias, dims, self.root)
        for node in self.graph.nodes:
            if node in self.dependents and node not in self.tracer.results:
                self._visit(node)
        if goes_on:
            self._go_on()
        nodes = sorted(self.tracer.results, key=self.order.__getitem__)
        self._check_memory(nodes)
        results = self._results(nodes)
        exits = self._exits(results)
        calls = tuple(row_calls(self.heads, exits, self.tracer.written_over))
        self._check_shared_memory(nodes, results)
        sources = self._sources(calls, results)
        inside = {*nodes, *self.tracer.absorbed}
        place, moved = Placing(self.graph, inside, set(nodes), self.dependents).place(
            sources, results, is_differentiated=any(exits.values())
        )
        return Region(
            node=next(iter(results), self.heads[0].node),
            heads=tuple(self.heads),
            root=self.root,
            dims=self.dims,
            nodes=tuple(nodes),
            absorbed=self._absorbed_alone(nodes, sources),
            calls=calls,
            results=results,
            sizes=self.sizes,
            place=place,
            moved=moved,
        )

    def _visit(self, node: Node) -> None:
        tracer = self.tracer
        wide = [source for source in node.all_input_nodes if tracer.is_wide(source)]
        is_item = any(
            source in tracer.results and isinstance(tracer.results[source], tuple | list)
            for source in node.all_input_nodes
        )
        written = self._wide_memory_written(node)
        if not wide and not is_item and not written:
            return
        if written:
            self._visit_readers(node, written)
        if node.op == "output":
            raise Refused("the compiled function returns the logits, or what is made of them")
        if isinstance(value_of(node), int | torch.SymInt):
            self.sizes[node] = _same_size(self.graph, node)
            return
        self._run(node)

    def _run(self, node: Node) -> None:
        try:
            self.tracer.run(node)
        except Mixes as mixes:
            raise Mixes(f"{describe(node)}{at(node)} reads the logits, and {mixes}") from mixes
        except Refused as refused:
            why = f", and {refused}" if str(refused) else ""
            raise Refused(f"{describe(node)}{at(node)} reads the logits{why}") from refused
        except NeedsHead:
            raise
        except Exception as error:
            if config.strict:
                raise
            raise Refused(
                f"{describe(node)}{at(node)} reads the logits, and cannot be traced: {error}"
            ) from error

    def _wide_memory_written(self, node: Node) -> set[int]:
        if not mutation.writes(node):
            return set()
        wide = filter(self.tracer.is_wide, self.tracer.results)
        return mutation.memory_written(node) & {s for one in wide for s in memory_of(one)}

    def _visit_readers(self, writer: Node, memory: set[int]) -> None:
        """Run what reads ``memory`` before ``writer`` writes to it."""
        for node in self.graph.nodes:
            if node is writer:
                return
            sources = [source for source in node.all_input_nodes if self.tracer.is_traced(source)]
            if node not in self.tracer.results and any(memory & memory_of(s) for s in sources):
                self._run(node)

    def _go_on(self) -> None:
        """Run again what is computed of each row's numbers, but for writes."""
        tracer, written = self.tracer, set[int]()
        for node in self.graph.nodes:
            if node in tracer.results:
                continue
            memory = {s for one in (node, *node.all_input_nodes) for s in memory_of(one)}
            if mutation.may_write(node):
                written |= mutation.memory_written(node)
            elif node in self.dependents and written.isdisjoint(memory):
                self._run_narrow(node)

    def _run_narrow(self, node: Node) -> None:
        tracer = self.tracer
        sources = [source for source in node.all_input_nodes if source in self.dependents]
        if not all(tracer.is_traced(source) for source in sources):
            return
        before = dict(tracer.absorbed)
        try:
            tracer.run(node)
            is_kept = tracer.is_traced(node) and not tracer.is_wide(node)
        except (Refused, NeedsHead):
            is_kept = False
        if not is_kept:
            tracer.results.pop(node, None)
            tracer.absorbed = before

    def _check_memory(self, nodes: Sequence[Node]) -> None:
        """Refused if others write to what is computed in chunks, or the modes are not plain."""
        inside, last = set(nodes), nodes[-1]
        brought = given_a_gradient(self.graph)
        for node in nodes:
            if not brought.isdisjoint(memory_of(node)):
                raise Refused(f"{describe(node)}{at(node)} is given a gradient by a write")
        memory = {storage for node in nodes for storage in memory_of(node)}
        wide = {s for node in nodes if self.tracer.is_wide(node) for s in memory_of(node)}
        for node in self.graph.nodes:
            written = mutation.memory_written(node) if node not in inside else set()
            is_late = self.order[node] > self.order[last]
            if not written.isdisjoint(wide if is_late else memory):
                raise Refused(f"{describe(node)}{at(node)} may write to what is made of the logits")
        if not in_inference(self.graph).isdisjoint(inside):
            raise Refused("the head is inside torch.inference_mode in the compiled function")

    def _check_shared_memory(
        self, nodes: Sequence[Node], results: Mapping[Node, Exit | Outer]
    ) -> None:
        """Refused if one result is written to, and another one would have changed with it."""
        memory = [storage for node in results for storage in memory_of(node)]
        shared = {storage for storage in memory if memory.count(storage) > 1}
        for node in mutation.nodes_between(nodes[-1], self.graph.output_node()):
            if not shared.isdisjoint(mutation.memory_written(node)):
                raise Refused(f"{describe(node)}{at(node)} may write to what is made of the logits")

    def _results(self, nodes: Sequence[Node]) -> dict[Node, Exit | Outer]:
        inside, found = set(nodes) | set(self.tracer.absorbed), dict[Node, Exit | Outer]()
        for node in nodes:
            if inside.issuperset(node.users) or not set(node.users) - inside - self.sizes.keys():
                continue
            result = self.tracer.results[node]
            if not isinstance(result, torch.Tensor):
                raise Refused(f"{describe(node)}{at(node)} gives several tensors")
            held = self.tracer.traced(result)
            if held is None:
                found[node] = self.tracer.given(result)
                continue
            expression = self.tracer.expressions[id(result)]
            if expression is not self.tracer.read(held):
                raise Refused(f"{describe(node)}{at(node)} is written to")
            if held.words > self.tracer.most_words:
                raise Refused(f"{describe(node)}{at(node)} leaves the rows")
            found[node] = Exit(held, expression, result, held.finest)
        return found

    def _exits(self, results: Mapping[Node, Exit | Outer]) -> dict[Exit, bool]:
        """What the calls have to give, and whether a gradient may reach it."""
        on_the_way, found = passing(self.graph), dict[Exit, bool]()
        for node, result in results.items():
            value = tensor_of(node)
            has_gradient = value.requires_grad and node in on_the_way
            for exit in exits_of(result):
                found[exit] = found.get(exit, False) or has_gradient
        return found

    def _sources(self, calls: Sequence[RowCall], results: Mapping[Node, Exit | Outer]) -> set[Node]:
        """What is read of the rest of the graph."""
        sources = {
            source
            for call in calls
            for outer in (
                *(one.op.outer for one in call.by_row),
                *(one.outer for one in call.constants),
                *call.space.picks,
            )
            for source in nodes_of(outer)
        }
        for head in self.heads:
            sources |= {head.hidden, head.weight}
        for result in results.values():
            if isinstance(result, Outer):
                sources.update(nodes_of(result))
        if not sources.isdisjoint(self.dependents):
            raise Refused("what is made of all rows is put together with rows")
        return sources

    def _absorbed_alone(self, nodes: Sequence[Node], sources: set[Node]) -> tuple[Node, ...]:
        """What nobody needs that is run in chunks instead."""
        inside, alone = set(nodes), dict(self.tracer.absorbed)
        for node in sorted(alone, key=self.order.__getitem__, reverse=True):
            if node in sources or not all(u in inside or u in alone for u in node.users):
                del alone[node]
        return tuple(alone)


def _rows_of(heads: Sequence[Head]) -> tuple[Space, tuple[tuple[Dim, ...], ...]]:
    """The rows of ``heads``, and the dimensions of their logits."""
    labels: list[Label] | None = None
    found = []
    for head in heads:
        value = tensor_of(head.node)
        if not isinstance(value.size(head.vocab_dim), int):
            raise Refused("the vocabulary has a dynamic size")
        sizes = [
            size
            for dim, size in enumerate(value.shape)
            if dim != head.vocab_dim and not same(size, 1)
        ]
        if labels is None:
            labels = [Label(size) for size in sizes]
        if len(sizes) != len(labels) or not all(
            same(size, label.size) for size, label in zip(sizes, labels, strict=True)
        ):
            raise Refused("the logits are put together with those of other rows")
        left = iter(labels)
        found.append(
            tuple(
                None if dim == head.vocab_dim or same(size, 1) else (next(left),)
                for dim, size in enumerate(value.shape)
            )
        )
    assert labels is not None
    if not labels:
        raise Refused("the logits are a single row")
    return Space(tuple(labels)), tuple(found)


def _same_size(graph: Graph, node: Node) -> Node:
    """Another node that holds the size that ``node`` reads of logits."""
    wanted = value_of(node)
    for other in graph.find_nodes(op="placeholder"):
        value = value_of(other)
        if isinstance(value, int | torch.SymInt) and same(value, wanted):
            return other
    raise Refused(f"{describe(node)}{at(node)} reads a size of the logits")
