"""The chunk loop on a GPU: Triton row kernels between the library's matrix products.

For each chunk of rows one product writes FP32 logits into a buffer, one kernel turns them into
losses and, in place, into gradients in the compute dtype, and two products turn these into
gradients of ``hidden`` and ``weight``. ``triton_rows.py`` has the formulas.

Nothing here waits for the device, so that it can be captured in a CUDA graph: the number of rows
that count stays a tensor, and rows that do not count go through the products as zeros. Measures are
taken from the logits in plain ATen, before the kernel makes them gradients.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...compat.kernels import check_on_device
from ..chunking import gpu_rows
from ..problem import Gradients, Problem, held_dtype
from .measures import Measures
from .products import multiply_into
from .triton_rows import Terms, row_gradients, row_losses

# Rows of the buffer start at multiples of this, whatever the vocabulary: products read and write
# 16 bytes at once only where they do.
_ROW_ALIGNMENT_BYTES = 128
# Rows that are measured at once: their wide copies are small beside a chunk.
_MEASURED_ROWS = 128
# How large FP16 gradients of logits are made before they are rounded. Twice as much still fits, and
# small probabilities have all that is below; sums of products are not held in FP16.
_FP16_MAGNITUDE = 2.0**14


def forward(problem: Problem, measures: list[str]) -> list[Tensor]:
    """The loss and the measures: one product. Returns what ``aten.forward`` does."""
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
    problem: Problem, needed: list[bool], measures: list[str]
) -> list[Tensor]:
    """The scalar loss, the measures and the loss's gradients: three products.

    Returns what aten's namesake does.
    """
    rows, taken = _Rows(problem), Measures(problem, measures)
    by_lse = problem.has_logsumexp_terms
    reach = rows.reach(rows.upstream)
    if by_lse and problem.has_narrow_range:
        reach = reach + problem.logsumexp_reach()
    sums = _GradientSums(problem, needed, reach)
    upstream = sums.scaled(rows.upstream)
    losses, row_max, log_sum = (_per_row(problem) for _ in range(3))
    for chunk, hidden, logits in _chunks(problem):
        gradient = _narrow(logits, problem.compute_dtype)
        given = (logits, rows.target[chunk], rows.terms)
        if taken or by_lse:  # they want row_max and log_sum of each row
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
    needed: list[bool],
    row_max: Tensor,
    log_sum: Tensor,
    grad_losses: Tensor | None,
    grad_logsumexp: Tensor | None,
) -> Gradients:
    """Gradients of per-row losses and log-sum-exps: three products. See ``aten.backward``."""
    rows, dtype = _Rows(problem), problem.accumulate_dtype
    if grad_losses is None:
        grad_losses = row_max.new_zeros(()).expand(row_max.shape)
    upstream = grad_losses.to(dtype)
    reach = rows.reach(upstream)
    if grad_logsumexp is not None:
        grad_logsumexp = grad_logsumexp.to(dtype)
        reach = reach + grad_logsumexp.abs()
    sums = _GradientSums(problem, needed, reach)
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
    """Take the measures asked for of what the product gave for the rows ``chunk``."""
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


class _Rows:
    """The rows, and the constants of their losses (names as in aten's text)."""

    def __init__(self, problem: Problem):
        vocab, dtype = problem.weight.size(0), problem.accumulate_dtype
        self.target = problem.target.contiguous()
        """``[N]``."""
        counted = self.target != problem.ignore_index
        in_range = (self.target >= 0) & (self.target < vocab)
        check_on_device((in_range | ~counted).all(), "a target is out of bounds")

        class_weight = problem.class_weight
        self._target_weight = counted.to(dtype)
        """``[N]``: c_t, and 0 where the row does not count."""
        if class_weight is not None:
            class_weight = class_weight.to(dtype).contiguous()
            target = self.target.masked_fill(~in_range, 0)
            self._target_weight *= class_weight.index_select(0, target)
        self._denominator = (
            self._target_weight.sum()
            if problem.reduction == "mean"
            else self._target_weight.new_ones(())
        )
        self._coefficient = None
        if problem.coefficient is not None:
            self._coefficient = problem.coefficient.to(dtype).masked_fill(~counted, 0)
        self._problem = problem
        self._counted = counted
        self.terms = Terms(
            ignore_index=problem.ignore_index,
            bias=None if problem.bias is None else problem.bias.contiguous(),
            class_weight=class_weight,
            label_smoothing=problem.label_smoothing,
            logit_scale=None if problem.logit_scale == 1 else problem.logit_scale,
            softcap=problem.softcap,
        )

    def reduce(self, losses: Tensor, row_max: Tensor, log_sum: Tensor) -> Tensor:
        """The loss of the problem, of what ``row_losses`` wrote ``[N]`` of the rows."""
        if self._problem.reduction == "none":
            return losses
        if self._coefficient is not None:
            losses = losses * self._coefficient
            # A row that counts for nothing does so with an infinite loss, too.
            losses = losses.masked_fill(self._coefficient == 0, 0)
        loss = losses.sum() / self._denominator
        if self._problem.has_logsumexp_terms:
            loss = loss + self._problem.logsumexp_terms(row_max + log_sum)
        return loss

    @property
    def upstream(self) -> Tensor:
        """``[N]``: the gradient of what ``reduce`` returns, if a scalar, in each row's loss."""
        if self._coefficient is not None:
            return self._coefficient
        return self._denominator.reciprocal().expand(self.target.numel())

    def reach(self, upstream: Tensor) -> Tensor:
        """``[N]``: bounds on the gradients of each row's logits, but for a factor of 2."""
        smoothing, class_weight = self.terms.label_smoothing, self.terms.class_weight
        average = 1 if class_weight is None else class_weight.mean()
        reach = (1 - smoothing) * self._target_weight + smoothing * average
        return (upstream * reach).abs().masked_fill(~self._counted, 0)


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


class _GradientSums:
    """Gradients of hidden, weight and bias, gathered chunk by chunk."""

    def __init__(self, problem: Problem, needed: list[bool], reach: Tensor):
        """``reach`` ``[N]`` bounds the gradients of each row's logits, but for a factor of 2."""
        self._problem = problem
        self._needed = needed
        self._scale: Tensor | None = None
        if problem.has_narrow_range:
            self._scale = _power_of_two_scale(reach * abs(problem.logit_scale))

        hidden, weight, bias = problem.hidden, problem.weight, problem.bias
        total_dtype, held = problem.accumulate_dtype, held_dtype(weight.dtype)
        # A sum over chunks is held in FP32. A single chunk has none: its product is the gradient.
        single = len(hidden) <= problem.batch_chunk_size
        # Each is written before it is read, unless there is no chunk.
        new = Tensor.new_empty if len(hidden) else Tensor.new_zeros
        self._sums = Gradients(
            *(
                new(hidden, tensor.shape if wanted and tensor is not None else 0, dtype=dtype)
                for tensor, dtype, wanted in (
                    (hidden, held_dtype(hidden.dtype), needed[0]),
                    (weight, held if single else total_dtype, needed[1]),
                    (bias, total_dtype, needed[2]),
                )
            )
        )

    def scaled(self, upstream: Tensor) -> Tensor:
        """The upstream gradient that the chunks must use."""
        return upstream if self._scale is None else upstream * self._scale

    def add(self, chunk: slice, hidden: Tensor, grad_logits: Tensor) -> None:
        """Add the share of the rows ``chunk``, whose logits have the gradient ``grad_logits``."""
        for_hidden, for_weight, for_bias = self._needed
        later = chunk.start > 0
        if for_hidden:
            multiply_into(self._sums.hidden[chunk], grad_logits, self._problem.compute_weight)
        if for_weight:
            multiply_into(self._sums.weight, grad_logits.t(), hidden, add=later)
        if for_bias:
            share = grad_logits.sum(0, dtype=self._sums.bias.dtype)
            self._sums.bias.copy_(self._sums.bias + share if later else share)

    def finish(self) -> Gradients:
        """The gradients, each in ``held_dtype`` of its input."""
        inputs = (self._problem.hidden, self._problem.weight, self._problem.bias)
        if self._scale is not None:
            for total in self._sums:
                total.div_(self._scale)
        return Gradients(
            *(
                total.to(held_dtype(tensor.dtype)) if wanted and tensor is not None else total
                for tensor, total, wanted in zip(inputs, self._sums, self._needed, strict=True)
            )
        )


def _power_of_two_scale(gradients: Tensor) -> Tensor:
    """``[]``: the factor that brings the largest of ``gradients`` to the FP16 magnitude wanted."""
    if not gradients.numel():
        return gradients.new_ones(())
    largest = gradients.amax()
    mantissa, _ = torch.frexp(largest)
    # The quotient is exact. It is NaN where the largest is 0 or not finite.
    return (mantissa / largest * _FP16_MAGNITUDE).nan_to_num(nan=1.0, posinf=1.0)
