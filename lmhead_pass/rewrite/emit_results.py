"""Makes of a call's results what each consumer had: its number, shape and dtype."""

import operator
from typing import Any

import torch
from torch.fx import Node
from typing_extensions import assert_never

from ..compat.graphs import EXAMPLE_VALUE
from ..graph import Emitter, mutation, size_of, tensor_of
from ..logits import Cast, Consumer, ConsumerKind, Logits, RowStep, Stage, TargetUse, row_order
from ..plan import Match
from .emit_inputs import emit_bias, emit_fill, emit_weight, on_numbers, on_rows


def measures_of(consumer: Consumer) -> tuple[str, ...]:
    """What the op has to return, besides losses, for ``consumer``."""
    match consumer.kind:
        case (
            ConsumerKind.LOSS
            | ConsumerKind.LOG_PROBABILITY
            | ConsumerKind.PROBABILITY
            | ConsumerKind.MEAN_LOGIT
        ):
            return ()
        case ConsumerKind.LOGIT | ConsumerKind.MEAN_LOG_PROBABILITY:
            return ("logsumexp",)
        case ConsumerKind.EXPECTED_LOGIT:
            return ("logsumexp", "entropy")
        case ConsumerKind.RETURNED:
            return ("logits",)
        case ConsumerKind.TOPK_VALUES:
            return (f"{consumer.kind.value}:{consumer.k}", *_of_softmax(consumer))
        case ConsumerKind.TOPK_INDICES:
            return (f"{consumer.kind.value}:{consumer.k}",)
        case ConsumerKind.MAX:
            return (consumer.kind.value, *_of_softmax(consumer))
        case ConsumerKind.LOGSUMEXP | ConsumerKind.ARGMAX | ConsumerKind.ENTROPY:
            return (consumer.kind.value,)
        case _:
            assert_never(consumer.kind)


def _of_softmax(consumer: Consumer) -> tuple[str, ...]:
    """What a log-probability takes besides the logit."""
    return () if consumer.logits.stage is Stage.LOGITS else ("logsumexp",)


def emit_result(
    emit: Emitter, match: Match, consumer: Consumer, rows: Node, results: dict[str, Node]
) -> Node:
    """What replaces ``consumer``.

    ``rows`` ``[*rows, H]`` are the call's hidden states, and ``results`` what it returns: of the
    loss under "loss", and of each measure under its name.
    """
    value = _value(emit, match, consumer, rows, results)
    before = tensor_of(consumer.node)
    if not consumer.is_differentiated:
        before = before.detach()
    if tensor_of(value).dtype != before.dtype:
        value = emit("to", value, before.dtype)
    if match.differentiable and not consumer.is_differentiated:
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
    shift = match.logits.values.shift

    def shifted(value: Node) -> Node:
        return emit("add", value, shift) if shift else value

    def at_stage(value: Node) -> Node:
        """Of logits ``value``, what the stage is of which they are the largest."""
        if consumer.logits.stage is Stage.LOGITS:
            return shifted(value)
        lse = results["logsumexp"]
        value = emit("sub", value, emit("unsqueeze", lse, -1) if consumer.k else lse)
        if consumer.logits.stage is Stage.PROBABILITIES:
            value = emit("exp", value)
        return value if consumer.factor == 1 else emit("mul", value, consumer.factor)

    match consumer.kind:
        case ConsumerKind.LOSS:
            return _loss(emit, consumer, match.reduction, results["loss"])
        case ConsumerKind.RETURNED:
            return _returned(emit, match, consumer.logits, rows, shifted(results["logits"]))
        case ConsumerKind.TOPK_VALUES:
            name, *_ = measures_of(consumer)
            return _in_rows(emit, match, consumer.logits, rows, at_stage(results[name]))
        case ConsumerKind.MAX:
            value = at_stage(results["max"])
            return of_each_row(emit, match, consumer, rows, value)
        case ConsumerKind.TOPK_INDICES:
            (name,) = measures_of(consumer)
            return _in_rows(emit, match, consumer.logits, rows, results[name])
        case ConsumerKind.LOG_PROBABILITY:
            if match.reduction == "sum":
                return emit("mul", results["loss"], -consumer.factor)
            value = emit("neg", results["loss"])
        case ConsumerKind.LOGIT:
            value = shifted(emit("sub", results["logsumexp"], results["loss"]))
        case ConsumerKind.EXPECTED_LOGIT:
            value = shifted(emit("sub", results["logsumexp"], results["entropy"]))
        case ConsumerKind.PROBABILITY:
            value = emit("exp", emit("neg", results["loss"]))
        case ConsumerKind.MEAN_LOGIT:
            value = shifted(_mean_logit(emit, consumer, rows))
        case ConsumerKind.MEAN_LOG_PROBABILITY:
            value = emit("sub", _mean_logit(emit, consumer, rows), results["logsumexp"])
        case ConsumerKind.LOGSUMEXP:
            value = shifted(results["logsumexp"])
        case ConsumerKind.ENTROPY:
            value = results["entropy"]
        case ConsumerKind.ARGMAX:
            return of_each_row(emit, match, consumer, rows, results["argmax"])
        case _:
            assert_never(consumer.kind)
    if consumer.factor != 1:
        value = emit("mul", value, consumer.factor)
    value = of_each_row(emit, match, consumer, rows, value)
    return emit("sum", value) if consumer.is_summed else value


def _mean_logit(emit: Emitter, consumer: Consumer, rows: Node) -> Node:
    """``[N]``, in FP32 or FP64: what a mean over the words is of each row, but for the shift.

    That of the products is one with the mean row of the weight.
    """
    logits, hidden = consumer.logits, rows
    weight, bias = emit_weight(emit, logits), emit_bias(emit, logits)
    if not consumer.is_differentiated:
        hidden, weight = emit("detach", hidden), emit("detach", weight)
        bias = None if bias is None else emit("detach", bias)
    wide = torch.promote_types(tensor_of(logits.head.node).dtype, torch.float32)
    row = emit("mean", weight, 0, dtype=wide)
    # Not a matrix product, which an autocast would round.
    value = emit("reshape", emit("sum", emit("mul", emit("to", hidden, wide), row), -1), -1)
    if bias is not None:
        value = emit("add", value, emit("mean", bias, 0, dtype=wide))
    scale = logits.values.scale
    return value if scale == 1 else emit("mul", value, scale)


def of_each_row(emit: Emitter, match: Match, consumer: Consumer, rows: Node, value: Node) -> Node:
    """``value`` ``[N]`` of the call's rows, in the consumer's shape."""
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
    fill = emit_fill(emit, logits)
    if fill is not None:  # which the products' dtype may not hold
        values = emit(torch.where, emit("isnan", fill), values, fill)
    values = _in_rows(emit, match, logits, rows, values)
    for step in logits.history:
        if isinstance(step, Cast):
            values = emit("to", values, step.dtype)
    return emit("movedim", values, -1, logits.vocab_dim)


def _loss(emit: Emitter, consumer: Consumer, reduction: str, result: Node) -> Node:
    """The loss that ``consumer`` is, of the op's ``result``, which may be less reduced."""
    use = consumer.target_use
    assert use is not None
    if consumer.reduction == reduction == "none" and tensor_of(use.target).dim() != 1:
        return emit("view_as", result, use.target)
    if reduction in (consumer.reduction, "sum"):
        return result
    total = emit("sum", result)
    if consumer.reduction == "sum":
        return total
    return emit("div", total, emit_denominator(emit, use))


def emit_denominator(emit: Emitter, use: TargetUse) -> Node:
    """``[]``: what a mean divides the sum of its losses by."""
    counted = emit("ne", use.target, use.ignore_index)
    if use.class_weight is not None:
        target = emit("mul", use.target, counted)
        counted = emit("mul", emit(operator.getitem, use.class_weight, target), counted)
    return emit("sum", counted)
