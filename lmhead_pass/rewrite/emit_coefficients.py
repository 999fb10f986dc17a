"""What each row's numbers count for in the sum that they end in: the op's coefficients."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch.fx import Node

from ..graph import Emitter, tensor_of
from ..logits import Consumer, ConsumerKind
from ..plan import FusedCall, Match
from ..sums import emit_weights
from .emit_results import emit_denominator, of_each_row


@dataclass(frozen=True)
class Coefficients:
    """``[N]``: what numbers of each row are multiplied by in the op's sum. None is 1 for losses."""

    of_losses: Node | None = None
    of_logsumexps: Node | None = None
    of_squares: Node | None = None
    """Of the log-sum-exps."""


def emit_coefficients(
    emit: Emitter, fused: FusedCall, rows: list[Node], targets: list[Node]
) -> Coefficients:
    """For the call that computes all of ``fused``: ``rows`` and ``targets`` are of its matches."""
    if fused.linear_reduction is None:
        return Coefficients()
    given = list(zip(fused.matches, rows, targets, strict=True))
    shaped_by = fused.linear_reduction.shaped_by
    ones = {
        consumer.node: _ones(emit, match, consumer, of_match, target)
        for match, of_match, target in given
        for consumer in match.consumers
        if consumer.node in shaped_by
    }
    weights = emit_weights(emit, fused.linear_reduction, ones)
    shares: dict[str, list[Node | None]] = {"of_losses": [None] * len(targets)}
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

    def filled(parts: list[Node | None]) -> Node:
        """``[N]``: where there are none, numbers count for nothing."""
        return concatenated(emit, [
            emit(torch.zeros_like, target, dtype=dtype) if part is None else part
            for part, target in zip(parts, targets, strict=True)
        ])  # fmt: skip

    return Coefficients(**{name: filled(parts) for name, parts in shares.items()})


def concatenated(emit: Emitter, parts: list[Node]) -> Node:
    return parts[0] if len(parts) == 1 else emit(torch.cat, parts)


def _of_rows(emit: Emitter, consumer: Consumer, weight: Node, target: Node) -> Node:
    """``[N]``: the weight of each row, from that of the consumer's numbers."""
    if consumer.reduction == "none" and not consumer.is_summed:
        return emit("reshape", weight, -1)
    if consumer.reduction == "mean":
        assert consumer.target_use is not None
        weight = emit("div", weight, emit_denominator(emit, consumer.target_use))
    return emit("mul", emit(torch.ones_like, target, dtype=tensor_of(weight).dtype), weight)


def _shares(
    emit: Emitter, match: Match, consumer: Consumer, share: Node, power: int
) -> Iterator[tuple[str, Node]]:
    """``[N]``: by what numbers of each row are multiplied in the sum, for the sake of ``consumer``.

    ``share`` ``[N]`` is what the consumer's own numbers are multiplied by, or their squares.
    """

    def times(factor: float) -> Node:
        return share if factor == 1 else emit("mul", share, factor)

    factor = consumer.factor
    match consumer.kind, power:
        case ConsumerKind.LOSS, _:
            yield "of_losses", share
        case ConsumerKind.LOG_PROBABILITY, _:
            yield "of_losses", times(-factor)
        case ConsumerKind.LOGIT, _:  # a log-sum-exp less a loss
            yield "of_losses", times(-factor)
            yield "of_logsumexps", times(factor)
        case ConsumerKind.LOGSUMEXP, 1:
            yield "of_logsumexps", times(factor)
        case ConsumerKind.MEAN_LOG_PROBABILITY, _:  # the mean logit has its gradient in the graph
            yield "of_logsumexps", times(-factor)
        case ConsumerKind.MEAN_LOGIT, _:
            pass
        case ConsumerKind.LOGSUMEXP, 2:  # of factor (lse + shift)
            yield "of_squares", times(factor**2)
            if shift := match.logits.values.shift:
                yield "of_logsumexps", times(2 * shift * factor**2)
        case kind:
            raise AssertionError(f"{kind} has no gradient")


def _ones(emit: Emitter, match: Match, consumer: Consumer, rows: Node, target: Node) -> Node:
    """1 for each of the consumer's numbers, in their shape. ``target`` is the call's."""
    dtype = torch.promote_types(match.compute_dtype, torch.float32)
    # Contiguous, as losses are, so that they can be viewed in the same shapes.
    ones_like: Callable[[Node], Node] = partial(
        emit, torch.ones_like, dtype=dtype, memory_format=torch.contiguous_format
    )
    if consumer.reduction != "none" or consumer.is_summed:
        return emit("new_ones", rows, (), dtype=dtype)
    if consumer.kind is ConsumerKind.LOSS:
        assert consumer.target_use is not None
        return ones_like(consumer.target_use.target)
    return of_each_row(emit, match, consumer, rows, ones_like(target))
