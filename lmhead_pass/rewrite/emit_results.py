"""Makes of a call's results what each consumer had: its number, shape and dtype."""

import operator
from typing import Any

import torch
from torch.fx import Node
from typing_extensions import assert_never

from ..compat.graphs import EXAMPLE_VALUE
from ..graph import Emitter, mutation, size_of, tensor_of
from ..logits import Cast, Consumer, ConsumerKind, Logits, RowStep, TargetUse, row_order
from ..plan import Match
from .emit_inputs import emit_fill, on_numbers, on_rows


def measures_of(consumer: Consumer) -> tuple[str, ...]:
    """What the op has to return, besides losses, for ``consumer``."""
    match consumer.kind:
        case ConsumerKind.LOSS | ConsumerKind.LOG_PROBABILITY:
            return ()
        case ConsumerKind.LOGIT:
            return ("logsumexp",)
        case ConsumerKind.EXPECTED_LOGIT:
            return ("logsumexp", "entropy")
        case ConsumerKind.RETURNED:
            return ("logits",)
        case ConsumerKind.TOPK_VALUES | ConsumerKind.TOPK_INDICES:
            return (f"{consumer.kind.value}:{consumer.k}",)
        case ConsumerKind.LOGSUMEXP | ConsumerKind.ARGMAX | ConsumerKind.MAX | ConsumerKind.ENTROPY:
            return (consumer.kind.value,)
        case _:
            assert_never(consumer.kind)


def needs_gradient(match: Match) -> bool:
    return any(
        tensor_of(consumer.node).requires_grad
        for consumer in match.consumers
        if consumer.kind is not ConsumerKind.RETURNED
    )


def emit_result(
    emit: Emitter, match: Match, consumer: Consumer, rows: Node, results: dict[str, Node]
) -> Node:
    """What replaces ``consumer``.

    ``rows`` ``[*rows, H]`` are the call's hidden states, and ``results`` what it returns: of the
    loss under "loss", and of each measure under its name.
    """
    value = _value(emit, match, consumer, rows, results)
    before = tensor_of(consumer.node)
    if consumer.kind is ConsumerKind.RETURNED:
        before = before.detach()
    if tensor_of(value).dtype != before.dtype:
        value = emit("to", value, before.dtype)
    if needs_gradient(match) and not before.requires_grad:
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

    match consumer.kind:
        case ConsumerKind.LOSS:
            return _loss(emit, consumer, match.reduction, results["loss"])
        case ConsumerKind.RETURNED:
            return _returned(emit, match, consumer.logits, rows, shifted(results["logits"]))
        case ConsumerKind.TOPK_VALUES:
            (name,) = measures_of(consumer)
            return _in_rows(emit, match, consumer.logits, rows, shifted(results[name]))
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
        case ConsumerKind.LOGSUMEXP | ConsumerKind.MAX:
            value = shifted(results[consumer.kind.value])
        case ConsumerKind.ENTROPY:
            value = results["entropy"]
        case ConsumerKind.ARGMAX:
            return of_each_row(emit, match, consumer, rows, results["argmax"])
        case _:
            assert_never(consumer.kind)
    if consumer.factor != 1:
        value = emit("mul", value, consumer.factor)
    if consumer.is_summed:
        return emit("sum", value)
    return of_each_row(emit, match, consumer, rows, value)


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
