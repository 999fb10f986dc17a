"""Inserts a call of the op, and makes of its results what each consumer is to have."""

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import torch
from torch.fx import Graph, Node

from ..compat.graphs import EXAMPLE_VALUE, SET_GRAD_ENABLED
from ..graph import Emitter, gradients_are_recorded, mutation, size_of, tensor_of
from ..logits import (
    NOTHING_IGNORED,
    Consumer,
    Logits,
    Loss,
    RowStep,
    emit_bias,
    emit_hidden,
    emit_weight,
    fill_behind,
    on_numbers,
    on_rows,
    row_order,
)
from ..plan import FusedCall, Match
from ..sums import emit_again, emit_weights

# What consumers are made of, besides losses; others are a measure themselves.
_MEASURES = {
    "logit": ("logsumexp",),
    "expected_logit": ("logsumexp", "entropy"),
    "returned": ("logits",),
}


def emit_call(graph: Graph, match: Match) -> tuple[dict[Node, Node], list[Node]]:
    """Insert the call that serves ``match``: what replaces which node, and all new nodes."""
    for node in match.moved:
        match.place.prepend(node)
    emit = Emitter(graph, match.place)
    rows = emit_rows(emit, match)
    hidden, target = emit_flat(emit, rows), emit_target(emit, match, rows)
    coefficients = _Coefficients()
    if match.linear_reduction is not None:
        ones = {match.node: partial(_ones, emit, match, match.consumers[0], rows, target)}
        weights = emit_weights(emit, match.linear_reduction, ones, like=hidden)
        coefficients.of_losses = emit("reshape", weights[match.node, 1], -1)
    results = emit_op(emit, match, hidden, target, coefficients, _measures([match]))
    values = {
        _replaced(match, consumer): emit_value(emit, match, consumer, rows, results)
        for consumer in match.consumers
    }
    return values, emit.nodes


def emit_fused_call(graph: Graph, fused: FusedCall) -> tuple[dict[Node, Node], Node, list[Node]]:
    """Insert the call that serves ``fused``.

    Returns what replaces which consumer, the result that the root's gradient has to go to
    (``emit_root``), and all new nodes.
    """
    emit = Emitter(graph, fused.last.next)
    matches, several = fused.matches, len(fused.matches) > 1
    rows = [emit_rows(emit, match) for match in matches]
    flat = [emit_flat(emit, part) for part in rows]
    if several:  # in the products' dtype: under autocast, cat does not take every other
        flat = [emit("to", part, matches[0].compute_dtype) for part in flat]
    targets = list(map(partial(emit_target, emit), matches, rows))
    results = emit_op(
        *(emit, replace(matches[0], reduction="sum"), _concatenated(emit, flat)),
        *(_concatenated(emit, targets), _coefficients(emit, fused, rows, targets)),
        ["losses", *_measures(matches)],
    )
    pieces = [results]
    if several:
        sizes = [size_of(emit, target, 0) for target in targets]
        split = {
            name: emit(torch.split, results[name], sizes) for name in results if name != "loss"
        }
        pieces = [
            {name: emit(operator.getitem, parts, number) for name, parts in split.items()}
            for number in range(len(matches))
        ]
    values = {}
    for match, of_match, piece in zip(matches, rows, pieces, strict=True):
        # Its consumers, as if it had a call for them alone.
        alone = replace(match, reduction="none", linear_reduction=None)
        for consumer in match.consumers:
            of_rows = {**piece, "loss": piece["losses"]}
            values[consumer.node] = emit_value(emit, alone, consumer, of_match, of_rows)
    _move_behind(emit, fused.moved)
    for node, (seen, twin) in fused.likes.items():
        before = Emitter(graph, node)
        values[node] = _emit_like(before, node, seen, twin)
        emit.nodes += before.nodes
    return values, results["loss"], emit.nodes


def _emit_like(emit: Emitter, node: Node, seen: Node, twin: Node) -> Node:
    """What ``node`` makes of the shape or dtype of ``seen``, without that."""
    value = tensor_of(seen)
    options = {"dtype": value.dtype, "device": value.device}
    if all(isinstance(size, int) for size in value.shape):
        stand_in = emit("new_empty", twin, list(value.shape), **options)
    else:
        options["memory_format"] = torch.contiguous_format
        stand_in = emit(torch.empty_like, twin, **options)
    return emit_again(emit, node, {seen: stand_in})


def _move_behind(emit: Emitter, nodes: Iterable[Node]) -> None:
    """Move ``nodes`` behind what ``emit`` has inserted; gradients are recorded there."""
    recorded = {node: gradients_are_recorded(node) for node in nodes}
    for node in nodes:
        if recorded[node]:
            emit.place.prepend(node)
            continue
        with emit.graph.inserting_before(emit.place):
            emit.graph.call_function(SET_GRAD_ENABLED, (False,))
            emit.place.prepend(node)
            emit.graph.call_function(SET_GRAD_ENABLED, (True,))


def emit_root(graph: Graph, root: Node, results: Sequence[Node]) -> Node:
    """Insert what stands for ``root``, and passes its gradient on to the ``results`` of calls."""
    emit = Emitter(graph, root.next)
    return emit(
        torch.ops.lmhead_pass.with_gradient_of.default, root, reduce(partial(emit, "add"), results)
    )


def _concatenated(emit: Emitter, parts: list[Node]) -> Node:
    return parts[0] if len(parts) == 1 else emit(torch.cat, parts)


@dataclass
class _Coefficients:
    """``[N]``: what numbers of each row are multiplied by in the op's sum. None is 1 for losses."""

    of_losses: Node | None = None
    of_logsumexps: Node | None = None
    of_squares: Node | None = None


def _coefficients(
    emit: Emitter, fused: FusedCall, rows: list[Node], targets: list[Node]
) -> _Coefficients:
    given = list(zip(fused.matches, rows, targets, strict=True))
    ones = {
        consumer.node: partial(_ones, emit, match, consumer, of_match, target)
        for match, of_match, target in given
        for consumer in match.consumers
    }
    weights = emit_weights(emit, fused.linear_reduction, ones, like=rows[0])
    shares: dict[str, list[Node | None]] = {}
    for number, match in enumerate(fused.matches):
        for consumer in match.consumers:
            for power in (1, 2):
                if (consumer.node, power) not in weights:
                    continue
                share = _of_rows(emit, consumer, weights[consumer.node, power], targets[number])
                for name, part in _shares(emit, match, consumer, share, power):
                    found = shares.setdefault(name, [None] * len(targets))
                    before = found[number]
                    found[number] = part if before is None else emit("add", before, part)
    dtype = torch.promote_types(fused.matches[0].compute_dtype, torch.float32)

    def filled(name: str) -> Node:
        parts = shares.get(name, [None] * len(targets))
        return _concatenated(emit, [
            emit(torch.zeros_like, target, dtype=dtype) if part is None else part
            for part, target in zip(parts, targets, strict=True)
        ])  # fmt: skip

    of_losses = filled("of_losses")  # where there are none, they count for nothing
    return _Coefficients(of_losses, **{n: filled(n) for n in shares if n != "of_losses"})


def _of_rows(emit: Emitter, consumer: Consumer, weight: Node, target: Node) -> Node:
    """``[N]``: the weight of each row, from that of the consumer's numbers."""
    if consumer.loss is None or consumer.loss.reduction == "none":
        return emit("reshape", weight, -1)
    if consumer.loss.reduction == "mean":
        weight = emit("div", weight, _denominator(emit, consumer.loss))
    return emit("mul", emit(torch.ones_like, target, dtype=tensor_of(weight).dtype), weight)


def _shares(
    emit: Emitter, match: Match, consumer: Consumer, share: Node, power: int
) -> Iterator[tuple[str, Node]]:
    """``[N]``: by what numbers of each row are multiplied in the sum, for the sake of ``consumer``.

    ``share`` is by what its own are, or their squares.
    """

    def times(factor: float) -> Node:
        return share if factor == 1 else emit("mul", share, factor)

    factor = consumer.factor
    match consumer.kind, power:
        case "loss", _:
            yield "of_losses", share
        case "log_probability", _:
            yield "of_losses", times(-factor)
        case "logit", _:  # a log-sum-exp less a loss
            yield "of_losses", times(-factor)
            yield "of_logsumexps", times(factor)
        case "logsumexp", 1:
            yield "of_logsumexps", times(factor)
        case "logsumexp", 2:  # of factor (lse + shift)
            yield "of_squares", times(factor**2)
            if shift := match.logits.values.shift:
                yield "of_logsumexps", times(2 * shift * factor**2)
        case kind:
            raise AssertionError(f"{kind} has no gradient")


def _ones(emit: Emitter, match: Match, consumer: Consumer, rows: Node, target: Node) -> Node:
    """1 for each of the consumer's numbers, in their shape. ``target`` is the call's."""
    dtype = torch.promote_types(match.compute_dtype, torch.float32)
    # Contiguous, as losses are, so that they can be viewed in the same shapes.
    ones_like = partial(emit, torch.ones_like, dtype=dtype, memory_format=torch.contiguous_format)
    if consumer.loss is not None:
        if consumer.loss.reduction != "none":
            return emit("new_ones", rows, (), dtype=dtype)
        return ones_like(consumer.loss.target)
    ones = ones_like(target)
    return _of_each_row(emit, match, consumer, rows, ones)


def _measures(matches: Sequence[Match]) -> list[str]:
    consumers = [consumer for match in matches for consumer in match.consumers]
    return list(dict.fromkeys(name for consumer in consumers for name in _measures_of(consumer)))


def _measures_of(consumer: Consumer) -> tuple[str, ...]:
    if consumer.kind in ("loss", "log_probability"):
        return ()
    return _MEASURES.get(consumer.kind, (consumer.kind,))


def _replaced(match: Match, consumer: Consumer) -> Node:
    return consumer.node if match.linear_reduction is None else match.linear_reduction.sum


def _needs_gradient(match: Match) -> bool:
    return any(
        tensor_of(_replaced(match, consumer)).requires_grad
        for consumer in match.consumers
        if consumer.kind != "returned"
    )


def _asked(match: Match) -> Loss | None:
    """The loss that the call computes; None if no consumer looks at a target."""
    for consumer in match.consumers:
        if consumer.loss is not None:
            return consumer.loss
    for consumer in match.consumers:
        if consumer.target is not None:
            return Loss(consumer.node, consumer.target, None, "none", NOTHING_IGNORED, 0.0, False)
    return None


def emit_rows(emit: Emitter, match: Match) -> Node:
    """``[*rows, H]``: the hidden states."""
    return emit_hidden(emit, match.logits, row_order(match.logits.steps))


def emit_flat(emit: Emitter, rows: Node) -> Node:
    """``[N, H]``"""
    if tensor_of(rows).dim() == 1:
        return emit("unsqueeze", rows, 0)
    return emit("flatten", rows, 0, -2) if tensor_of(rows).dim() > 2 else rows


def emit_target(emit: Emitter, match: Match, rows: Node) -> Node:
    """``[N]``"""
    asked = _asked(match)
    if asked is None:
        size = size_of(emit, emit_flat(emit, rows), 0)
        return emit("new_full", rows, (size,), NOTHING_IGNORED, dtype=torch.int64)
    if tensor_of(asked.target).dim() == 1:
        return asked.target
    return emit("reshape", asked.target, -1)


def emit_op(
    emit: Emitter,
    match: Match,
    hidden: Node,
    target: Node,
    coefficients: _Coefficients,
    measures: list[str],
) -> dict[str, Node]:
    """The results of the op: of the loss, under "loss", and of each measure."""
    asked = _asked(match)
    weight, bias = emit_weight(emit, match.logits), emit_bias(emit, match.logits)
    if not _needs_gradient(match):
        # No gradient may flow where none did: no_grad around the loss, a detach on the way.
        hidden, weight = emit("detach", hidden), emit("detach", weight)
        bias = None if bias is None else emit("detach", bias)
    arguments = (
        *(hidden, weight, bias, target, asked and asked.class_weight, coefficients.of_losses),
        *(coefficients.of_logsumexps, coefficients.of_squares),
        *(match.reduction, asked.ignore_index if asked else NOTHING_IGNORED),
        *(asked.label_smoothing if asked else 0.0, *_scale_and_softcap(match)),
        *(match.compute_dtype, match.rows_per_chunk),
    )
    ops = torch.ops.lmhead_pass
    if not measures:
        return {"loss": emit(ops.linear_cross_entropy.default, *arguments)}
    results = emit(ops.linear_cross_entropy_and_measures.default, *arguments, measures)
    names = enumerate(["loss", *measures])
    return {name: emit(operator.getitem, results, number) for number, name in names}


def _scale_and_softcap(match: Match) -> tuple[float, float | None]:
    """The factors of ``softcap tanh(logit_scale (x + ...) / softcap)``, as the op has it."""
    values = match.logits.values
    if values.cap is None:
        return values.scale, None
    return values.scale * values.cap, abs(values.cap)


def emit_value(
    emit: Emitter, match: Match, consumer: Consumer, rows: Node, results: dict[str, Node]
) -> Node:
    """What replaces ``consumer``, or the weighted sum that it goes into."""
    value = _value(emit, match, consumer, rows, results)
    before = tensor_of(_replaced(match, consumer))
    if consumer.kind == "returned":
        before = before.detach()
    if tensor_of(value).dtype != before.dtype:
        value = emit("to", value, before.dtype)
    if _needs_gradient(match) and not before.requires_grad:
        value = emit("detach", value)
    later = mutation.nodes_between(consumer.node, emit.graph.output_node())
    if any(mutation.writers(later, of=[consumer.node])):
        value = emit("clone", value)  # other consumers may share its memory
    value.meta[EXAMPLE_VALUE] = before
    return value


def _value(
    emit: Emitter, match: Match, consumer: Consumer, rows: Node, results: dict[str, Node]
) -> Node:
    """What ``consumer`` reads, but for its dtype."""
    if consumer.loss is not None:
        return _loss(emit, consumer.loss, match.reduction, results["loss"])
    if match.reduction == "sum" and consumer.kind == "log_probability":
        return emit("mul", results["loss"], -consumer.factor)
    shift = match.logits.values.shift
    match consumer.kind:
        case "log_probability":
            value = emit("neg", results["loss"])
        case "logit":
            value = emit("sub", results["logsumexp"], results["loss"])
        case "expected_logit":
            value = emit("sub", results["logsumexp"], results["entropy"])
        case "returned":
            return _returned(emit, match, consumer.logits, rows, results["logits"])
        case kind:
            value = results[kind]
    is_of_values = consumer.kind in ("logit", "expected_logit", "logsumexp", "max")
    if shift and (is_of_values or consumer.kind.startswith("topk_values")):
        value = emit("add", value, shift)
    if consumer.kind.startswith("topk"):
        return _in_rows(emit, match, consumer.logits, rows, value)
    if consumer.factor != 1 and consumer.kind != "argmax":
        value = emit("mul", value, consumer.factor)
    if consumer.is_summed:
        return emit("sum", value)
    return _of_each_row(emit, match, consumer, rows, value)


def _of_each_row(emit: Emitter, match: Match, consumer: Consumer, rows: Node, value: Node) -> Node:
    """``value`` ``[N]`` of the call's rows, as the consumer has it."""
    if tensor_of(rows).dim() != 2:
        value = emit("reshape", value, _sizes(emit, rows))
    for step in _further_steps(match, consumer.logits):
        value = on_numbers(emit, value, step)
    return emit("unsqueeze", value, consumer.logits.vocab_dim) if consumer.keeps_dim else value


def _sizes(emit: Emitter, rows: Node) -> list[Any]:
    """Of ``rows`` ``[*rows, H]`` all but the last."""
    return [size_of(emit, rows, dim) for dim in range(tensor_of(rows).dim() - 1)]


def _further_steps(match: Match, logits: Logits) -> tuple[RowStep, ...]:
    """What is done to the rows of ``logits`` after those of the call."""
    return logits.steps[len(row_order(match.logits.steps)) :]


def _in_rows(emit: Emitter, match: Match, logits: Logits, rows: Node, values: Node) -> Node:
    """``values`` ``[N, k]`` of the call's rows as those of ``logits``: ``[*rows, k]``."""
    values = emit("reshape", values, (*_sizes(emit, rows), tensor_of(values).size(-1)))
    for step in _further_steps(match, logits):
        values = on_rows(emit, values, step)
    return values


def _returned(emit: Emitter, match: Match, logits: Logits, rows: Node, values: Node) -> Node:
    """Logits ``[N, V]`` in the shape of those that leave the graph."""
    if match.logits.values.shift:
        values = emit("add", values, match.logits.values.shift)
    missing = tensor_of(logits.node).size(logits.vocab_dim) - tensor_of(values).size(-1)
    if missing:
        fill = fill_behind(logits)
        values = emit(torch.nn.functional.pad, values, (0, missing), value=fill)
    values = _in_rows(emit, match, logits, rows, values)
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
    return emit("div", total, _denominator(emit, loss))


def _denominator(emit: Emitter, loss: Loss) -> Node:
    """What a mean divides the sum of its losses by."""
    counted = emit("ne", loss.target, loss.ignore_index)
    if loss.class_weight is not None:
        target = emit("mul", loss.target, counted)
        counted = emit("mul", emit(operator.getitem, loss.class_weight, target), counted)
    return emit("sum", counted)
