"""The chunk loop in plain ATen: what the CPU runs, and any device without Triton.

For each chunk of rows there is one product for the logits; then the row work, in place and
in blocks of rows that stay in the processor's cache; then the products that turn the
logits' gradient into those of ``hidden`` and ``weight``. Rows whose target is ``ignore_index``
take part in none of it, unless there is a gradient of their log-sum-exps, or measures are asked
for: these have a pass of their own.

With ``x`` what the product gave (with the bias), the loss is that of the logits

    z = cap tanh(s x / cap)                    logit scale s, softcap cap; without a cap s x

With target ``t``, class weights ``c`` (1 if there are none) with sum ``C``, and label smoothing
``e`` over ``V`` classes, ``torch.nn.functional.cross_entropy`` defines a row's loss as below;
its gradient follows:

    lse  = log(sum_v exp z_v)                                              nll = lse - z_t
    loss = (1 - e) c_t nll + e / V sum_v c_v (lse - z_v)
    d loss / d z_v = ((1 - e) c_t + e C / V) p_v - e / V c_v               for v other than t
    d loss / d z_t = e C / V p_t - e / V c_t - (1 - e) c_t (1 - p_t)
    d lse  / d z_v = p_v
    d z / d x      = s (1 - tanh^2) = s / cosh^2

with ``1 - p_t = -expm1(-nll)``: subtracting 1 from a probability that rounds to 1 would lose
the whole gradient of a confident row.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..chunking import even_rows
from ..problem import Gradients, Problem, held_dtype
from .measures import Measures

# The row work reads a block several times: let it stay in the caches of a few cores.
_BLOCK_BYTES = 1 << 22
# Words of the vocabulary whose share of the weight's gradient is computed at once.
_PRODUCT_WORDS = 4096
# Of these, how many are taken apart from the others: with more, all of them cost less.
_WORDS_APART = _PRODUCT_WORDS // 3
# FP16 reaches from 6e-8 to 65504. Gradients of logits are scaled before they are rounded to it, so
# that the bounds on them and on their products with the weight come to at most 2 to the power of
# this. Three times as much still fits, and small probabilities have all that is below.
_FP16_MAGNITUDE_BITS = 14


def forward(problem: Problem, measures: list[str]) -> list[Tensor]:
    """The loss and the measures: one product.

    Returns ``[loss, row_max, log_sum, *measures]``. The first three are in the accumulation dtype:
    the loss (``[]``, or ``[N]`` for reduction "none"), and what the backward of "none" wants of
    each row (``[N]``): its largest logit, and the log of its sum of ``exp(logit - row_max)``. For
    rows without a loss these are 0 unless measures are asked for.
    """
    rows = _Rows(problem, every=problem.has_logsumexp_terms)
    taken = Measures(problem, measures)
    losses, row_max, log_sum = (_zeros(problem) for _ in range(3))
    if taken:
        _measure_ignored(problem, rows, taken, row_max, log_sum)
    for chunk, _, logits in _chunks(problem, rows.index):
        for part, block in _blocks(problem, chunk, logits):
            index = rows.index[part]
            taken.take(index, block)
            row_max[index] = maximum = block.amax(1)
            block.sub_(maximum.unsqueeze(1))
            losses[index], _, log_sum[index] = _exponentiate_(block, rows, part)
    losses = rows.counted_only(losses)
    loss = rows.reduce(losses, row_max, log_sum)
    return [loss, row_max, log_sum, *taken.finish(losses, row_max, log_sum)]


def forward_and_gradients(
    problem: Problem, needed: list[bool], measures: list[str]
) -> list[Tensor]:
    """The scalar loss, the measures and, in the same pass, the loss's gradients: three products.

    ``needed`` says for hidden, weight and bias whether a gradient is wanted. Returns the loss, the
    three ``Gradients`` for an upstream gradient of 1, in ``held_dtype`` of their input, and the
    measures.
    """
    by_lse = problem.has_logsumexp_terms
    rows, taken = _Rows(problem, every=by_lse), Measures(problem, measures)
    losses, row_max, log_sum = (_zeros(problem) for _ in range(3))
    if taken:
        _measure_ignored(problem, rows, taken, row_max, log_sum)
    reach = rows.reach(rows.upstream)
    if by_lse and problem.has_narrow_range:
        reach = torch.cat((reach, problem.logsumexp_reach()))
    sums = _GradientSums(problem, needed, rows, reach)
    upstream = rows.upstream * sums.factor
    for chunk, hidden, logits in _chunks(problem, rows.index):
        for part, block in _blocks(problem, chunk, logits, write_back=True):
            index = rows.index[part]
            taken.take(index, block)
            row_max[index] = maximum = block.amax(1)
            block.sub_(maximum.unsqueeze(1))
            losses[index], nll, log_sum[index] = _exponentiate_(block, rows, part)
            for_lse = None
            if by_lse:  # then each row takes part
                lse = row_max[index] + log_sum[index]
                for_lse = problem.grad_logsumexp(lse, index) * sums.factor
            _differentiate_(block, rows, part, nll, log_sum[index], upstream[part], for_lse)
        sums.add(rows.index[chunk], hidden, logits)
    losses = rows.counted_only(losses)
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
    """Gradients of per-row losses, and of the measure "logsumexp": three products.

    ``grad_losses`` and ``grad_logsumexp`` ``[N]`` come from upstream; None is 0. ``row_max`` and
    ``log_sum`` are what ``forward`` returned. The gradients come in ``held_dtype`` of their input.
    """
    rows = _Rows(problem, every=grad_logsumexp is not None)
    grad_losses = _zeros(problem) if grad_losses is None else grad_losses
    upstream = rows.counted_only(grad_losses.to(problem.accumulate_dtype))
    upstream = upstream.index_select(0, rows.index)
    reach = rows.reach(upstream)
    if grad_logsumexp is not None:
        grad_logsumexp = grad_logsumexp.to(problem.accumulate_dtype)
        reach = torch.cat((reach, grad_logsumexp))
    sums = _GradientSums(problem, needed, rows, reach)
    upstream = upstream * sums.factor
    for chunk, hidden, logits in _chunks(problem, rows.index):
        for part, block in _blocks(problem, chunk, logits, write_back=True):
            index = rows.index[part]
            block.sub_(row_max[index].unsqueeze(1))
            nll = log_sum[index] - block.gather(1, rows.target[part]).squeeze(1)
            block.exp_()
            for_lse = None if grad_logsumexp is None else grad_logsumexp[index] * sums.factor
            _differentiate_(block, rows, part, nll, log_sum[index], upstream[part], for_lse)
        sums.add(rows.index[chunk], hidden, logits)
    return sums.finish()


def _measure_ignored(
    problem: Problem, rows: "_Rows", taken: Measures, row_max: Tensor, log_sum: Tensor
) -> None:
    # A pass before that of the others, in a function of its own: its buffer is gone when theirs
    # is made.
    for chunk, _, logits in _chunks(problem, rows.ignored):
        for part, block in _blocks(problem, chunk, logits):
            index = rows.ignored[part]
            taken.take(index, block)
            row_max[index] = maximum = block.amax(1)
            log_sum[index] = block.sub_(maximum.unsqueeze(1)).exp_().sum(1).log()


def _zeros(problem: Problem) -> Tensor:
    return problem.hidden.new_zeros(problem.hidden.size(0), dtype=problem.accumulate_dtype)


class _Rows:
    """The rows that take part, and the constants of their losses (names as in the module's text).

    These are the rows that count, and with ``every`` those that are ignored too: as rows whose
    losses and gradients come to 0.
    """

    def __init__(self, problem: Problem, every: bool):
        vocab, dtype = problem.weight.size(0), problem.accumulate_dtype
        self._problem = problem
        counted = problem.target != problem.ignore_index
        self._counted_of_all = counted if every else None
        taking_part = torch.ones_like(counted) if every else counted
        self.index = taking_part.nonzero().squeeze(1)
        """``[M]``: where they are among the ``N`` rows."""
        self.ignored = (~taking_part).nonzero().squeeze(1)
        """``[N - M]``: where the others are."""
        target = problem.target.masked_fill(~counted, 0) if every else problem.target
        target = target.index_select(0, self.index)
        _check_range(target, vocab)
        self.target = target.unsqueeze(1)
        """``[M, 1]``."""

        class_weight = torch.ones((), dtype=dtype, device=target.device).expand(vocab)
        if problem.class_weight is not None:
            class_weight = problem.class_weight.to(dtype)
        target_weight = class_weight.index_select(0, target)
        if every:
            target_weight = target_weight * counted
        self.pull = (1 - problem.label_smoothing) * target_weight
        """``[M]``: (1 - e) c_t."""
        self.spread = None
        """``[V]``: e / V c_v; None without label smoothing."""
        self.spread_sum = torch.zeros((), dtype=dtype, device=target.device)
        if problem.label_smoothing > 0:
            self.spread = problem.label_smoothing / vocab * class_weight
            self.spread_sum = self.spread.sum()
        self._denominator = (
            target_weight.sum() if problem.reduction == "mean" else target_weight.new_ones(())
        )
        self._coefficient = None
        if problem.coefficient is not None:
            coefficient = self.counted_only(problem.coefficient)
            self._coefficient = coefficient.index_select(0, self.index).to(dtype)

    def counted_only(self, values: Tensor) -> Tensor:
        """``values`` ``[N]``, 0 where a row takes part though it is ignored."""
        counted = self._counted_of_all
        return values if counted is None else values.masked_fill(~counted, 0)

    def reduce(self, losses: Tensor, row_max: Tensor, log_sum: Tensor) -> Tensor:
        """The loss of the problem, of what its function has found of all rows ``[N]``."""
        if self._problem.reduction == "none":
            return losses
        if self._coefficient is not None:
            losses = losses.index_select(0, self.index) * self._coefficient
            # A row that counts for nothing does so with an infinite loss, too.
            losses = losses.masked_fill(self._coefficient == 0, 0)
        loss = losses.sum() / self._denominator
        if self._problem.has_logsumexp_terms:
            loss = loss + self._problem.logsumexp_terms(row_max + log_sum)
        return loss

    @property
    def upstream(self) -> Tensor:
        """``[M]``: the gradient of what ``reduce`` returns, if a scalar, in each row's loss."""
        if self._coefficient is not None:
            return self._coefficient
        upstream = self._denominator.reciprocal().expand(self._problem.target.size(0))
        return self.counted_only(upstream).index_select(0, self.index)

    def reach(self, upstream: Tensor) -> Tensor:
        """``[M]``: bounds on the gradients of each row's logits, but for a factor of 2."""
        return upstream * (self.pull + self.spread_sum)


def _check_range(target: Tensor, vocab: int) -> None:
    out_of_range = target[(target < 0) | (target >= vocab)]
    if out_of_range.numel():
        raise IndexError(f"Target {out_of_range[0].item()} is out of bounds.")


def _chunks(problem: Problem, index: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each chunk of the rows ``index``: its place in that, their hidden states, their logits.

    Logits are ``[rows, V]`` in the compute dtype, in one buffer that the next chunk overwrites.
    They have the bias, but neither scale nor cap.
    """
    weight, dtype, rows = problem.compute_weight, problem.compute_dtype, index.numel()
    size = even_rows(rows, problem.batch_chunk_size)
    buffer = problem.hidden.new_empty((min(size, rows), weight.size(0)), dtype=dtype)
    for start in range(0, rows, size):
        chunk = slice(start, min(start + size, rows))
        hidden = problem.hidden.index_select(0, index[chunk]).to(dtype)
        logits = buffer[: hidden.size(0)]
        if problem.bias is None:
            torch.mm(hidden, weight.t(), out=logits)
        else:
            torch.addmm(problem.bias.to(dtype), hidden, weight.t(), out=logits)
        yield chunk, hidden, logits


def _blocks(
    problem: Problem, chunk: slice, logits: Tensor, write_back: bool = False
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of a chunk as the loss sees them: their place, and the block.

    A block is in the accumulation dtype, scaled and capped, and may be overwritten. With
    ``write_back`` it is to become the gradient with respect to what it was, but for the logit
    scale; ``logits`` takes that over, times the derivative of the cap.
    """
    dtype = problem.accumulate_dtype
    size = max(1, _BLOCK_BYTES // (logits.size(1) * dtype.itemsize))
    in_place = logits.dtype == dtype
    scratch = logits if in_place else logits.new_empty((size, logits.size(1)), dtype=dtype)
    for start in range(0, logits.size(0), size):
        part = logits[start : start + size]
        block = part if in_place else scratch[: part.size(0)].copy_(part)
        if problem.logit_scale != 1:
            block.mul_(problem.logit_scale)
        slope = None
        if problem.softcap is not None:
            slope = _cap_(block, problem.softcap, write_back)
        yield slice(chunk.start + start, chunk.start + start + part.size(0)), block
        if slope is not None:
            block.mul_(slope)
        if write_back and not in_place:
            part.copy_(block)


def _cap_(block: Tensor, softcap: float, differentiate: bool) -> Tensor | None:
    """Cap the logits in ``block``; returns the derivative if ``differentiate``."""
    block.div_(softcap)
    # Not 1 - tanh^2, which knows few digits of what a saturated logit has left.
    slope = torch.cosh(block).pow_(-2) if differentiate else None
    block.tanh_().mul_(softcap)
    return slope


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
    block: Tensor,
    rows: _Rows,
    part: slice,
    nll: Tensor,
    log_sum: Tensor,
    upstream: Tensor,
    grad_logsumexp: Tensor | None = None,
) -> None:
    """Turn exponentials into the gradient with respect to the logits.

    ``upstream`` and ``grad_logsumexp`` ``[rows]`` are the gradients with respect to the rows'
    losses and log-sum-exps. What stands at the target's place is not read.
    """
    pull, spread_sum = rows.pull[part], rows.spread_sum
    at_target = spread_sum * torch.exp(-nll) + pull * torch.expm1(-nll)
    if rows.spread is not None:
        at_target = at_target - rows.spread[rows.target[part].squeeze(1)]
    at_target = upstream * at_target
    of_probabilities = upstream * (pull + spread_sum)
    if grad_logsumexp is not None:
        at_target += grad_logsumexp * torch.exp(-nll)
        of_probabilities += grad_logsumexp
    block.mul_((of_probabilities * torch.exp(-log_sum)).unsqueeze(1))
    if rows.spread is not None:
        block.addcmul_(upstream.unsqueeze(1), rows.spread, value=-1)
    block.scatter_(1, rows.target[part], at_target.unsqueeze(1))


class _GradientSums:
    """Gradients of hidden, weight and bias, gathered chunk by chunk."""

    def __init__(self, problem: Problem, needed: list[bool], rows: _Rows, reach: Tensor):
        """``reach`` are bounds on the gradients of the logits, but for a factor of 2."""
        self._problem = problem
        self._needed = needed
        self._scale = 1.0
        if problem.has_narrow_range:
            # Their products with the weight are bounded by the reach times the largest weight.
            largest = torch.stack(torch.aminmax(problem.compute_weight)).abs().amax()
            self._scale = _power_of_two_scale(reach * problem.logit_scale * largest.clamp_min(1))
        self.factor = problem.logit_scale * self._scale
        """What the chunks must multiply upstream gradients by."""
        self._targets = None
        if problem.compute_dtype == torch.bfloat16 and len(rows.index) > problem.batch_chunk_size:
            self._targets = _by_product(rows.target, problem.weight.size(0))

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
        # ATen's products on a CPU come out in the dtype that goes in: in FP16 a frequent word's sum
        # could overflow, in BF16 each chunk's share is rounded.
        if grad_logits.dtype == torch.float16:
            hidden = hidden.to(total.dtype)
        shares = zip(total.split(_PRODUCT_WORDS), grad_logits.split(_PRODUCT_WORDS, 1), strict=True)
        for number, (part, block) in enumerate(shares):
            share = block.t().to(hidden.dtype) @ hidden
            part.add_(share)
            if self._targets is not None:
                # Where it is a target, a word is pulled up, elsewhere pushed down by about as much:
                # its shares are larger than their sum, and so is what rounding took from them.
                words = self._targets[number]
                part[words] += torch.addmm(share[words], block[:, words].t(), hidden, beta=-1)

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


def _by_product(target: Tensor, vocab: int) -> list[Tensor | slice]:
    """Of the words of each product with the weight those that are targets; all, if many are."""
    is_target = torch.zeros(vocab, dtype=torch.bool, device=target.device)
    is_target[target] = True
    words = (part.nonzero().squeeze(1) for part in is_target.split(_PRODUCT_WORDS))
    return [part if len(part) < _WORDS_APART else slice(None) for part in words]


def _power_of_two_scale(gradients: Tensor) -> float:
    """The factor that brings the largest of ``gradients`` to the FP16 magnitude wanted."""
    largest = gradients.abs().amax().item() if gradients.numel() else 0.0
    if largest == 0.0 or not math.isfinite(largest):
        return 1.0
    return 2.0 ** (_FP16_MAGNITUDE_BITS - math.frexp(largest)[1])
