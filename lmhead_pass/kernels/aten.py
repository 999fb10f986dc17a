"""The chunk loop in plain ATen: what the CPU runs, and any device without Triton.

For each chunk of rows there is one product for the logits; then the row work, in place and
in blocks of rows that stay in the processor's cache; then the products that turn the
logits' gradient into those of ``hidden`` and ``weight``. Rows whose target is
``ignore_index`` take part in none of it.

With logits ``z``, target ``t``, class weights ``c`` (1 if there are none) with sum ``C``, and
label smoothing ``e`` over ``V`` classes, ``torch.nn.functional.cross_entropy`` defines a row's
loss as below; its gradient follows:

    nll  = log(sum_v exp z_v) - z_t
    loss = (1 - e) c_t nll + e / V sum_v c_v (log(sum_u exp z_u) - z_v)
    d loss / d z_v = ((1 - e) c_t + e C / V) p_v - e / V c_v               for v other than t
    d loss / d z_t = e C / V p_t - e / V c_t - (1 - e) c_t (1 - p_t)

with ``1 - p_t = -expm1(-nll)``: subtracting 1 from a probability that rounds to 1 would lose
the whole gradient of a confident row.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..chunking import even_rows
from ..problem import Gradients, Problem, held_dtype

# The row work reads a block several times: let it stay in the caches of a few cores.
_BLOCK_BYTES = 1 << 22
# Words of the vocabulary whose share of the weight's gradient is computed at once.
_PRODUCT_WORDS = 4096
# FP16 reaches from 6e-8 to 65504. Gradients of logits are brought to about 2 to the power of
# this before they are rounded to it: 32 bits remain below for small probabilities, 8 above
# for the sums of a product.
_FP16_MAGNITUDE_BITS = 8


def forward(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """The loss alone: one product.

    Returns ``(loss, row_max, log_sum)``, all in the accumulation dtype: the loss (``[]``, or
    ``[N]`` for reduction "none"), and what the backward of "none" wants of each row (``[N]``):
    its largest logit, and the log of its sum of ``exp(logit - row_max)``.
    """
    rows = _Rows(problem)
    losses, row_max, log_sum = (_zeros(problem) for _ in range(3))
    for chunk, _, logits in _chunks(problem, rows):
        for part, block in _blocks(chunk, logits, problem.accumulate_dtype):
            index = rows.index[part]
            row_max[index] = maximum = block.amax(1)
            block.sub_(maximum.unsqueeze(1))
            losses[index], _, log_sum[index] = _exponentiate_(block, rows, part)
    if problem.reduction == "none":
        return losses, row_max, log_sum
    return losses.sum() / rows.denominator, row_max, log_sum


def forward_and_gradients(problem: Problem, needed: list[bool]) -> tuple[Tensor, ...]:
    """The scalar loss and, in the same pass, its gradients: three products.

    ``needed`` says for hidden, weight and bias whether a gradient is wanted. Returns the loss and
    the three ``Gradients`` for an upstream gradient of 1, in ``held_dtype`` of their input.
    """
    rows = _Rows(problem)
    sums = _GradientSums(problem, needed, rows, rows.denominator.reciprocal().expand(len(rows)))
    losses = _zeros(problem)
    for chunk, hidden, logits in _chunks(problem, rows):
        for part, block in _blocks(chunk, logits, problem.accumulate_dtype, write_back=True):
            block.sub_(block.amax(1, keepdim=True))
            losses[rows.index[part]], nll, log_sum = _exponentiate_(block, rows, part)
            _differentiate_(block, rows, part, nll, log_sum, sums.coefficient[part])
        sums.add(rows.index[chunk], hidden, logits)
    return losses.sum() / rows.denominator, *sums.finish()


def backward(
    problem: Problem, needed: list[bool], row_max: Tensor, log_sum: Tensor, grad_losses: Tensor
) -> Gradients:
    """Gradients of per-row losses, for ``grad_losses`` ``[N]`` from upstream: three products.

    ``row_max`` and ``log_sum`` are what ``forward`` returned. The gradients come in
    ``held_dtype`` of their input.
    """
    rows = _Rows(problem)
    upstream = grad_losses.to(problem.accumulate_dtype).index_select(0, rows.index)
    sums = _GradientSums(problem, needed, rows, upstream)
    for chunk, hidden, logits in _chunks(problem, rows):
        for part, block in _blocks(chunk, logits, problem.accumulate_dtype, write_back=True):
            index = rows.index[part]
            block.sub_(row_max[index].unsqueeze(1))
            nll = log_sum[index] - block.gather(1, rows.target[part]).squeeze(1)
            block.exp_()
            _differentiate_(block, rows, part, nll, log_sum[index], sums.coefficient[part])
        sums.add(rows.index[chunk], hidden, logits)
    return sums.finish()


def _zeros(problem: Problem) -> Tensor:
    return problem.hidden.new_zeros(problem.hidden.size(0), dtype=problem.accumulate_dtype)


class _Rows:
    """The rows that count, and the constants of their losses (names as in the module's text)."""

    def __init__(self, problem: Problem):
        vocab, dtype = problem.weight.size(0), problem.accumulate_dtype
        counted = problem.target != problem.ignore_index
        self.index = counted.nonzero().squeeze(1)
        """``[M]``: where they are among the ``N`` rows."""
        target = problem.target.index_select(0, self.index)
        _check_range(target, vocab)
        self.target = target.unsqueeze(1)
        """``[M, 1]``."""

        class_weight = torch.ones((), dtype=dtype, device=target.device).expand(vocab)
        if problem.class_weight is not None:
            class_weight = problem.class_weight.to(dtype)
        target_weight = class_weight.index_select(0, target)
        self.pull = (1 - problem.label_smoothing) * target_weight
        """``[M]``: (1 - e) c_t."""
        self.spread = None
        """``[V]``: e / V c_v; None without label smoothing."""
        self.spread_sum = torch.zeros((), dtype=dtype, device=target.device)
        if problem.label_smoothing > 0:
            self.spread = problem.label_smoothing / vocab * class_weight
            self.spread_sum = self.spread.sum()
        self.denominator = (
            target_weight.sum() if problem.reduction == "mean" else target_weight.new_ones(())
        )
        """``[]``: what the summed loss is divided by."""

    def __len__(self) -> int:
        return self.index.numel()


def _check_range(target: Tensor, vocab: int) -> None:
    out_of_range = target[(target < 0) | (target >= vocab)]
    if out_of_range.numel():
        raise IndexError(f"Target {out_of_range[0].item()} is out of bounds.")


def _chunks(problem: Problem, rows: _Rows) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each chunk: its place among the rows that count, their hidden states, their logits.

    Logits are ``[rows, V]`` in the compute dtype, in one buffer that the next chunk overwrites.
    """
    weight, dtype = problem.compute_weight, problem.compute_dtype
    size = even_rows(len(rows), problem.batch_chunk_size)
    buffer = problem.hidden.new_empty((min(size, len(rows)), weight.size(0)), dtype=dtype)
    for start in range(0, len(rows), size):
        chunk = slice(start, min(start + size, len(rows)))
        hidden = problem.hidden.index_select(0, rows.index[chunk]).to(dtype)
        logits = buffer[: hidden.size(0)]
        if problem.bias is None:
            torch.mm(hidden, weight.t(), out=logits)
        else:
            torch.addmm(problem.bias.to(dtype), hidden, weight.t(), out=logits)
        yield chunk, hidden, logits


def _blocks(
    chunk: slice, logits: Tensor, dtype: torch.dtype, write_back: bool = False
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of a chunk in the accumulation dtype: their place, and the block.

    A block may be overwritten. With ``write_back``, ``logits`` takes over what is in it then.
    """
    size = max(1, _BLOCK_BYTES // (logits.size(1) * dtype.itemsize))
    in_place = logits.dtype == dtype
    scratch = logits if in_place else logits.new_empty((size, logits.size(1)), dtype=dtype)
    for start in range(0, logits.size(0), size):
        part = logits[start : start + size]
        block = part if in_place else scratch[: part.size(0)].copy_(part)
        yield slice(chunk.start + start, chunk.start + start + part.size(0)), block
        if write_back and not in_place:
            part.copy_(block)


def _exponentiate_(block: Tensor, rows: _Rows, part: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Turn logits less their row's largest into their exponentials, except at the target.

    Returns each row's loss, nll and log of its sum of exponentials. The target's entry is left
    as 0: that sums the others alone, which keeps what a sum near 1 would round away.
    """
    target = rows.target[part]
    target_logit = block.gather(1, target).squeeze(1)
    loss = -(block @ rows.spread) if rows.spread is not None else torch.zeros_like(target_logit)
    block.exp_().scatter_(1, target, 0)
    log_sum = torch.log1p(block.sum(1) + torch.expm1(target_logit))
    nll = log_sum - target_logit
    loss += rows.pull[part] * nll + rows.spread_sum * log_sum
    return loss, nll, log_sum


def _differentiate_(
    block: Tensor, rows: _Rows, part: slice, nll: Tensor, log_sum: Tensor, coefficient: Tensor
) -> None:
    """Turn exponentials into the loss's gradient with respect to the logits.

    ``coefficient`` ``[rows]`` is the gradient with respect to the rows' losses. What stands at
    the target's place is not read.
    """
    pull, spread_sum = rows.pull[part], rows.spread_sum
    at_target = spread_sum * torch.exp(-nll) + pull * torch.expm1(-nll)
    block.mul_((coefficient * (pull + spread_sum) * torch.exp(-log_sum)).unsqueeze(1))
    if rows.spread is not None:
        block.addcmul_(coefficient.unsqueeze(1), rows.spread, value=-1)
        at_target = at_target - rows.spread[rows.target[part].squeeze(1)]
    block.scatter_(1, rows.target[part], (coefficient * at_target).unsqueeze(1))


class _GradientSums:
    """Gradients of hidden, weight and bias, gathered chunk by chunk."""

    def __init__(self, problem: Problem, needed: list[bool], rows: _Rows, upstream: Tensor):
        self._problem = problem
        self._needed = needed
        self._scale = 1.0
        if problem.compute_dtype == torch.float16:
            self._scale = _power_of_two_scale(upstream * (rows.pull + rows.spread_sum))
        self.coefficient = upstream * self._scale
        """``[M]``: the gradient with respect to each row's loss that the chunks must use."""

        inputs = (problem.hidden, problem.weight, problem.bias)
        # Each row of hidden gets its gradient once; the others are sums over chunks.
        dtypes = (
            held_dtype(problem.hidden.dtype),
            problem.accumulate_dtype,
            problem.accumulate_dtype,
        )
        self._sums = Gradients(
            *(
                tensor.new_zeros(tensor.shape, dtype=dtype)
                if wanted and tensor is not None
                else problem.hidden.new_empty(0)
                for tensor, dtype, wanted in zip(inputs, dtypes, needed, strict=True)
            )
        )

    def add(self, index: Tensor, hidden: Tensor, grad_logits: Tensor) -> None:
        """Add the share of the rows ``index``, whose logits have the gradient ``grad_logits``."""
        for_hidden, for_weight, for_bias = self._needed
        if for_hidden:
            product = grad_logits @ self._problem.compute_weight
            self._sums.hidden.index_copy_(0, index, product.to(self._sums.hidden.dtype))
        if for_bias:
            self._sums.bias.add_(grad_logits.sum(0, dtype=self._sums.bias.dtype))
        if for_weight:
            self._add_weight(hidden, grad_logits)

    def _add_weight(self, hidden: Tensor, grad_logits: Tensor) -> None:
        total = self._sums.weight
        if grad_logits.dtype == total.dtype:
            total.addmm_(grad_logits.t(), hidden)
            return
        # ATen's products on a CPU come out in the dtype that goes in. In BF16 that is one rounding
        # for each chunk; in FP16 a frequent word's sum could overflow.
        if grad_logits.dtype == torch.float16:
            hidden = hidden.to(total.dtype)
        for part, block in zip(
            total.split(_PRODUCT_WORDS), grad_logits.split(_PRODUCT_WORDS, 1), strict=True
        ):
            part.add_(block.t().to(hidden.dtype) @ hidden)

    def finish(self) -> Gradients:
        """The gradients, each in ``held_dtype`` of its input."""
        inputs = (self._problem.hidden, self._problem.weight, self._problem.bias)
        return Gradients(
            *(
                self._unscaled(total).to(held_dtype(tensor.dtype))
                if wanted and tensor is not None
                else total
                for tensor, total, wanted in zip(inputs, self._sums, self._needed, strict=True)
            )
        )

    def _unscaled(self, total: Tensor) -> Tensor:
        return total if self._scale == 1 else total.div_(self._scale)


def _power_of_two_scale(gradients: Tensor) -> float:
    """The factor that brings the largest of ``gradients`` to the FP16 magnitude wanted."""
    largest = gradients.abs().amax().item() if gradients.numel() else 0.0
    if largest == 0.0 or not math.isfinite(largest):
        return 1.0
    return 2.0 ** (_FP16_MAGNITUDE_BITS - math.frexp(largest)[1])
