"""Inserts a call of the op, and makes of its results what each reader is to have."""

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from .emitter import Emitter, emit_bias, emit_hidden, emit_weight, on_numbers, on_rows, size_of
from .match import NOTHING_IGNORED, Logits, Loss, Match, Reader, RowStep, row_order
from .tensors import tensor_of
from .values import fill_behind
from .weighting import emit_weights

# The target of rows that have none.
_NO_TARGET = -100
# What readers are made of, besides losses.
_MEASURES = {
    "logit": ("logsumexp",),
    "logsumexp": ("logsumexp",),
    "argmax": ("argmax",),
    "max": ("max",),
    "entropy": ("entropy",),
    "expected_logit": ("logsumexp", "entropy"),
    "returned": ("logits",),
}


def emit_call(graph: Graph, match: Match) -> tuple[dict[Node, Node], list[Node]]:
    """Insert the call that serves ``match``: what replaces which node, and all new nodes."""
    emit = Emitter(graph, match.place)
    rows = emit_hidden(emit, match.logits, row_order(match.logits.steps))
    results = _emit_op(emit, match, rows)
    values = {
        node: _like(emit, node, match, _value(emit, match, reader, rows, results))
        for reader in match.readers
        for node in (_replaced(match, reader),)
    }
    return values, emit.nodes


def _replaced(match: Match, reader: Reader) -> Node:
    return reader.node if match.weighting is None else match.weighting.nodes[-1]


def _needs_gradient(match: Match) -> bool:
    return any(
        tensor_of(_replaced(match, reader)).requires_grad
        for reader in match.readers
        if reader.kind != "returned"
    )


def _asked(match: Match) -> Loss | None:
    """The loss that the call computes; None if no reader looks at a target."""
    for reader in match.readers:
        if reader.loss is not None:
            return reader.loss
    for reader in match.readers:
        if reader.target is not None:
            return Loss(reader.node, reader.target, None, "none", NOTHING_IGNORED, 0.0, False)
    return None


def _emit_op(emit: Emitter, match: Match, rows: Node) -> dict[str, Node]:
    """The results of the op: of the loss, under "loss", and of each measure."""
    logits, asked = match.logits, _asked(match)
    hidden, weight, bias = rows, emit_weight(emit, logits), emit_bias(emit, logits)
    if tensor_of(hidden).dim() == 1:
        hidden = emit("unsqueeze", hidden, 0)
    elif tensor_of(hidden).dim() > 2:
        hidden = emit("flatten", hidden, 0, -2)
    if not _needs_gradient(match):
        # No gradient may flow where none did: no_grad around the loss, a detach on the way.
        hidden, weight = emit("detach", hidden), emit("detach", weight)
        bias = None if bias is None else emit("detach", bias)
    coefficient = None
    if asked is None:
        size = size_of(emit, hidden, 0)
        target = emit("new_full", hidden, (size,), _NO_TARGET, dtype=torch.int64)
    else:
        target = asked.target
        if match.weighting is not None:
            coefficient = emit_weights(emit, match.node, match.weighting, target)
        if tensor_of(target).dim() != 1:
            target = emit("reshape", target, -1)
    arguments = (
        *(hidden, weight, bias, target, asked and asked.class_weight, coefficient),
        *(match.reduction, asked.ignore_index if asked else _NO_TARGET),
        *(asked.label_smoothing if asked else 0.0, *_scale_and_softcap(match)),
        *(match.compute_dtype, match.rows_per_chunk),
    )
    measures = [name for reader in match.readers for name in _MEASURES.get(reader.kind, ())]
    measures = list(dict.fromkeys(measures))
    ops = torch.ops.lmhead_pass
    if not measures:
        return {"loss": emit(ops.linear_cross_entropy.default, *arguments)}
    results = emit(ops.linear_cross_entropy_and_measures.default, *arguments, measures)
    names = enumerate(["loss", *measures])
    return {name: emit(operator.getitem, results, number) for number, name in names}


def _scale_and_softcap(match: Match) -> tuple[float, float | None]:
    """``cap tanh(scale x + ...)`` as the op has it: ``softcap tanh(logit_scale (x + ...) / softcap)``."""
    values = match.logits.values
    if values.cap is None:
        return values.scale, None
    return values.scale * values.cap, abs(values.cap)


def _value(
    emit: Emitter,
    match: Match,
    reader: Reader,
    rows: Node,
    results: dict[str, Node],
) -> Node:
    """What ``reader`` reads, but for its dtype."""
    if reader.loss is not None:
        return _loss(emit, reader.loss, match.reduction, results["loss"])
    if match.reduction == "sum" and reader.kind == "log_probability":
        return emit("mul", results["loss"], -reader.factor)
    shift = match.logits.values.shift
    match reader.kind:
        case "log_probability":
            value = emit("neg", results["loss"])
        case "logit":
            value = emit("sub", results["logsumexp"], results["loss"])
        case "expected_logit":
            value = emit("sub", results["logsumexp"], results["entropy"])
        case "returned":
            return _returned(emit, match, reader.logits, rows, results["logits"])
        case kind:
            value = results[kind]
    if shift and reader.kind in ("logit", "expected_logit", "logsumexp", "max"):
        value = emit("add", value, shift)
    if reader.factor != 1 and reader.kind != "argmax":
        value = emit("mul", value, reader.factor)
    if reader.is_summed:
        return emit("sum", value)
    if tensor_of(rows).dim() != 2:
        value = emit("reshape", value, _sizes(emit, rows))
    for step in _further_steps(match, reader.logits):
        value = on_numbers(emit, value, step)
    return emit("unsqueeze", value, reader.logits.vocab_dim) if reader.keeps_dim else value


def _sizes(emit: Emitter, rows: Node) -> list[Any]:
    """Of ``rows`` ``[*rows, H]`` all but the last."""
    return [size_of(emit, rows, dim) for dim in range(tensor_of(rows).dim() - 1)]


def _further_steps(match: Match, logits: Logits) -> tuple[RowStep, ...]:
    """What is done to the rows of ``logits`` after those of the call."""
    return logits.steps[len(row_order(match.logits.steps)) :]


def _returned(emit: Emitter, match: Match, logits: Logits, rows: Node, values: Node) -> Node:
    """Logits ``[N, V]`` in the shape of those that leave the graph."""
    if match.logits.values.shift:
        values = emit("add", values, match.logits.values.shift)
    missing = tensor_of(logits.node).size(logits.vocab_dim) - tensor_of(values).size(-1)
    if missing:
        fill = fill_behind(logits)
        values = emit(torch.nn.functional.pad, values, (0, missing), value=fill)
    values = emit("reshape", values, (*_sizes(emit, rows), tensor_of(values).size(-1)))
    for step in _further_steps(match, logits):
        values = on_rows(emit, values, step)
    for name, *operands in logits.history:
        if name == "cast":
            values = emit("to", values, *operands)
    return emit("movedim", values, -1, logits.vocab_dim)


def _loss(emit: Emitter, loss: Loss, reduction: str, result: Node) -> Node:
    """The loss that was asked for, of one that is perhaps not reduced yet."""
    if loss.reduction == reduction == "none" and tensor_of(loss.target).dim() != 1:
        return emit("view_as", result, loss.target)
    if loss.reduction == reduction or reduction == "sum":
        return result
    total = emit("sum", result)
    if loss.reduction == "sum":
        return total
    counted = emit("ne", loss.target, loss.ignore_index)
    if loss.class_weight is not None:
        target = emit("mul", loss.target, counted)
        counted = emit("mul", emit(operator.getitem, loss.class_weight, target), counted)
    return emit("div", total, emit("sum", counted))


def _like(emit: Emitter, node: Node, match: Match, value: Node) -> Node:
    """``value`` as what replaces ``node``."""
    before = tensor_of(node)
    if node in {reader.node for reader in match.readers if reader.kind == "returned"}:
        before = before.detach()
    if tensor_of(value).dtype != before.dtype:
        value = emit("to", value, before.dtype)
    if _needs_gradient(match) and not before.requires_grad:
        value = emit("detach", value)
    value.meta["example_value"] = before
    return value
