"""Rewrites a graph: finds, plans, emits, and commits."""

from collections import Counter
from collections.abc import Sequence
from itertools import product

import torch
from torch.fx import Graph, Node

from ..compat.graphs import is_whole, new_symbols_are_dropped, why_not_rewritten
from ..compat.lookup import NO_ROWWISE, missing
from ..graph import Refusal, Refused, tensor_of
from ..log import note_of
from ..logits import ConsumerKind, follow_logits, large_heads
from ..op import MemoryBudgetTooSmall
from ..plan import (
    Match,
    Rewrite,
    check_derivatives,
    leaves_gradients_to_backward,
    plan_fused_calls,
)
from ..rowwise import Mixes, Region, carve, ends_in_a_sum, may_be_carved
from . import report
from .checkpoint_regions import find_across_regions, regions_of, will_be_seen_with_its_caller
from .edit import GraphEdit
from .emit_calls import emit_call, emit_fused_call, emit_root
from .emit_inputs import emit_metadata_use
from .emit_returned import emit_lazily, emit_view
from .emit_rowwise import emit_region
from .report import EmittedCall, EmittedRegion
from .rowwise_sums import sum_in_forward


def rewrite_graph(
    graph: Graph,
    of_loss_alone: bool = True,
    keeps_note: bool = False,
    tells_refusals: bool = True,
    in_one_call: bool = False,
) -> bool:
    """Rewrite every match in ``graph``, report on it, and return whether there were any.

    If it is to be ``in_one_call``, what would take several fused ones, each with a gradient of the
    weight, is run in chunks where that is possible. A checkpointed region is left to the graph that
    calls it. With ``keeps_note`` the graph can report again where a cache has it. A failure leaves
    the graph as it was, and is reported, or raised if ``config.strict``. MemoryBudgetTooSmall is
    raised in any case.
    """
    if why_not_rewritten(graph) is not None or will_be_seen_with_its_caller(graph):
        return False
    edit = GraphEdit(graph)
    try:
        with new_symbols_are_dropped(graph):
            calls, refusals = prepare(edit, of_loss_alone)
            for in_chunks in (True, False):
                if not in_one_call or _count(calls) <= 1:
                    break
                edit.roll_back()
                edit = GraphEdit(graph)
                calls, refusals = prepare(edit, of_loss_alone, in_chunks=in_chunks)
        edit.check()
        items = [*refusals, *calls, *edit.deferred]
        if keeps_note:
            _keep_note(edit, [report.log_line(item) for item in items])
    except MemoryBudgetTooSmall:
        edit.roll_back()
        raise
    except Exception as error:
        edit.roll_back()
        report.failure(error)
        return False
    for refusal in refusals if tells_refusals else ():
        report.refused(refusal)
    for call in calls:
        report.rewritten(call)
    for logits in edit.deferred:
        report.deferred(logits)
    if not items and is_whole(graph):
        report.nothing_found(graph)
    edit.commit()
    for call in calls:
        if isinstance(call, EmittedRegion):
            _finish(graph, call)
    return bool(calls)


def _count(calls: Sequence[EmittedCall | EmittedRegion]) -> int:
    """Of calls of the op. One may serve several matches."""
    return len({id(call.call) if isinstance(call, EmittedCall) else id(call) for call in calls})


def _finish(graph: Graph, emitted: EmittedRegion) -> None:
    """Have the forward compute the gradients of a region where that is possible."""
    for numbers in emitted.numbers:
        edit = GraphEdit(graph)
        try:
            with new_symbols_are_dropped(graph):
                sum_in_forward(edit, numbers)
            edit.check()
        except Exception as error:
            edit.roll_back()
            report.failure(error)
        else:
            edit.commit()


def _keep_note(edit: GraphEdit, lines: Sequence[str]) -> None:
    """Let every call of an op of ours carry ``lines``: one without a user would not run."""
    ops = torch.ops.lmhead_pass
    carriers = (
        ops.linear_cross_entropy.default,
        ops.linear_cross_entropy_and_measures.default,
        ops.rowwise.default,
        ops.return_lazily.default,
    )
    for graph, op in product(edit.graphs(), carriers):
        for call in graph.find_nodes(op="call_function", target=op):
            call.kwargs = {**call.kwargs, "report": note_of(lines)}


def prepare(
    edit: GraphEdit,
    of_loss_alone: bool = True,
    in_region: bool = False,
    in_chunks: bool = False,
) -> tuple[list[EmittedCall | EmittedRegion], list[Refusal]]:
    """Analyse and plan, and insert what takes the place of heads and their consumers.

    Returns what is rewritten, and what is left alone. Nothing old is touched yet. A head is left to
    the graph if no loss is taken of it, unless ``of_loss_alone`` is False. A graph ``in_region`` is
    that of a checkpointed region. If it is to be ``in_chunks``, all of one head is run so.
    """
    found, stuck = find_across_regions(edit, of_loss_alone)
    rewrites = [item for item in found if isinstance(item, Rewrite)]
    emitted = [] if in_region else _emit_instead(edit, rewrites, in_chunks)
    fused = _emit_calls(edit, rewrites)
    for rewrite in rewrites:
        if not rewrite.matches:
            edit.deferred += (one for one in rewrite.returned if one.node not in rewrite.views)
        _replace_head(edit, rewrite)
    refusals = [item for item in found if isinstance(item, Refusal)]
    calls: list[EmittedCall | EmittedRegion] = [*fused, *emitted]
    if not in_region:
        regions, refusals = _emit_regions(edit, rewrites, refusals)
        calls += regions
    lifted = {region.body for region in edit.regions}
    for region, body in regions_of(edit.graph):
        if body not in lifted:
            part = GraphEdit(body.graph)
            edit.parts.append(part)
            calls_of_part, refusals_of_part = prepare(part, of_loss_alone, in_region=True)
            if region in stuck and not calls_of_part:
                refusals.append(stuck[region])
            calls += calls_of_part
            refusals += refusals_of_part
    return calls, refusals


def _emit_regions(
    edit: GraphEdit, rewrites: Sequence[Rewrite], refusals: list[Refusal]
) -> tuple[list[EmittedRegion], list[Refusal]]:
    """Have what no fused form serves run in chunks. Returns that, and what is still left alone."""
    served = {node for rewrite in rewrites for node in rewrite.nodes}
    heads = [
        head for head in large_heads(edit.graph) if head.node not in served and may_be_carved(head)
    ]
    emitted: list[EmittedRegion] = []
    if not heads or not _may_have_regions(edit):
        return emitted, refusals
    for head in heads:
        flow = follow_logits(head)
        if head.node in edit.erased or not (flow.unsupported or flow.losses):
            continue
        try:
            left = [other for other in heads if other.node not in edit.erased]
            made = _emit_region(edit, carve(head, left))
        except Refused as refused:
            refusals = [_explained(one, flow.unsupported, refused) for one in refusals]
            continue
        emitted.append(made)
        refusals = [one for one in refusals if one.loss not in made.region.nodes]
    return emitted, refusals


def _may_have_regions(edit: GraphEdit) -> bool:
    return not edit.regions and not missing(NO_ROWWISE)


def _emit_instead(
    edit: GraphEdit, rewrites: list[Rewrite], in_any_case: bool
) -> list[EmittedRegion]:
    """Run in chunks what a fused form serves with a product more, and take it off ``rewrites``.

    That is a loss whose rows count for what the loss itself decides, such as one that is weighted
    by its own detached value.
    """
    if len(rewrites) != 1 or not (in_any_case or leaves_gradients_to_backward(rewrites[0])):
        return []
    head = rewrites[0].matches[0].logits.head
    pays = in_any_case or tensor_of(head.node).device.type == "cpu"
    if not pays or not _may_have_regions(edit) or not may_be_carved(head):
        return []
    try:
        region = carve(head, [head])
        if not ends_in_a_sum(region):
            return []
        emitted = _emit_region(edit, region)
    except Refused:
        return []
    rewrites.clear()
    return [emitted]


def _emit_region(edit: GraphEdit, region: Region) -> EmittedRegion:
    """Insert what runs ``region`` in chunks; Refused, with the graph as it was, if that fails."""
    check_derivatives(edit.graph)
    before = set(edit.graph.nodes)
    try:
        values, numbers = emit_region(edit.graph, region)
    except Refused:
        for node in reversed(edit.graph.nodes):
            if node not in before:
                edit.graph.erase_node(node)
        raise
    edit.replaced |= values
    edit.erased.update(region.nodes, region.absorbed, region.sizes)
    return EmittedRegion(region, numbers)


def _explained(refusal: Refusal, unsupported: dict[Node, str], why: Refused) -> Refusal:
    """``refusal``, with the operation that mixes rows as the reason, if there is one."""
    is_mixed = isinstance(why, Mixes) and refusal.reason.endswith("reads the logits too")
    return Refusal(refusal.loss, str(why)) if is_mixed and unsupported else refusal


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
    names = Counter(whole for whole, _ in rewrite.views.values())
    for logits in rewrite.returned:
        if logits.node not in rewrite.views:
            made, beside = emit_lazily(edit.graph, logits, 1 + names[logits.node])
            edit.returned[logits.node] = made
            edit.beside += beside
    for logits in rewrite.returned:
        if logits.node in rewrite.views:
            whole, view = rewrite.views[logits.node]
            edit.returned[logits.node] = emit_view(edit.graph, logits, edit.returned[whole], view)
    for node, use in rewrite.metadata_uses.items():
        edit.replaced[node] = emit_metadata_use(edit.graph, node, use)
        edit.erased.add(node)
