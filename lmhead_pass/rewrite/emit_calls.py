"""Inserts the calls of the op, and what stands for each consumer afterwards."""

import operator
from collections.abc import Sequence
from dataclasses import replace
from functools import partial, reduce

import torch
from torch.fx import Graph, Node

from ..graph import Emitter, move_before, size_of, tensor_of
from ..logits import NOTHING_IGNORED, TargetUse, row_order
from ..plan import FusedCall, Match
from .emit_coefficients import Coefficients, concatenated, emit_coefficients
from .emit_inputs import emit_again, emit_bias, emit_fill, emit_hidden, emit_weight
from .emit_results import emit_result, measures_of


def emit_call(graph: Graph, match: Match) -> tuple[dict[Node, Node], list[Node]]:
    """Insert the call that serves ``match``: what replaces which node, and all new nodes."""
    move_before(match.place, match.moved)
    emit = Emitter(graph, match.place)
    rows = _emit_rows(emit, match)
    hidden, target = _emit_flat(emit, rows), _emit_target(emit, match, rows)
    results = _emit_op(emit, match, hidden, target, Coefficients(), _measures([match]))
    values = {
        consumer.node: emit_result(emit, match, consumer, rows, results)
        for consumer in match.consumers
    }
    return values, emit.nodes


def emit_fused_call(graph: Graph, fused: FusedCall) -> tuple[dict[Node, Node], Node, list[Node]]:
    """Insert the call that serves ``fused``.

    Returns what replaces which consumer, the result that the root's gradient, if there is a root,
    has to go to (``emit_root``), and all new nodes.
    """
    emit = Emitter(graph, fused.last.next)
    matches, several = fused.matches, len(fused.matches) > 1
    rows = [_emit_rows(emit, match) for match in matches]
    flat = [_emit_flat(emit, part) for part in rows]
    if several:  # in the products' dtype: under autocast, cat does not take every other
        flat = [emit("to", part, matches[0].compute_dtype) for part in flat]
    targets = list(map(partial(_emit_target, emit), matches, rows))
    results = _emit_op(
        *(emit, fused.call, concatenated(emit, flat)),
        *(concatenated(emit, targets), emit_coefficients(emit, fused, rows, targets)),
        [*(["losses"] if fused.root else []), *_measures(matches)],
    )
    by_row = {**results, "loss": results.get("losses", results["loss"])}
    pieces = [by_row]
    if several:
        sizes = [size_of(emit, target, 0) for target in targets]
        split = {
            name: emit(torch.split, by_row[name], sizes) for name in by_row if name != "losses"
        }
        pieces = [
            {name: emit(operator.getitem, parts, number) for name, parts in split.items()}
            for number in range(len(matches))
        ]
    values = {}
    for match, of_match, piece in zip(matches, rows, pieces, strict=True):
        # Its consumers, as if it had a call for them alone.
        alone = replace(match, reduction="none")
        for consumer in match.consumers:
            values[consumer.node] = emit_result(emit, alone, consumer, of_match, piece)
    move_before(emit.place, fused.moved)
    for node, (seen, twin) in fused.likes.items():
        before = Emitter(graph, node)
        values[node] = _emit_like(before, node, seen, twin)
        emit.nodes += before.nodes
    return values, results["loss"], emit.nodes


def _emit_like(emit: Emitter, node: Node, seen: Node, twin: Node) -> Node:
    """The same as ``node``, which reads only shape or dtype of ``seen``, from a stand-in."""
    value = tensor_of(seen)
    options = {"dtype": value.dtype, "device": value.device}
    if all(isinstance(size, int) for size in value.shape):
        stand_in = emit("new_empty", twin, list(value.shape), **options)
    else:
        options["memory_format"] = torch.contiguous_format
        stand_in = emit(torch.empty_like, twin, **options)
    return emit_again(emit, node, seen, stand_in)


def emit_root(graph: Graph, root: Node, results: Sequence[Node]) -> Node:
    """Insert what stands for ``root``, and passes its gradient on to the ``results`` of calls."""
    emit = Emitter(graph, root.next)
    return emit(
        torch.ops.lmhead_pass.with_gradient_of.default, root, reduce(partial(emit, "add"), results)
    )


def _measures(matches: Sequence[Match]) -> list[str]:
    consumers = [consumer for match in matches for consumer in match.consumers]
    return list(dict.fromkeys(name for consumer in consumers for name in measures_of(consumer)))


def _emit_rows(emit: Emitter, match: Match) -> Node:
    """``[*rows, H]``: the hidden states."""
    return emit_hidden(emit, match.logits, row_order(match.logits.steps))


def _emit_flat(emit: Emitter, rows: Node) -> Node:
    """``[N, H]``"""
    if tensor_of(rows).dim() == 1:
        return emit("unsqueeze", rows, 0)
    return emit("flatten", rows, 0, -2) if tensor_of(rows).dim() > 2 else rows


def _emit_target(emit: Emitter, match: Match, rows: Node) -> Node:
    """``[N]``"""
    use = match.target_use
    if use is None:
        size = size_of(emit, _emit_flat(emit, rows), 0)
        return emit("new_full", rows, (size,), NOTHING_IGNORED, dtype=torch.int64)
    target = use.target
    if use.words is not None:
        target = emit(torch.where, emit("lt", target, 0), emit("add", target, use.words), target)
    return target if tensor_of(target).dim() == 1 else emit("reshape", target, -1)


def _emit_op(
    emit: Emitter,
    match: Match,
    hidden: Node,
    target: Node,
    coefficients: Coefficients,
    measures: list[str],
) -> dict[str, Node]:
    """The results of the op: of the loss, under "loss", and of each measure."""
    # Without a target to look at, each row has one that is ignored.
    use = match.target_use or TargetUse(target)
    weight, bias = emit_weight(emit, match.logits), emit_bias(emit, match.logits)
    fill, shift = emit_fill(emit, match.logits), match.logits.values.shift
    if fill is not None and shift:  # which is added to what the op returns
        fill = emit("sub", fill, shift)
    if not match.differentiable:
        # No gradient may flow where none did: no_grad around the loss, a detach on the way.
        hidden, weight = emit("detach", hidden), emit("detach", weight)
        bias = None if bias is None else emit("detach", bias)
    arguments = (
        *(hidden, weight, bias, target, use.class_weight, coefficients.of_losses),
        *(coefficients.of_logsumexps, coefficients.of_squares, fill),
        *(match.reduction, use.ignore_index, use.label_smoothing, *_scale_and_cap(match)),
        *(match.compute_dtype, match.chunks.rows),
    )
    words = match.chunks.words
    options = {} if words is None else {"vocab_chunk_size": words}
    ops = torch.ops.lmhead_pass
    if not measures:
        return {"loss": emit(ops.linear_cross_entropy.default, *arguments, **options)}
    results = emit(ops.linear_cross_entropy_and_measures.default, *arguments, measures, **options)
    names = enumerate(["loss", *measures])
    return {name: emit(operator.getitem, results, number) for number, name in names}


def _scale_and_cap(match: Match) -> tuple[float, float | None, str]:
    """The factors of ``softcap tanh(logit_scale (x + ...) / softcap)``, as the op has it."""
    values = match.logits.values
    if values.cap is None:
        return values.scale, None, values.cap_kind
    return values.scale * values.cap, abs(values.cap), values.cap_kind
