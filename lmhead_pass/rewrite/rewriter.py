"""Rewrites a graph: finds, plans, emits, and commits."""

from collections.abc import Sequence
from itertools import product

import torch
from torch.fx import Graph, Node

from ..compat.graphs import is_whole, why_not_rewritten
from ..graph import Refusal
from ..log import note_of
from ..logits import ConsumerKind, Logits
from ..op import MemoryBudgetTooSmall
from ..plan import Match, Rewrite, plan_fused_calls
from . import report
from .checkpoint_regions import find_across_regions, regions_of, will_be_seen_with_its_caller
from .edit import GraphEdit
from .emit_calls import emit_call, emit_fused_call, emit_root
from .emit_inputs import emit_metadata_use
from .emit_returned import emit_lazily
from .report import EmittedCall


def rewrite_graph(graph: Graph, of_loss_alone: bool = True, keeps_note: bool = False) -> bool:
    """Rewrite every match in ``graph``, report on it, and return whether there were any.

    A checkpointed region is left to the graph that calls it. With ``keeps_note`` the graph can
    report again where a cache has it. A failure leaves the graph as it was, and is reported, or
    raised if ``config.strict``. MemoryBudgetTooSmall is raised in any case.
    """
    if why_not_rewritten(graph) is not None or will_be_seen_with_its_caller(graph):
        return False
    edit = GraphEdit(graph)
    try:
        calls, refusals = prepare(edit, of_loss_alone)
        edit.check()
        items: list[Refusal | EmittedCall | Logits] = [*refusals, *calls, *edit.deferred]
        if keeps_note:
            _keep_note(edit, [report.log_line(item) for item in items])
    except MemoryBudgetTooSmall:
        edit.roll_back()
        raise
    except Exception as error:
        edit.roll_back()
        report.failure(error)
        return False
    for refusal in refusals:
        report.refused(refusal)
    for call in calls:
        report.rewritten(call)
    for logits in edit.deferred:
        report.deferred(logits)
    if not items and is_whole(graph):
        report.nothing_found(graph)
    edit.commit()
    return bool(calls)


def _keep_note(edit: GraphEdit, lines: Sequence[str]) -> None:
    """Let every call of an op of ours carry ``lines``: one without a user would not run."""
    ops = torch.ops.lmhead_pass
    carriers = (
        ops.linear_cross_entropy.default,
        ops.linear_cross_entropy_and_measures.default,
        ops.return_lazily.default,
    )
    for graph, op in product(edit.graphs(), carriers):
        for call in graph.find_nodes(op="call_function", target=op):
            call.kwargs = {**call.kwargs, "report": note_of(lines)}


def prepare(edit: GraphEdit, of_loss_alone: bool = True) -> tuple[list[EmittedCall], list[Refusal]]:
    """Analyse and plan, and insert what takes the place of heads and their consumers.

    Returns what is rewritten, and what is left alone. Nothing old is touched yet. A head is left to
    the graph if no loss is taken of it, unless ``of_loss_alone`` is False.
    """
    found, stuck = find_across_regions(edit, of_loss_alone)
    rewrites = [item for item in found if isinstance(item, Rewrite)]
    refusals = [item for item in found if isinstance(item, Refusal)]
    calls = _emit_calls(edit, rewrites)
    for rewrite in rewrites:
        if not rewrite.matches:
            edit.deferred += rewrite.returned
        _replace_head(edit, rewrite)
    lifted = {region.body for region in edit.regions}
    for region, body in regions_of(edit.graph):
        if body not in lifted:
            part = GraphEdit(body.graph)
            edit.parts.append(part)
            calls_of_part, refusals_of_part = prepare(part, of_loss_alone)
            if region in stuck and not calls_of_part:
                refusals.append(stuck[region])
            calls += calls_of_part
            refusals += refusals_of_part
    return calls, refusals


def _emit_calls(edit: GraphEdit, rewrites: list[Rewrite]) -> list[EmittedCall]:
    calls: list[EmittedCall] = []
    results: dict[Node, list[Node]] = {}
    lifted = {copy for region in edit.regions for copy in region.copies.values()}
    for planned in plan_fused_calls(rewrites, checkpointed=lifted):
        if isinstance(planned, Match):
            calls.append(EmittedCall(planned, planned, _emit_call(edit, planned)))
            continue
        values, result, nodes = emit_fused_call(edit.graph, planned)
        edit.replaced |= values
        edit.erased.update(planned.likes)
        calls += (EmittedCall(match, planned.call, nodes) for match in planned.matches)
        if planned.root is not None:
            results.setdefault(planned.root, []).append(result)
    for root, of_calls in results.items():
        edit.replaced[root] = emit_root(edit.graph, root, of_calls)
    return calls


def _emit_call(edit: GraphEdit, match: Match) -> list[Node]:
    values, nodes = emit_call(edit.graph, match)
    for consumer in match.consumers:
        if consumer.kind is ConsumerKind.RETURNED:
            edit.returned[consumer.node] = values.pop(consumer.node)
    edit.replaced |= values
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
        edit.returned[logits.node], beside = emit_lazily(edit.graph, logits)
        if beside is not None:
            edit.beside.append(beside)
    for node, use in rewrite.metadata_uses.items():
        edit.replaced[node] = emit_metadata_use(edit.graph, node, use)
        edit.erased.add(node)
