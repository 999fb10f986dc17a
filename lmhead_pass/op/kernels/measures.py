"""What the op tells of each row's logits beside its loss, in plain ATen for every device.

With logits ``z`` and probabilities ``p``, of each row, whether or not it has a loss:

    logsumexp   log(sum_v exp z_v)          [N], in the accumulation dtype
    argmax      as of torch.argmax(z, -1)   [N] int64, of z rounded to the compute dtype
    max         the largest z_v             [N], in the compute dtype
    topk_values:k, topk_indices:k           [N, k], in the compute dtype; int64, as of torch.topk
    entropy     -sum_v p_v log p_v          [N], in the accumulation dtype; 0 log 0 is 0
    logits      z                           [N, V], in the compute dtype
    losses      each row's loss             [N], in the accumulation dtype; before coefficient and
                                            reduction, 0 where the target is ignored

The entropy is a sum of what is never negative, so that that of a confident row keeps its digits.
With ``m`` the place of the largest logit, and ``d_v = z_m - z_v``, it is

    log(1 + sum_v exp -d_v) + sum_v d_v exp -d_v / (1 + sum_v exp -d_v)       v other than m
"""

import torch
from torch import Tensor

from ..problem import Problem

NAMES = (
    *("logsumexp", "argmax", "max", "entropy", "logits", "losses"),
    *("topk_values", "topk_indices"),
)


def allocate(problem: Problem, names: list[str]) -> dict[str, Tensor]:
    """An empty tensor for each measure; a ValueError for a name that is unknown or repeated."""
    unknown = [name for name in names if name.split(":")[0] not in NAMES]
    if unknown or len(set(names)) < len(names):
        wrong = f"has no measure '{unknown[0]}'" if unknown else f"takes each measure once: {names}"
        raise ValueError(f"lmhead_pass: linear_cross_entropy {wrong}. It has {', '.join(NAMES)}.")
    dtypes = {
        "logsumexp": problem.accumulate_dtype,
        "argmax": torch.int64,
        "max": problem.compute_dtype,
        "entropy": problem.accumulate_dtype,
        "logits": problem.compute_dtype,
        "losses": problem.accumulate_dtype,
        "topk_values": problem.compute_dtype,
        "topk_indices": torch.int64,
    }
    rows = problem.hidden.size(0)
    widths = {"logits": [problem.weight.size(0)]}
    return {
        name: problem.hidden.new_empty(
            [rows, *widths.get(name, map(int, name.split(":")[1:]))],
            dtype=dtypes[name.split(":")[0]],
        )
        for name in names
    }


class Measures:
    """The measures asked for, filled block by block of rows."""

    def __init__(self, problem: Problem, names: list[str]):
        self._compute_dtype = problem.compute_dtype
        self._taken = allocate(problem, names)

    def __bool__(self) -> bool:
        """Whether there is anything to take of the logits of each row, ignored or not."""
        return bool(self._taken.keys() - {"losses"})

    def take(self, rows: Tensor | slice, logits: Tensor) -> None:
        """Read ``logits`` ``[rows, V]``, as the loss sees them, of the rows ``rows`` of all."""
        taken = self._taken
        largest_of = {int(name.split(":")[1]) for name in taken if name.startswith("topk")}
        if largest_of or taken.keys() & {"logits", "argmax"}:
            rounded = logits.to(self._compute_dtype)
            for count in largest_of:
                largest = rounded.topk(count)
                for part, values in zip(("values", "indices"), largest, strict=True):
                    if (name := f"topk_{part}:{count}") in taken:
                        taken[name][rows] = values
            if "logits" in taken:
                taken["logits"][rows] = rounded
            if "argmax" in taken:
                taken["argmax"][rows] = rounded.argmax(1)
        if taken.keys() & {"max", "entropy"}:
            maximum, place = logits.max(1, keepdim=True)
            if "max" in taken:
                taken["max"][rows] = maximum.squeeze(1).to(self._compute_dtype)
            if "entropy" in taken:
                exponentials = logits.sub(maximum).exp_().scatter_(1, place, 0)
                others = exponentials.sum(1)
                spread = torch.special.entr(exponentials).sum(1) / (1 + others)
                taken["entropy"][rows] = torch.log1p(others) + spread

    def finish(self, losses: Tensor, row_max: Tensor, log_sum: Tensor) -> list[Tensor]:
        """The measures in the order asked for.

        ``losses``, ``row_max`` and ``log_sum`` ``[N]`` are each row's loss, its largest logit, and
        the log of its sum of ``exp(logit - row_max)``.
        """
        taken = self._taken
        if "losses" in taken:
            taken["losses"].copy_(losses)
        if "logsumexp" in taken:
            torch.add(row_max, log_sum, out=taken["logsumexp"])
        return list(taken.values())
