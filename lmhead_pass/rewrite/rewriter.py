"""Rewrites a graph: finds, plans, emits, and commits."""

from torch.fx import Graph, Node

from .. import config
from ..compat.graphs import why_not_rewritten
from ..graph import Refusal
from ..logits import ConsumerKind
from ..plan import Match, Rewrite, plan_fused_calls
from . import report
from .checkpoint_regions import find_across_regions
from .edit import GraphEdit
from .emit_calls import emit_call, emit_fused_call, emit_root
from .emit_inputs import emit_metadata_use
from .emit_returned import emit_lazily

# What is rewritten, with the nodes of its call of the op.
_Calls = list[tuple[Match, list[Node]]]


def rewrite_graph(graph: Graph) -> None:
    """Rewrite every match in ``graph``, and report on it.

    A failure inside leaves the graph as it was. It is reported, or raised if ``config.strict``.
    """
    if why_not_rewritten(graph) is not None:
        return
    edit = GraphEdit(graph)
    try:
        found = find_across_regions(edit)
        calls = _emit(edit, [item for item in found if isinstance(item, Rewrite)])
        edit.check()
    except Exception as error:
        edit.roll_back()
        if config.strict:
            raise
        report.failure(error)
        return
    for item in found:
        if isinstance(item, Refusal):
            report.refused(item)
    for match, nodes in calls:
        report.rewritten(match, nodes)
    edit.commit()


def _emit(edit: GraphEdit, rewrites: list[Rewrite]) -> _Calls:
    """Insert what takes the place of heads and their consumers; nothing old is touched yet."""
    calls: _Calls = []
    results: dict[Node, list[Node]] = {}
    for fused in plan_fused_calls(rewrites):
        values, result, nodes = emit_fused_call(edit.graph, fused)
        edit.replaced |= values
        edit.erased.update(fused.likes)
        calls += ((match, nodes) for match in fused.matches)
        results.setdefault(fused.root, []).append(result)
    for root, of_calls in results.items():
        edit.replaced[root] = emit_root(edit.graph, root, of_calls)
    served = [match for match, _ in calls]
    for rewrite in rewrites:
        calls += (
            (match, _emit_call(edit, match)) for match in rewrite.matches if match not in served
        )
        _replace_head(edit, rewrite)
    return calls


def _emit_call(edit: GraphEdit, match: Match) -> list[Node]:
    values, nodes = emit_call(edit.graph, match)
    for consumer in match.consumers:
        if consumer.kind is ConsumerKind.RETURNED:
            edit.returned[consumer.node] = values.pop(consumer.node)
    edit.replaced |= values
    if match.linear_reduction is not None:
        edit.erased.update(match.linear_reduction.nodes)
    return nodes


def _replace_head(edit: GraphEdit, rewrite: Rewrite) -> None:
    """Let the head go, and those who read its logits."""
    edit.erased.update(rewrite.nodes)
    for match in rewrite.matches:
        edit.erased.update(
            consumer.node
            for consumer in match.consumers
            if consumer.kind is not ConsumerKind.RETURNED
        )
    for logits in rewrite.returned:
        edit.returned[logits.node] = emit_lazily(edit.graph, logits)
    for node, use in rewrite.metadata_uses.items():
        edit.replaced[node] = emit_metadata_use(edit.graph, node, use)
        edit.erased.add(node)
