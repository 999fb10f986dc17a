"""The chunk loop on a GPU: Triton row kernels between the library's matrix products.

For each chunk of rows one product writes FP32 logits into a buffer, one kernel turns them into
losses and, in place, into gradients in the compute dtype, and two products turn these into
gradients of ``hidden`` and ``weight``. ``triton_row_kernels.py`` has the formulas.

Nothing here waits for the device, so that it can be captured in a CUDA graph: the number of rows
that count stays a tensor, and rows that do not count go through the products as zeros. Measures are
taken from the logits in plain ATen, before the kernel turns these into gradients.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...compat.kernels import check_on_device
from ..chunking import gpu_rows
from ..problem import Gradients, Problem, held_dtype
from .measures import Measure, Measures
from .row_terms import GradientSums, RowTerms, power_of_two_scale
from .triton_row_kernels import Terms, row_gradients, row_losses
from .wide_products import multiply_into

# Rows of the buffer start at multiples of this, whatever the size of the vocabulary: only then do
# products read and write 16 bytes at once.
_ROW_ALIGNMENT_BYTES = 128
# This many rows are measured at once: their wide copies are small beside a chunk.
_MEASURED_ROWS = 128


def forward(problem: Problem, measures: Sequence[Measure]) -> list[Tensor]:
    """The loss and the measures: see ``ChunkLoop.forward``."""
    rows, taken = _Rows(problem), Measures(problem, measures)
    losses, row_max, log_sum = (_per_row(problem) for _ in range(3))
    every = bool(taken) or problem.has_logsumexp_terms
    for chunk, _, logits in _chunks(problem):
        _measure(problem, taken, chunk, logits)
        row_losses(
            logits, rows.target[chunk], rows.terms, losses[chunk], row_max[chunk], log_sum[chunk],
            every_row=every,
        )  # fmt: skip
    loss = rows.reduce(losses, row_max, log_sum)
    return [loss, row_max, log_sum, *taken.finish(losses, row_max, log_sum)]


def forward_and_gradients(
    problem: Problem, needed: Sequence[bool], measures: Sequence[Measure]
) -> list[Tensor]:
    """The loss, its gradients and the measures: see ``ChunkLoop.forward_and_gradients``."""
    rows, taken = _Rows(problem), Measures(problem, measures)
    by_lse = problem.has_logsumexp_terms
    grad_bound = rows.grad_bound(rows.upstream)
    if by_lse and problem.has_narrow_range:
        grad_bound = grad_bound + problem.logsumexp_grad_bound()
    sums = _GradientSums(problem, needed, grad_bound)
    upstream = sums.scaled(rows.upstream)
    losses, row_max, log_sum = (_per_row(problem) for _ in range(3))
    for chunk, hidden, logits in _chunks(problem):
        gradient = _narrow(logits, problem.compute_dtype)
        given = (logits, rows.target[chunk], rows.terms)
        if taken or by_lse:  # which need row_max and log_sum of each row
            _measure(problem, taken, chunk, logits)
            saved = (row_max[chunk], log_sum[chunk])
            row_losses(*given, losses[chunk], *saved, every_row=True)
            for_lse = None
            if by_lse:
                for_lse = sums.scaled(problem.grad_logsumexp(saved[0] + saved[1], chunk))
            row_gradients(*given, gradient, upstream[chunk], saved=saved, grad_logsumexp=for_lse)
        else:
            row_gradients(*given, gradient, upstream[chunk], loss=losses[chunk])
        sums.add(chunk, hidden, gradient)
    loss = rows.reduce(losses, row_max, log_sum)
    return [loss, *sums.finish(), *taken.finish(losses, row_max, log_sum)]


def backward(
    problem: Problem,
    needed: Sequence[bool],
    row_max: Tensor,
    log_sum: Tensor,
    grad_losses: Tensor | None,
    grad_logsumexp: Tensor | None,
) -> Gradients:
    """Gradients of per-row losses and log-sum-exps: see ``ChunkLoop.backward``."""
    rows, dtype = _Rows(problem), problem.accumulate_dtype
    if grad_losses is None:
        grad_losses = row_max.new_zeros(()).expand(row_max.shape)
    upstream = rows.select(grad_losses.to(dtype))
    grad_bound = rows.grad_bound(upstream)
    if grad_logsumexp is not None:
        grad_logsumexp = grad_logsumexp.to(dtype)
        grad_bound = grad_bound + grad_logsumexp.abs()
    sums = _GradientSums(problem, needed, grad_bound)
    upstream = sums.scaled(upstream)
    for_lse = None if grad_logsumexp is None else sums.scaled(grad_logsumexp)
    for chunk, hidden, logits in _chunks(problem):
        gradient = _narrow(logits, problem.compute_dtype)
        row_gradients(
            logits, rows.target[chunk], rows.terms, gradient, upstream[chunk],
            saved=(row_max[chunk], log_sum[chunk]),
            grad_logsumexp=None if for_lse is None else for_lse[chunk],
        )  # fmt: skip
        sums.add(chunk, hidden, gradient)
    return sums.finish()


def _measure(problem: Problem, taken: Measures, chunk: slice, logits: Tensor) -> None:
    """Take the measures asked for of the rows ``chunk``; the product gave ``logits``."""
    if not taken:
        return
    bias = None if problem.bias is None else problem.bias.to(logits.dtype)
    for start in range(0, logits.size(0), _MEASURED_ROWS):
        part = logits[start : start + _MEASURED_ROWS]
        place = slice(chunk.start + start, chunk.start + start + part.size(0))
        if bias is not None:
            part = part + bias
        if problem.logit_scale != 1:
            part = part * problem.logit_scale
        if problem.softcap is not None:
            part = problem.softcap * torch.tanh(part / problem.softcap)
        taken.take(place, part)


def _per_row(problem: Problem) -> Tensor:
    return problem.hidden.new_empty(problem.hidden.size(0), dtype=problem.accumulate_dtype)


class _Rows(RowTerms):
    """All rows of the problem, and their constants. What the ignored rows have is masked."""

    def __init__(self, problem: Problem) -> None:
        vocab, dtype = problem.weight.size(0), problem.accumulate_dtype
        self.target = problem.target.contiguous()
        """``[N]``."""
        self._ignored = self.target == problem.ignore_index
        in_range = (self.target >= 0) & (self.target < vocab)
        check_on_device((in_range | self._ignored).all(), "a target is out of bounds")

        class_weight, smoothing = problem.class_weight, problem.label_smoothing
        smoothing_coef_sum: Tensor | float = smoothing
        target_weight = (~self._ignored).to(dtype)
        if class_weight is not None:
            class_weight = class_weight.to(dtype).contiguous()
            target = self.target.masked_fill(~in_range, 0)
            target_weight = self.select(class_weight.index_select(0, target))
            smoothing_coef_sum = smoothing * class_weight.mean()
        super().__init__(problem, target_weight, smoothing_coef_sum)
        self.terms = Terms(
            ignore_index=problem.ignore_index,
            bias=None if problem.bias is None else problem.bias.contiguous(),
            class_weight=class_weight,
            label_smoothing=smoothing,
            logit_scale=None if problem.logit_scale == 1 else problem.logit_scale,
            softcap=problem.softcap,
        )

    def select(self, values: Tensor) -> Tensor:
        return values.masked_fill(self._ignored, 0)


def _chunks(problem: Problem) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each chunk of rows: its place, their hidden states, their logits.

    Logits are ``[rows, V]`` in the accumulation dtype, in one buffer that the next chunk
    overwrites, and do not have the bias yet.
    """
    rows, vocab = problem.hidden.size(0), problem.weight.size(0)
    size, dtype = gpu_rows(rows, problem.batch_chunk_size), problem.accumulate_dtype
    step = _ROW_ALIGNMENT_BYTES // dtype.itemsize
    width = (vocab + step - 1) // step * step
    buffer = problem.hidden.new_empty((min(size, rows), width), dtype=dtype)
    for start in range(0, rows, size):
        chunk = slice(start, min(start + size, rows))
        hidden = problem.hidden[chunk].to(problem.compute_dtype)
        logits = buffer[: hidden.size(0), :vocab]
        multiply_into(logits, hidden, problem.compute_weight.t())
        yield chunk, hidden, logits


def _narrow(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """``[rows, V]`` of ``dtype`` at the front of the memory of each row of ``logits``."""
    stride = logits.stride(0)
    whole_rows = logits.as_strided((logits.size(0), stride), (stride, 1))
    return whole_rows.view(dtype)[:, : logits.size(1)]


class _GradientSums(GradientSums):
    """Adds up the shares of chunks by products that sum in FP32."""

    def __init__(self, problem: Problem, needed: Sequence[bool], grad_bound: Tensor) -> None:
        """Twice ``grad_bound`` ``[N]`` bounds the gradients of each row's logits."""
        scale = None
        if problem.has_narrow_range:
            scale = power_of_two_scale(grad_bound * abs(problem.logit_scale))
        rows = len(problem.hidden)
        # A sum over chunks is held in FP32. A single chunk has no sum: its product is the gradient.
        is_single = rows <= problem.batch_chunk_size
        dtype = held_dtype(problem.weight.dtype) if is_single else problem.accumulate_dtype
        # Each element is written before it is read, unless there is no chunk.
        new = Tensor.new_empty if rows else Tensor.new_zeros
        super().__init__(problem, needed, scale, dtype, new)

    def add(self, chunk: slice, hidden: Tensor, grad_logits: Tensor) -> None:
        """Add the share of the rows ``chunk``. ``grad_logits`` is the gradient of their logits."""
        for_hidden, for_weight, for_bias = self._needed
        later = chunk.start > 0
        if for_hidden:
            multiply_into(self._sums.hidden[chunk], grad_logits, self._problem.compute_weight)
        if for_weight:
            multiply_into(self._sums.weight, grad_logits.t(), hidden, add=later)
        if for_bias:
            share = grad_logits.sum(0, dtype=self._sums.bias.dtype)
            self._sums.bias.copy_(self._sums.bias + share if later else share)
