"""The chunk loop on a GPU: Triton kernels on rows between matrix products.

For each chunk of rows one product leaves what is held of its logits, kernels on rows turn
that into losses and, in place, into gradients in the compute dtype, and two products turn
these into gradients of ``hidden`` and ``weight``. ``LogitRows`` (``triton_logits.py``) holds FP32
logits, and serves everything; ``ExponentialRows`` (``triton_exponentials.py``) is faster, and
serves what ``holding.py`` says.

Nothing here waits for the device, so that it can be captured in a CUDA graph: the number of rows
that count stays a tensor, and rows that do not count go through the products as zeros.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ..chunking import gpu_chunks
from ..holding import EXPONENTIAL_BYTES, can_hold_exponentials, holds_exponentials
from ..problem import Gradients, Pending, Problem, held_dtype, nothing_pending, padded_width
from .device_rows import DeviceRows
from .measures import Measure, Measures
from .row_terms import GradientSums, power_of_two_scale
from .triton_exponentials import ExponentialRows
from .triton_logits import LogitRows
from .triton_products import weight_gradient
from .wide_products import multiply_into

# This many rows are measured at once: their wide copies are small beside a chunk.
_MEASURED_ROWS = 128


def forward(problem: Problem, measures: Sequence[Measure]) -> list[Tensor]:
    """The loss and the measures: see ``ChunkLoop.forward``."""
    rows, taken = DeviceRows(problem), Measures(problem, measures)
    losses, row_max, log_sum = (_per_row(problem) for _ in range(3))
    every = bool(taken) or problem.has_logsumexp_terms
    for chunk, _, held in _chunks(problem, rows, measures, gradients=False):
        _measure(problem, taken, chunk, held)
        held.losses(losses[chunk], row_max[chunk], log_sum[chunk], every_row=every)
    loss = rows.reduce(losses, row_max, log_sum)
    return [loss, row_max, log_sum, *taken.finish(losses, row_max, log_sum)]


def forward_and_gradients(
    problem: Problem,
    needed: Sequence[bool],
    measures: Sequence[Measure],
    saved: tuple[Tensor, Tensor] | None = None,
) -> list[Tensor]:
    """The loss, its gradients and the measures: see ``ChunkLoop.forward_and_gradients``."""
    rows, taken = DeviceRows(problem), Measures(problem, measures)
    by_lse = problem.has_logsumexp_terms
    grad_bound = rows.grad_bound(rows.upstream)
    if by_lse and problem.has_narrow_range:
        grad_bound = grad_bound + problem.logsumexp_grad_bound()
    sums = _GradientSums(problem, needed, grad_bound, holds_exponentials(problem, measures))
    upstream = sums.scaled(rows.upstream)
    losses, row_max, log_sum = _per_row(problem), *(saved or (_per_row(problem), _per_row(problem)))

    def add_chunks() -> None:  # so that the last one is gone before sums are finished
        for chunk, hidden, held in _chunks(problem, rows, measures):
            if taken or by_lse or saved:  # which need row_max and log_sum of each row
                _measure(problem, taken, chunk, held)
                of_chunk = (row_max[chunk], log_sum[chunk])
                held.losses(losses[chunk], *of_chunk, every_row=True)
                for_lse = None
                if by_lse:
                    for_lse = sums.scaled(problem.grad_logsumexp(of_chunk[0] + of_chunk[1], chunk))
                gradient = held.gradients(upstream[chunk], *of_chunk, for_lse)
            else:
                gradient = held.losses_and_gradients(losses[chunk], upstream[chunk])
            sums.add(chunk, hidden, gradient)

    add_chunks()
    loss = rows.reduce(losses, row_max, log_sum)
    return [loss, *sums.finish(), *sums.pending(), *taken.finish(losses, row_max, log_sum)]


def backward(
    problem: Problem,
    needed: Sequence[bool],
    row_max: Tensor,
    log_sum: Tensor,
    grad_losses: Tensor | None,
    grad_logsumexp: Tensor | None,
) -> Gradients:
    """Gradients of per-row losses and log-sum-exps: see ``ChunkLoop.backward``."""
    rows, dtype = DeviceRows(problem), problem.accumulate_dtype
    if grad_losses is None:
        grad_losses = row_max.new_zeros(()).expand(row_max.shape)
    upstream = rows.select(grad_losses.to(dtype))
    grad_bound = rows.grad_bound(upstream)
    if grad_logsumexp is not None:
        grad_logsumexp = grad_logsumexp.to(dtype)
        grad_bound = grad_bound + grad_logsumexp.abs()
    sums = _GradientSums(problem, needed, grad_bound, holds_exponentials(problem, []))
    upstream = sums.scaled(upstream)
    for_lse = None if grad_logsumexp is None else sums.scaled(grad_logsumexp)

    def add_chunks() -> None:
        for chunk, hidden, held in _chunks(problem, rows, []):
            gradient = held.gradients(
                upstream[chunk], row_max[chunk], log_sum[chunk],
                None if for_lse is None else for_lse[chunk],
            )  # fmt: skip
            sums.add(chunk, hidden, gradient)

    add_chunks()
    gradients, pending = sums.finish(), sums.pending()
    if pending.is_needed:
        one, dtype = upstream.new_ones(()), held_dtype(problem.weight.dtype)
        total, vocab = gradients.weight, len(problem.weight)
        weight = finish_weight_gradient(total, pending, one, vocab, dtype)
        gradients = gradients._replace(weight=weight)
    return gradients


def finish_weight_gradient(
    total: Tensor, pending: Pending, factor: Tensor, vocab: int, dtype: torch.dtype
) -> Tensor:
    """The gradient of the weight: see ``dispatch.finish_weight_gradient``."""
    size = pending.hidden.size(1)
    if not len(pending.hidden):
        return total.new_zeros((vocab, size), dtype=dtype)
    out = total.new_empty((vocab, size), dtype=dtype)
    weight_gradient(
        *(pending.grad_logits[:, :vocab], pending.hidden),
        total if len(total) == vocab else None,
        factor / pending.scale,
        out,
    )
    return out


def _measure(
    problem: Problem, taken: Measures, chunk: slice, held: LogitRows | ExponentialRows
) -> None:
    """Take the measures of the rows ``chunk`` that read logits, before these become gradients."""
    if not taken.read_logits:
        return
    assert isinstance(held, LogitRows)
    logits = held.logits
    bias = None if problem.bias is None else problem.bias.to(logits.dtype)
    for start in range(0, logits.size(0), _MEASURED_ROWS):
        part = logits[start : start + _MEASURED_ROWS]
        place = slice(chunk.start + start, chunk.start + start + part.size(0))
        if bias is not None:
            part = part + bias
        if problem.logit_scale != 1:
            part = part * problem.logit_scale
        if problem.softcap is not None:
            part = part / problem.softcap
            if problem.softcap_kind == "algebraic":
                part = part / torch.hypot(part, part.new_ones(()))
            else:
                part = torch.tanh(part)
            part = problem.softcap * part
        if problem.fill is not None:
            part = torch.where(problem.fill.isnan(), part, problem.fill.to(part.dtype))
        taken.take(place, part)


def _per_row(problem: Problem) -> Tensor:
    return problem.hidden.new_empty(problem.hidden.size(0), dtype=problem.accumulate_dtype)


def _chunks(
    problem: Problem, rows: DeviceRows, measures: Sequence[Measure], gradients: bool = True
) -> Iterator[tuple[slice, Tensor, LogitRows | ExponentialRows]]:
    """For each chunk of rows: its place, its hidden states, and what is held of its logits.

    That lies in one buffer, which the next chunk overwrites.
    """
    size, most = problem.hidden.size(0), problem.batch_chunk_size
    held: LogitRows | ExponentialRows
    if holds_exponentials(problem, measures):
        held = ExponentialRows(problem, rows, min(size, most), gradients)
    else:
        held = LogitRows(problem, rows, min(size, _logit_rows(problem)))
        most = _logit_rows(problem)
    for chunk in gpu_chunks(size, most):
        hidden = problem.hidden[chunk].to(problem.compute_dtype)
        held.multiply(chunk, hidden)
        yield chunk, hidden, held


def _logit_rows(problem: Problem) -> int:
    """How many rows of FP32 logits take the memory that was planned for a chunk."""
    most = problem.batch_chunk_size
    size = problem.hidden.size(1)
    if can_hold_exponentials(problem.hidden.device, problem.compute_dtype, size):
        most = max(1, most * EXPONENTIAL_BYTES // problem.accumulate_dtype.itemsize)
    return most


class _GradientSums(GradientSums):
    """Adds up the shares of chunks by products that sum in FP32."""

    def __init__(
        self, problem: Problem, needed: Sequence[bool], grad_bound: Tensor, waits: bool
    ) -> None:
        """Twice ``grad_bound`` ``[N]`` bounds the gradients of each row's logits.

        If it ``waits``, the last chunk's share of the weight's gradient is left to ``pending``.
        """
        scale = None
        if problem.has_narrow_range:
            scale = power_of_two_scale(grad_bound * abs(problem.logit_scale))
        self._rows = rows = len(problem.hidden)
        self._waits = waits and needed[1]
        # A sum over chunks is held in FP32. A single chunk has no sum: its product is the gradient.
        is_single = rows <= (problem.batch_chunk_size if waits else _logit_rows(problem))
        dtype = problem.accumulate_dtype
        if is_single and not waits:
            dtype = held_dtype(problem.weight.dtype)
        # Each element is written before it is read, unless there is no chunk.
        new = Tensor.new_empty if rows else Tensor.new_zeros
        words = len(problem.weight)
        if self._waits and is_single:
            new, words = Tensor.new_zeros, 2
        super().__init__(problem, needed, scale, dtype, new, words)
        one = problem.hidden.new_ones((), dtype=torch.float32)
        self._scale_of_last = one if scale is None else scale.clone()
        width = padded_width(len(problem.weight), problem.compute_dtype)
        empty = partial(problem.hidden.new_empty, dtype=problem.compute_dtype)
        # Of no rows, unless there is a chunk.
        self._last = (empty((0, width)), empty((0, problem.hidden.size(1))))

    def add(self, chunk: slice, hidden: Tensor, grad_logits: Tensor) -> None:
        """Add the share of the rows ``chunk``. ``grad_logits`` is the gradient of their logits."""
        for_hidden, for_weight, for_bias = self._needed
        later, words = chunk.start > 0, grad_logits[:, : self._problem.weight.size(0)]
        if for_hidden:
            multiply_into(self._sums.hidden[chunk], words, self._problem.compute_weight)
        if self._waits and chunk.stop == self._rows:
            self._last = (grad_logits, hidden.clone())
        elif for_weight:
            multiply_into(self._sums.weight, words.t(), hidden, add=later)
        if for_bias:
            share = words.sum(0, dtype=self._sums.bias.dtype)
            self._sums.bias.copy_(self._sums.bias + share if later else share)

    def finish(self) -> Gradients:
        """The gradients; where something is pending, the sum for the weight as it is."""
        if self._waits:
            self._inputs[1] = None
        return super().finish()

    def pending(self) -> Pending:
        """What the weight's gradient lacks when all chunks are added."""
        if not self._waits:
            return nothing_pending(self._problem)
        return Pending(*self._last, self._scale_of_last)
