"""The chunk loop in plain ATen: what the CPU runs, and any device without Triton.

For each chunk of rows there is one product for the logits; then the row work, in place and
in blocks of rows that stay in the processor's cache; then the products that turn the
logits' gradient into those of ``hidden`` and ``weight``. Rows whose target is ``ignore_index``
take part only where their log-sum-exps count. If they take no part and measures are asked for,
they are measured in a pass of their own.

With ``x`` the result of the product (with the bias), the loss is that of the logits

    z = cap tanh(s x / cap)                    logit scale s, softcap cap; without a cap s x

or, with an algebraic cap, ``cap y / sqrt(1 + y^2)`` for ``y = s x / cap``, whose derivative is
``s (1 + y^2)^(-3/2)``. Masked words have constants instead, and no gradient, as targets neither.

With target ``t``, class weights ``c`` (1 if there are none) with sum ``C``, and label smoothing
``e`` over ``V`` classes, ``torch.nn.functional.cross_entropy`` defines a row's loss as below;
its gradient follows:

    lse  = log(sum_v exp z_v)                                              nll = lse - z_t
    loss = (1 - e) c_t nll + e / V sum_v c_v (lse - z_v)
    d loss / d z_v = ((1 - e) c_t + e C / V) p_v - e / V c_v               for v other than t
    d loss / d z_t = e C / V p_t - e / V c_t - (1 - e) c_t (1 - p_t)
    d lse  / d z_v = p_v
    d z / d x      = s (1 - tanh^2) = s / cosh^2

with ``1 - p_t = -expm1(-nll)``: subtracting from 1 a probability that rounds to 1 would lose the
whole gradient of a confident row. The code calls ``(1 - e) c_t`` ``target_coef``, ``e / V c_v``
``smoothing_coef`` and ``e C / V`` ``smoothing_coef_sum``.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..chunking import even_rows
from ..problem import Gradients, Problem, held_dtype, nothing_pending
from .measures import Measure, Measures
from .row_terms import GradientSums, RowTerms, power_of_two_scale

# The row work reads a block several times. One of this size stays in the caches of a few cores.
_BLOCK_BYTES = 1 << 22
# The weight's gradient is computed for this many words of the vocabulary at once.
_PRODUCT_WORDS = 2048
# If fewer of them than this need a correction, they alone get it; else correcting all is cheaper.
_WORDS_APART = _PRODUCT_WORDS // 3


def forward(problem: Problem, measures: Sequence[Measure]) -> list[Tensor]:
    """The loss and the measures: see ``ChunkLoop.forward``."""
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
    problem: Problem,
    needed: Sequence[bool],
    measures: Sequence[Measure],
    saved: tuple[Tensor, Tensor] | None = None,
) -> list[Tensor]:
    """The loss, its gradients and the measures: see ``ChunkLoop.forward_and_gradients``."""
    by_lse = problem.has_logsumexp_terms
    rows, taken = _Rows(problem, every=by_lse), Measures(problem, measures)
    losses, (row_max, log_sum) = _zeros(problem), saved or (_zeros(problem), _zeros(problem))
    if taken:
        _measure_ignored(problem, rows, taken, row_max, log_sum)
    grad_bound = rows.grad_bound(rows.upstream)
    if by_lse and problem.has_narrow_range:
        grad_bound = torch.maximum(grad_bound, problem.logsumexp_grad_bound())
    sums = _GradientSums(problem, needed, rows, grad_bound)
    upstream = sums.scaled(rows.upstream)
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
                for_lse = sums.scaled(problem.grad_logsumexp(lse, index))
            _differentiate_(block, rows, part, nll, log_sum[index], upstream[part], for_lse)
        del block  # and its memory, before that of the products
        sums.add(rows.index[chunk], hidden, logits)
    losses = rows.counted_only(losses)
    loss = rows.reduce(losses, row_max, log_sum)
    pending = nothing_pending(problem)
    return [loss, *sums.finish(), *pending, *taken.finish(losses, row_max, log_sum)]


def backward(
    problem: Problem,
    needed: Sequence[bool],
    row_max: Tensor,
    log_sum: Tensor,
    grad_losses: Tensor | None,
    grad_logsumexp: Tensor | None,
) -> Gradients:
    """Gradients of per-row losses and log-sum-exps: see ``ChunkLoop.backward``."""
    rows = _Rows(problem, every=grad_logsumexp is not None)
    grad_losses = _zeros(problem) if grad_losses is None else grad_losses
    upstream = rows.select(grad_losses.to(problem.accumulate_dtype))
    grad_bound = rows.grad_bound(upstream)
    for_lse = None
    if grad_logsumexp is not None:
        grad_logsumexp = grad_logsumexp.to(problem.accumulate_dtype)
        grad_bound = torch.maximum(grad_bound, grad_logsumexp.abs())
    sums = _GradientSums(problem, needed, rows, grad_bound)
    upstream = sums.scaled(upstream)
    if grad_logsumexp is not None:
        for_lse = sums.scaled(grad_logsumexp)
    for chunk, hidden, logits in _chunks(problem, rows.index):
        for part, block in _blocks(problem, chunk, logits, write_back=True):
            index = rows.index[part]
            block.sub_(row_max[index].unsqueeze(1))
            nll = log_sum[index] - block.gather(1, rows.target[part]).squeeze(1)
            block.exp_()
            of_lse = None if for_lse is None else for_lse[index]
            _differentiate_(block, rows, part, nll, log_sum[index], upstream[part], of_lse)
        del block  # and its memory, before that of the products
        sums.add(rows.index[chunk], hidden, logits)
    return sums.finish()


def _measure_ignored(
    problem: Problem, rows: "_Rows", taken: Measures, row_max: Tensor, log_sum: Tensor
) -> None:
    # This pass comes before that of the other rows, in a function of its own, so that its buffer is
    # freed before theirs is allocated.
    for chunk, _, logits in _chunks(problem, rows.ignored):
        for part, block in _blocks(problem, chunk, logits):
            index = rows.ignored[part]
            taken.take(index, block)
            row_max[index] = maximum = block.amax(1)
            log_sum[index] = block.sub_(maximum.unsqueeze(1)).exp_().sum(1).log()


def _zeros(problem: Problem) -> Tensor:
    return problem.hidden.new_zeros(problem.hidden.size(0), dtype=problem.accumulate_dtype)


class _Rows(RowTerms):
    """The rows that count and their constants; with ``every`` those that are ignored too.

    An ignored row then takes part as one whose loss and gradients come to 0.
    """

    def __init__(self, problem: Problem, every: bool) -> None:
        vocab, dtype = problem.weight.size(0), problem.accumulate_dtype
        counted = problem.target != problem.ignore_index
        self._counted_of_all = counted if every else None
        taking_part = torch.ones_like(counted) if every else counted
        self.index = taking_part.nonzero().squeeze(1)
        """``[M]``: where these rows are among the ``N`` rows."""
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
            target_weight = target_weight.masked_fill(~counted, 0)
        self.smoothing_coef = None
        """``[V]``: e / V c_v; None without label smoothing."""
        smoothing_coef_sum = torch.zeros((), dtype=dtype, device=target.device)
        if problem.label_smoothing > 0:
            self.smoothing_coef = problem.label_smoothing / vocab * class_weight
            smoothing_coef_sum = self.smoothing_coef.sum()
        super().__init__(problem, target_weight, smoothing_coef_sum)

    def select(self, values: Tensor) -> Tensor:
        return self.counted_only(values).index_select(0, self.index)

    def counted_only(self, values: Tensor) -> Tensor:
        """``values`` ``[N]``, with 0 for ignored rows that take part."""
        counted = self._counted_of_all
        return values if counted is None else values.masked_fill(~counted, 0)


def _check_range(target: Tensor, vocab: int) -> None:
    out_of_range = target[(target < 0) | (target >= vocab)]
    if out_of_range.numel():
        raise IndexError(f"Target {out_of_range[0].item()} is out of bounds.")


def _chunks(problem: Problem, index: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each chunk of the rows ``index``: its place in ``index``, hidden states, and logits.

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
    """For each block of rows of a chunk: its place, and its logits as the loss sees them.

    A block is in the accumulation dtype, scaled and capped, and may be overwritten. With
    ``write_back`` the caller turns it into the gradient with respect to these logits, times the
    logit scale. That gradient, times the derivative of the cap and 0 for masked words, is then
    written to ``logits``.
    """
    dtype = problem.accumulate_dtype
    in_place = logits.dtype == dtype
    most = _BLOCK_BYTES // (logits.size(1) * dtype.itemsize)
    if not in_place or problem.softcap is not None:
        # What is held of a block beside the chunk is to be small.
        most = min(most, logits.size(0) // 16)
    size = max(1, most)
    scratch = logits if in_place else logits.new_empty((size, logits.size(1)), dtype=dtype)
    for start in range(0, logits.size(0), size):
        part = logits[start : start + size]
        block = part if in_place else scratch[: part.size(0)].copy_(part)
        if problem.logit_scale != 1:
            block.mul_(problem.logit_scale)
        slope = None
        if problem.softcap is not None:
            slope = _cap_(block, problem, problem.softcap, write_back)
        if problem.masked is not None:
            words, fill = problem.masked
            block.index_copy_(1, words, fill.expand(len(block), -1))
        yield slice(chunk.start + start, chunk.start + start + part.size(0)), block
        if slope is not None:
            block.mul_(slope)
        if write_back and problem.masked is not None:
            block.index_fill_(1, problem.masked[0], 0)
        if write_back and not in_place:
            part.copy_(block)


def _cap_(block: Tensor, problem: Problem, softcap: float, differentiate: bool) -> Tensor | None:
    """Cap the logits in ``block``; returns the derivative if ``differentiate``."""
    block.div_(softcap)
    if problem.softcap_kind == "algebraic":
        root = torch.hypot(block, block.new_ones(()))
        block.div_(root).mul_(softcap)
        return root.pow_(-3) if differentiate else None
    # Not 1 - tanh^2, which loses nearly all digits where tanh is close to 1.
    slope = torch.cosh(block).pow_(-2) if differentiate else None
    block.tanh_().mul_(softcap)
    return slope


def _exponentiate_(block: Tensor, rows: _Rows, part: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Turn logits, less the largest of their row, into their exponentials, except at the target.

    Returns each row's loss, nll and log of its sum of exponentials. The target's entry becomes 0,
    so that the others are summed alone: a sum near 1 would round them away.
    """
    target = rows.target[part]
    target_logit = block.gather(1, target).squeeze(1)
    loss = (
        -(block @ rows.smoothing_coef)
        if rows.smoothing_coef is not None
        else torch.zeros_like(target_logit)
    )
    block.exp_().scatter_(1, target, 0)
    log_sum = torch.log1p(block.sum(1) + torch.expm1(target_logit))
    nll = log_sum - target_logit
    loss += rows.target_coef[part] * nll + rows.smoothing_coef_sum * log_sum
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
    losses and log-sum-exps. The entries at the targets are not read.
    """
    target_coef, smoothing_coef_sum = rows.target_coef[part], rows.smoothing_coef_sum
    at_target = smoothing_coef_sum * torch.exp(-nll) + target_coef * torch.expm1(-nll)
    if rows.smoothing_coef is not None:
        at_target = at_target - rows.smoothing_coef[rows.target[part].squeeze(1)]
    at_target = upstream * at_target
    of_probabilities = upstream * (target_coef + smoothing_coef_sum)
    if grad_logsumexp is not None:
        at_target += grad_logsumexp * torch.exp(-nll)
        of_probabilities += grad_logsumexp
    block.mul_((of_probabilities * torch.exp(-log_sum)).unsqueeze(1))
    if rows.smoothing_coef is not None:
        block.addcmul_(upstream.unsqueeze(1), rows.smoothing_coef, value=-1)
    block.scatter_(1, rows.target[part], at_target.unsqueeze(1))


class _GradientSums(GradientSums):
    """Adds up the shares of chunks by ATen's products."""

    def __init__(
        self, problem: Problem, needed: Sequence[bool], rows: _Rows, grad_bound: Tensor
    ) -> None:
        """Twice the largest of ``grad_bound`` bounds the gradients of the logits."""
        scale = None
        if problem.has_narrow_range:
            # Times the largest weight it bounds the products of these gradients with the weight.
            largest = torch.stack(torch.aminmax(problem.compute_weight)).abs().amax()
            scale = power_of_two_scale(grad_bound * abs(problem.logit_scale) * largest.clamp_min(1))
        # A sum over chunks is held in FP32. A single chunk has no sum: its product is the gradient.
        dtype, words = problem.accumulate_dtype, len(problem.weight)
        is_single = 0 < len(rows.index) <= problem.batch_chunk_size
        if is_single:
            dtype = held_dtype(problem.weight.dtype)
        # Then the gradient comes after the scratch of the row work is gone.
        self._is_product = is_single and dtype == problem.compute_dtype
        if self._is_product:
            words = 0
        super().__init__(problem, needed, scale, dtype, Tensor.new_zeros, words)
        self._targets = None
        if problem.compute_dtype == torch.bfloat16 and not is_single:
            self._targets = _by_product(rows.target, problem.weight.size(0))

    def scaled(self, upstream: Tensor) -> Tensor:
        # The blocks take over the derivative of the cap, and leave that of the scale.
        return super().scaled(upstream) * self._problem.logit_scale

    def add(self, index: Tensor, hidden: Tensor, grad_logits: Tensor) -> None:
        """Add the share of the rows ``index``. ``grad_logits`` is the gradient of their logits."""
        for_hidden, for_weight, for_bias = self._needed
        if for_hidden:
            product = grad_logits @ self._problem.compute_weight
            self._sums.hidden.index_copy_(0, index, product.to(self._sums.hidden.dtype))
        if for_bias:
            self._sums.bias.add_(grad_logits.sum(0, dtype=self._sums.bias.dtype))
        if for_weight:
            self._add_weight(hidden, grad_logits)

    def _add_weight(self, hidden: Tensor, grad_logits: Tensor) -> None:
        if self._is_product:
            self._sums = self._sums._replace(weight=grad_logits.t() @ hidden)
            return
        total = self._sums.weight
        if grad_logits.dtype == total.dtype:
            total.addmm_(grad_logits.t(), hidden)
            return
        # On a CPU the results of ATen's products have the dtype of the operands. In FP16 the sum of
        # a frequent word could overflow; in BF16 each chunk's share is rounded.
        if grad_logits.dtype == torch.float16:
            hidden = hidden.to(total.dtype)
        parts = torch.split(total, _PRODUCT_WORDS)
        blocks = torch.split(grad_logits, _PRODUCT_WORDS, 1)
        for number, (part, block) in enumerate(zip(parts, blocks, strict=True)):
            share = block.t().to(hidden.dtype) @ hidden
            part.add_(share)
            if self._targets is not None:
                # The gradient of a word has one sign where the word is a target and the other sign
                # elsewhere. The shares nearly cancel, and their rounding errors would show: add
                # each error, which addmm computes in FP32.
                words = self._targets[number]
                part[words] += torch.addmm(share[words], block[:, words].t(), hidden, beta=-1)


def _by_product(target: Tensor, vocab: int) -> list[Tensor | slice]:
    """For each ``_PRODUCT_WORDS`` words: those that are targets, or all of them if many are."""
    is_target = torch.zeros(vocab, dtype=torch.bool, device=target.device)
    is_target[target] = True
    words = (part.nonzero().squeeze(1) for part in torch.split(is_target, _PRODUCT_WORDS))
    return [part if len(part) < _WORDS_APART else slice(None) for part in words]
