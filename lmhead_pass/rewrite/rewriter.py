"""Replaces what was matched by calls of the op."""

from dataclasses import dataclass, field

from torch.fx import Graph, Node

from .. import config
from ..compat.graphs import why_not_rewritten
from ..graph import Refusal
from ..logits import emit_metadata_use
from ..plan import Match, Rewrite, join
from . import report
from .checkpoint_regions import LiftedRegion, find_across_regions
from .emit_calls import emit_call, emit_fused_call, emit_root
from .emit_returned import emit_lazily


@dataclass
class _Change:
    """What is to be done to a graph, but for the nodes that are inserted already."""

    replaced: dict[Node, Node] = field(default_factory=dict)
    """What stands for which node."""
    leaving: dict[Node, Node] = field(default_factory=dict)
    """What leaves the graph for which node."""
    gone: set[Node] = field(default_factory=set)
    """What is erased."""
    calls: list[tuple[Match, list[Node]]] = field(default_factory=list)
    """What is rewritten, with the nodes of its call of the op."""

    def check(self, graph: Graph) -> None:
        """Afterwards, each node has to find what it reads, and before it."""
        order = {node: number for number, node in enumerate(graph.nodes)}
        for node in graph.nodes:
            if node in self.gone:
                continue
            for source in node.all_input_nodes:
                found = self.replaced.get(source, source)
                if node.op == "output":
                    found = self.leaving.get(source, found)
                found = source if found is node else found
                if found in self.gone or order[found] >= order[node]:
                    raise AssertionError(f"{node} needs {found}, which is not there")

    def carry_out(self, graph: Graph) -> None:
        for before, after in self.replaced.items():
            before.replace_all_uses_with(after, lambda user, after=after: user is not after)
        for before, after in self.leaving.items():
            graph.output_node().replace_input_with(before, after)
        for node in reversed([node for node in graph.nodes if node in self.gone]):
            graph.erase_node(node)


def rewrite_graph(graph: Graph) -> None:
    """Rewrite every match in ``graph``, and report on it.

    A failure inside leaves the graph as it was; it is reported, or raised if ``config.strict``.
    """
    if why_not_rewritten(graph) is not None:
        return
    known = dict.fromkeys(graph.nodes)
    lifted: list[LiftedRegion] = []
    try:
        found, lifted = find_across_regions(graph)
        change = _prepare(graph, [item for item in found if isinstance(item, Rewrite)])
        change.check(graph)
    except Exception as error:
        for part in lifted:
            part.let_go()
        for node in reversed([node for node in graph.nodes if node not in known]):
            graph.erase_node(node)
        for node in known:  # some may have been moved
            graph.output_node().prepend(node)
        if config.strict:
            raise
        report.failure(error)
        return
    for item in found:
        if isinstance(item, Refusal):
            report.refused(item)
    for part in lifted:
        part.keep()
    for match, nodes in change.calls:
        report.rewritten(match, nodes)
    change.carry_out(graph)


def _prepare(graph: Graph, rewrites: list[Rewrite]) -> _Change:
    """Insert what takes the place of heads and their consumers; nothing old is touched yet."""
    change = _Change()
    results: dict[Node, list[Node]] = {}
    served: list[Match] = []
    for fused in join(rewrites):
        values, result, nodes = emit_fused_call(graph, fused)
        change.replaced |= values
        change.gone.update(fused.likes)
        change.calls += ((match, nodes) for match in fused.matches)
        results.setdefault(fused.root, []).append(result)
        served += fused.matches
    for root, of_calls in results.items():
        change.replaced[root] = emit_root(graph, root, of_calls)
    for rewrite in rewrites:
        change.gone.update(rewrite.nodes)
        for match in rewrite.matches:
            if match not in served:
                _prepare_call(graph, match, change)
            change.gone.update(
                consumer.node for consumer in match.consumers if consumer.kind != "returned"
            )
        for logits in rewrite.returned:
            change.leaving[logits.node] = emit_lazily(graph, logits)
        for node, use in rewrite.metadata_uses.items():
            change.replaced[node] = emit_metadata_use(graph, node, use)
            change.gone.add(node)
    return change


def _prepare_call(graph: Graph, match: Match, change: _Change) -> None:
    values, nodes = emit_call(graph, match)
    change.calls.append((match, nodes))
    for consumer in match.consumers:
        if consumer.kind == "returned":
            change.leaving[consumer.node] = values.pop(consumer.node)
    change.replaced |= values
    change.gone.update(() if match.linear_reduction is None else match.linear_reduction.nodes)
