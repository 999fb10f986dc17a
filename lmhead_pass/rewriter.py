"""Replaces what was matched by calls of the op."""

from dataclasses import dataclass, field

from torch.fx import Graph, Node

from . import config, report
from .emitter import emit_fact
from .leaving import emit_lazily
from .lifting import Lifted, find_across_regions
from .match import Match, Refusal, Rewrite
from .serving import emit_call


@dataclass
class _Change:
    """What a rewrite does to a graph, but for the nodes that it has inserted already."""

    replaced: dict[Node, Node] = field(default_factory=dict)
    """What stands for which node."""
    leaving: dict[Node, Node] = field(default_factory=dict)
    """What leaves the graph for which node."""
    gone: set[Node] = field(default_factory=set)
    """What is erased."""
    calls: list[tuple[Match, list[Node]]] = field(default_factory=list)
    """Each call of the op, with its nodes."""


def rewrite_graph(graph: Graph) -> None:
    """Rewrite every match in ``graph``, and report on it.

    A failure inside leaves the graph as it was; it is reported, or raised if ``config.strict``.
    """
    known = set(graph.nodes)
    lifted: list[Lifted] = []
    try:
        found, lifted = find_across_regions(graph)
        changes = [_prepare(graph, item) for item in found if isinstance(item, Rewrite)]
    except Exception as error:
        for part in lifted:
            part.let_go()
        for node in reversed([node for node in graph.nodes if node not in known]):
            graph.erase_node(node)
        if config.strict:
            raise
        report.failure(error)
        return
    for item in found:
        if isinstance(item, Refusal):
            report.refused(item)
    for part in lifted:
        part.keep()
    for change in changes:
        for match, nodes in change.calls:
            report.rewritten(match, nodes)
        _carry_out(graph, change)


def _prepare(graph: Graph, rewrite: Rewrite) -> _Change:
    """Insert what takes the place of the head and what reads it; nothing old is touched yet."""
    change = _Change(gone=set(rewrite.nodes))
    for match in rewrite.matches:
        for node in match.moved:
            match.place.prepend(node)
        values, nodes = emit_call(graph, match)
        change.calls.append((match, nodes))
        for reader in match.readers:
            if reader.kind == "returned":
                change.leaving[reader.node] = values.pop(reader.node)
            else:
                change.gone.add(reader.node)
        change.replaced |= values
        change.gone.update(() if match.weighting is None else match.weighting.nodes)
    for logits in rewrite.returned:
        change.leaving[logits.node] = emit_lazily(graph, logits)
    for node, fact in rewrite.facts.items():
        change.replaced[node] = emit_fact(graph, node, fact)
        change.gone.add(node)
    for node in change.gone - change.replaced.keys():
        for user in node.users.keys() - change.gone:
            if not (user.op == "output" and node in change.leaving):
                raise AssertionError(f"{node} is needed by {user}")
    return change


def _carry_out(graph: Graph, change: _Change) -> None:
    for before, after in change.replaced.items():
        before.replace_all_uses_with(after)
    for before, after in change.leaving.items():
        graph.output_node().replace_input_with(before, after)
    for node in reversed([node for node in graph.nodes if node in change.gone]):
        graph.erase_node(node)
