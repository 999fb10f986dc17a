"""What the op tells of each row's logits beside its loss, in plain ATen for every device.

With logits ``z`` and probabilities ``p``, of each row, whether or not it has a loss:

    logsumexp   log(sum_v exp z_v)          [N], in the accumulation dtype
    argmax      as of torch.argmax(z, -1)   [N] int64, of z rounded to the compute dtype
    max         the largest z_v             [N], in the accumulation dtype
    topk_values:k, topk_indices:k           [N, k], in the accumulation dtype; int64, as of
                                            torch.topk, of z rounded to the compute dtype
    entropy     -sum_v p_v log p_v          [N], in the accumulation dtype; 0 log 0 is 0
    logits      z                           [N, V], in the compute dtype
    losses      each row's loss             [N], in the accumulation dtype; before coefficient and
                                            reduction, 0 where the target is ignored

The entropy is computed as a sum of numbers that are never negative, so that a confident row's keeps
its digits. With ``m`` the place of the largest logit, and ``d_v = z_m - z_v``, it is

    log(1 + sum_v exp -d_v) + sum_v d_v exp -d_v / (1 + sum_v exp -d_v)       v other than m
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from typing_extensions import assert_never

from ..problem import Problem


class MeasureKind(enum.Enum):
    """The values are the words of the op's schema."""

    LOGSUMEXP = "logsumexp"
    ARGMAX = "argmax"
    MAX = "max"
    ENTROPY = "entropy"
    LOGITS = "logits"
    LOSSES = "losses"
    TOPK_VALUES = "topk_values"
    TOPK_INDICES = "topk_indices"


_OF_LARGEST = (MeasureKind.TOPK_VALUES, MeasureKind.TOPK_INDICES)


@dataclass(frozen=True)
class Measure:
    """One measure of each row."""

    kind: MeasureKind
    k: int = 0
    """How many of the largest logits: for ``TOPK_VALUES`` and ``TOPK_INDICES`` only."""

    @property
    def reads_logits(self) -> bool:
        """Whether it is taken from logits, and not from what the loss computes of each row."""
        return self.kind not in (MeasureKind.LOGSUMEXP, MeasureKind.LOSSES)


def parse_measures(words: Sequence[str]) -> list[Measure]:
    """The measures that the op's argument names; a ValueError for an unknown or repeated one."""
    measures = [_parse(word) for word in words]
    if len(set(measures)) < len(measures):
        raise _wrong(f"takes each measure once: {words}")
    return measures


def _parse(word: str) -> Measure:
    name, *count = word.split(":")
    try:
        kind = MeasureKind(name)
        (k,) = map(int, count if kind in _OF_LARGEST else [*count, "0"])
    except ValueError:
        raise _wrong(f"has no measure '{word}'") from None
    if kind in _OF_LARGEST and k < 1:
        raise _wrong(f"takes at least 1 word in '{word}'")
    return Measure(kind, k)


def _wrong(what: str) -> ValueError:
    names = ", ".join(kind.value + ":k" * (kind in _OF_LARGEST) for kind in MeasureKind)
    return ValueError(f"lmhead_pass: linear_cross_entropy {what}. It has {names}.")


def allocate(problem: Problem, measures: Sequence[Measure]) -> dict[Measure, Tensor]:
    """An empty tensor for each measure."""
    results = {}
    for measure in measures:
        match measure.kind:
            case MeasureKind.LOGITS:
                dtype = problem.compute_dtype
            case MeasureKind.ARGMAX | MeasureKind.TOPK_INDICES:
                dtype = torch.int64
            case _:
                dtype = problem.accumulate_dtype
        shape = [problem.hidden.size(0)]
        if measure.kind is MeasureKind.LOGITS:
            shape.append(problem.weight.size(0))
        elif measure.kind in _OF_LARGEST:
            words = problem.weight.size(0)
            if isinstance(words, int) and measure.k > words:
                raise _wrong(f"takes {measure.k} of {words} words in '{measure.kind.value}'")
            shape.append(measure.k)
        results[measure] = problem.hidden.new_empty(shape, dtype=dtype)
    return results


class Measures:
    """The measures asked for, filled block by block of rows."""

    def __init__(self, problem: Problem, measures: Sequence[Measure]) -> None:
        self._compute_dtype = problem.compute_dtype
        self._results = allocate(problem, measures)

    def __bool__(self) -> bool:
        """Whether any measure is of each row, ignored or not."""
        return any(measure.kind is not MeasureKind.LOSSES for measure in self._results)

    @property
    def read_logits(self) -> bool:
        """Whether ``take`` has anything to do."""
        return any(measure.reads_logits for measure in self._results)

    def take(self, rows: Tensor | slice, logits: Tensor) -> None:
        """Read ``logits`` ``[rows, V]``, as the loss sees them, of the rows ``rows`` of all."""
        if not self.read_logits:
            return
        rounded = cache(lambda: logits.to(self._compute_dtype))
        largest = cache(lambda: logits.max(1, keepdim=True))
        topk = cache(lambda k: rounded().topk(k))
        for measure, result in self._results.items():
            match measure.kind:
                case MeasureKind.LOGSUMEXP | MeasureKind.LOSSES:
                    pass  # ``finish`` is given these
                case MeasureKind.ARGMAX:
                    result[rows] = rounded().argmax(1)
                case MeasureKind.MAX:
                    result[rows] = largest().values.squeeze(1)
                case MeasureKind.ENTROPY:
                    result[rows] = _entropy(logits, *largest())
                case MeasureKind.LOGITS:
                    result[rows] = rounded()
                case MeasureKind.TOPK_VALUES:
                    result[rows] = logits.gather(1, topk(measure.k).indices)
                case MeasureKind.TOPK_INDICES:
                    result[rows] = topk(measure.k).indices
                case _:
                    assert_never(measure.kind)

    def finish(self, losses: Tensor, row_max: Tensor, log_sum: Tensor) -> list[Tensor]:
        """The measures in the order asked for.

        ``losses``, ``row_max`` and ``log_sum`` ``[N]`` are each row's loss, its largest logit, and
        the log of its sum of ``exp(logit - row_max)``.
        """
        for measure, result in self._results.items():
            if measure.kind is MeasureKind.LOSSES:
                result.copy_(losses)
            elif measure.kind is MeasureKind.LOGSUMEXP:
                # Of an infinite logit, or none but -inf, differences are NaN.
                torch.where(row_max.isinf(), row_max, row_max + log_sum, out=result)
        return list(self._results.values())


def _entropy(logits: Tensor, maximum: Tensor, place: Tensor) -> Tensor:
    """``[rows]``, of ``logits`` ``[rows, V]``, their largest and its place, each ``[rows, 1]``."""
    exponentials = logits.sub(maximum).exp_().scatter_(1, place, 0)
    others = exponentials.sum(1)
    mean_distance: Tensor = torch.special.entr(exponentials).sum(1) / (1 + others)
    return torch.log1p(others) + mean_distance
