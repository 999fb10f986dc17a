"""The weight's gradient for some words at a time, without an FP32 sum of its size.

Chunks of rows first give the loss and the gradient of ``hidden``, which is whole for each row.
What is left is done block by block of words: a block's logits are computed again, and its gradient
is whole when all rows have added to it. So there are four products instead of three, and only the
FP32 sum of a block.

A block is a problem of its own, whose rows know their log-sum-exp from the first pass. Rows with a
target in the block have a loss there. The others have a gradient with respect to the log-sum-exp
alone, which is what the loss makes of all words but the target:

    d loss / d z_v = c_t p_v       v other than t

so that the loops' ``backward`` does all the work.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..problem import Gradients, Problem, held_dtype
from .chunk_loop import ChunkLoop
from .device_rows import DeviceRows
from .measures import Measure

_NO_TARGET = -1


class ByWords:
    """A ``ChunkLoop`` around another one."""

    def __init__(self, loop: ChunkLoop) -> None:
        self._loop = loop

    def forward(self, problem: Problem, measures: Sequence[Measure]) -> list[Tensor]:
        """The loss and the measures: see ``ChunkLoop.forward``."""
        return self._loop.forward(problem, measures)

    def forward_and_gradients(
        self, problem: Problem, needed: Sequence[bool], measures: Sequence[Measure]
    ) -> list[Tensor]:
        """The loss, its gradients and the measures: see ``ChunkLoop.forward_and_gradients``."""
        zeros = problem.hidden.new_zeros((2, len(problem.hidden)), dtype=problem.accumulate_dtype)
        row_max, log_sum = zeros
        loss, hidden, _, _, *others = self._loop.forward_and_gradients(
            problem, [needed[0], False, False], measures, (row_max, log_sum)
        )
        rows, of_lse = DeviceRows(problem), None
        if problem.has_logsumexp_terms:
            of_lse = problem.grad_logsumexp(row_max + log_sum, slice(None))
        given = (row_max, log_sum, rows.upstream, of_lse)
        return [loss, hidden, *self._of_words(problem, needed, rows, *given), *others]

    def backward(
        self,
        problem: Problem,
        needed: Sequence[bool],
        row_max: Tensor,
        log_sum: Tensor,
        grad_losses: Tensor | None,
        grad_logsumexp: Tensor | None,
    ) -> Gradients:
        """Gradients of per-row losses and log-sum-exps: see ``ChunkLoop.backward``."""
        given = (row_max, log_sum, grad_losses, grad_logsumexp)
        hidden, _, _ = self._loop.backward(problem, [needed[0], False, False], *given)
        upstream = torch.zeros_like(row_max) if grad_losses is None else grad_losses
        rows = DeviceRows(problem)
        given = (row_max, log_sum, rows.select(upstream.to(row_max.dtype)), grad_logsumexp)
        return Gradients(hidden, *self._of_words(problem, needed, rows, *given))

    def _of_words(
        self,
        problem: Problem,
        needed: Sequence[bool],
        rows: DeviceRows,
        row_max: Tensor,
        log_sum: Tensor,
        upstream: Tensor,
        grad_logsumexp: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The gradients of weight and bias, in ``held_dtype``; empty where not needed.

        ``upstream`` ``[N]`` is the gradient with respect to the rows' losses, 0 if ignored.
        """
        _, *inputs = problem.inputs_with_gradient([False, *needed[1:]])
        weight, bias = (
            problem.hidden.new_empty(0)
            if tensor is None
            else tensor.new_empty(tensor.shape, dtype=held_dtype(tensor.dtype))
            for tensor in inputs
        )
        if grad_logsumexp is None:
            grad_logsumexp = torch.zeros_like(row_max)
            # Nothing is known of ignored rows, whose exponentials must not be infinite.
            row_max = row_max.masked_fill(rows.ignored, torch.inf)
        of_others = upstream * rows.target_coef
        words = problem.vocab_chunk_size
        assert words is not None
        for start in range(0, len(problem.weight), words):
            block = slice(start, start + words)
            place = problem.target - start
            is_inside = (place >= 0) & (place < words) & ~rows.ignored
            share = self._loop.backward(
                _block(problem, block, place.where(is_inside, _NO_TARGET)),
                [False, *needed[1:]],
                row_max,
                log_sum,
                upstream,
                grad_logsumexp + of_others.masked_fill(is_inside, 0),
            )
            if needed[1]:
                weight[block] = share.weight
            if needed[2]:
                bias[block] = share.bias
        return weight, bias


def _block(problem: Problem, block: slice, target: Tensor) -> Problem:
    """The words ``block`` alone, with the losses of all rows apart."""

    def of_words(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[block]

    return replace(
        problem,
        weight=problem.weight[block],
        bias=of_words(problem.bias),
        class_weight=of_words(problem.class_weight),
        fill=of_words(problem.fill),
        target=target,
        ignore_index=_NO_TARGET,
        reduction="none",
        coefficient=None,
        logsumexp_coefficient=None,
        z_loss=None,
        vocab_chunk_size=None,
    )
