"""Triton kernels on rows of logits, with their launchers: row losses, and gradients in place.

One program works on one row. With ``x`` the result of the product, the loss is that of the logits

    z = cap tanh(s (x + b) / cap)             bias b, logit scale s, softcap cap; each may be off
    z = cap y / sqrt(1 + y^2)                 y = s (x + b) / cap, with an algebraic softcap
    z = fill                                  for masked words

and, with target ``t``, class weights ``c`` (1 if there are none) with sum ``C``, label smoothing
``e`` over ``V`` classes, a row's loss and gradient are as in ``aten_loop.py``:

    lse  = log(sum_v exp z_v)                                           nll = lse - z_t
    loss = (1 - e) c_t nll + e / V sum_v c_v (lse - z_v)
    d loss / d z_v = ((1 - e) c_t + m) p_v - e / V c_v                  m = e C / V
    d loss / d z_t = m p_t - e / V c_t - (1 - e) c_t (1 - p_t)
    d lse  / d z_v = p_v
    d z / d x      = s (1 - tanh^2), or s (1 + y^2)^(-3/2), and 0 for masked words

    target_coef = (1 - e) c_t      smoothing_coef = e / V c_v       smoothing_coef_sum = m

``1 - p_t`` is never computed by subtraction, which would lose the gradient of a confident row. For
the same reason the exponentials of the words other than the target are summed apart.

Everything is computed in the dtype of the logits, FP32 or FP64. Options that are None or 0 in
``Terms`` are not compiled. ``lse`` is held as two numbers, the largest logit and
``log(sum_v exp(z_v - largest))``: their sum would round away what huge logits differ by. A target
out of range gives NaN, never a number.
"""

# The arguments of a kernel are values of Triton's own language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_device import on_device_of
from .triton_math import log_of_sum, one_minus_exp_of_minus, tanh_and_slope

# A program holds this much of the logits at a time: 64 bytes in each thread of 8 warps. That leaves
# registers for the options and for a second program beside it.
_BLOCK_BYTES = 1 << 14


@dataclass(frozen=True)
class Terms:
    """The options of the rows' losses (see the module's text)."""

    ignore_index: int = -100
    """Rows with this target have no loss and no gradient."""
    bias: Tensor | None = None
    """``[V]`` contiguous, any floating dtype."""
    class_weight: Tensor | None = None
    """``[V]`` contiguous, any floating dtype."""
    fill: Tensor | None = None
    """``[V]`` contiguous, any floating dtype: the logits of masked words, NaN for the others."""
    label_smoothing: float = 0.0
    logit_scale: float | None = None
    softcap: float | None = None
    softcap_kind: str = "tanh"

    @cached_property
    def _class_weight_sum(self) -> Tensor | None:
        if self.class_weight is None or not self.label_smoothing:
            return None
        dtype = torch.promote_types(self.class_weight.dtype, torch.float32)
        return self.class_weight.sum(dtype=dtype)

    def arguments(self, logits: Tensor) -> dict[str, Any]:
        """The kernels' arguments that follow from ``Terms`` and from the shape of the rows."""
        vocab, itemsize = logits.size(1), logits.dtype.itemsize
        softcap = self.softcap
        if softcap is not None and self.softcap_kind == "algebraic":
            softcap = -softcap  # the kernels know it by its sign
        columns = min(triton.next_power_of_2(vocab), _BLOCK_BYTES // itemsize)
        return {
            "vocab": vocab,
            "ignore_index": self.ignore_index,
            "bias_ptr": self.bias,
            "class_weight_ptr": self.class_weight,
            "class_weight_sum_ptr": self._class_weight_sum,
            "fill_ptr": self.fill,
            "SMOOTHING": self.label_smoothing,
            "SMOOTHING_COEF": self.label_smoothing / vocab,
            "LOGIT_SCALE": self.logit_scale,
            "SOFTCAP": softcap,
            "COLUMNS": columns,
            "num_warps": max(1, columns * itemsize // 2048),
            # Fused, the product in ``s x - largest`` would not be rounded, while the product in
            # ``largest`` was. In a confident row both are one logit, and that rounding error would
            # be the whole difference.
            "enable_fp_fusion": False,
        }


def row_losses(
    logits: Tensor,
    target: Tensor,
    terms: Terms,
    loss: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    *,
    every_row: bool = False,
) -> None:
    """Write each row's loss, largest logit, and log of its sum of ``exp(logit - largest)``.

    Rows without a loss are not read, and their last two results are 0, unless ``every_row``.

    ``logits`` ``[rows, V]`` FP32 or FP64 are read once; their rows may have any stride. ``target``
    ``[rows]`` is int64. The outputs ``[rows]`` have the dtype of the logits. All are contiguous.
    """
    with on_device_of(logits):
        _loss_kernel[(logits.size(0),)](
            logits, logits.stride(0), target, loss, row_max, log_sum, **terms.arguments(logits),
            EVERY_ROW=every_row,
        )  # fmt: skip


def row_gradients(
    logits: Tensor,
    target: Tensor,
    terms: Terms,
    gradient: Tensor,
    coefficient: Tensor | None = None,
    *,
    loss: Tensor | None = None,
    saved: tuple[Tensor, Tensor] | None = None,
    grad_logsumexp: Tensor | None = None,
) -> None:
    """Write the gradient of each row's loss with respect to the result of the product.

    ``gradient`` ``[rows, V]``, of the dtype of the logits or a narrower one, may lie at the front
    of the memory of each row of ``logits``. ``coefficient`` ``[rows]``, of the dtype of the logits
    and any stride, is the gradient with respect to the rows' losses; None is 1. Either ``loss``
    ``[rows]`` is written, which takes one more read of the row, or ``saved`` is the
    ``(row_max, log_sum)`` that ``row_losses`` wrote. ``grad_logsumexp`` ``[rows]``, as
    ``coefficient``, is the gradient with respect to the log-sum-exps of all rows, those without a
    loss too; None is 0. It needs ``saved`` from a call with ``every_row``.
    """
    assert grad_logsumexp is None or saved is not None
    row_max, log_sum = saved or (None, None)
    with on_device_of(logits):
        _gradient_kernel[(logits.size(0),)](
            logits, logits.stride(0), gradient, gradient.stride(0), target,
            coefficient, 0 if coefficient is None else coefficient.stride(0),
            grad_logsumexp, 0 if grad_logsumexp is None else grad_logsumexp.stride(0),
            loss, row_max, log_sum, **terms.arguments(logits),
        )  # fmt: skip


@triton.jit
def _loss_kernel(
    logits_ptr, logits_stride, target_ptr, loss_ptr, row_max_ptr, log_sum_ptr,
    vocab, ignore_index, bias_ptr, class_weight_ptr, class_weight_sum_ptr, fill_ptr,
    SMOOTHING: tl.constexpr, SMOOTHING_COEF: tl.constexpr, LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr, COLUMNS: tl.constexpr,
    EVERY_ROW: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # rows times vocabulary may pass 2^31
    logits_ptr += row * logits_stride
    target, ignored = _target(target_ptr + row, ignore_index, vocab)
    if EVERY_ROW:
        target = tl.where(ignored, 0, target)  # any word will do
    if ignored & (not EVERY_ROW):
        tl.store(loss_ptr + row, 0.0)
        tl.store(row_max_ptr + row, 0.0)
        tl.store(log_sum_ptr + row, 0.0)
    else:
        target_logit, _ = _target_logit(
            logits_ptr, target, vocab, bias_ptr, fill_ptr, LOGIT_SCALE, SOFTCAP
        )
        loss, row_max, log_sum = _loss(
            logits_ptr, target, target_logit, vocab, bias_ptr, class_weight_ptr,
            class_weight_sum_ptr, fill_ptr, SMOOTHING, SMOOTHING_COEF, LOGIT_SCALE, SOFTCAP,
            COLUMNS,
        )  # fmt: skip
        tl.store(loss_ptr + row, tl.where(ignored, 0, loss))
        tl.store(row_max_ptr + row, row_max)
        tl.store(log_sum_ptr + row, log_sum)


@triton.jit
def _gradient_kernel(
    logits_ptr, logits_stride, gradient_ptr, gradient_stride, target_ptr,
    coefficient_ptr, coefficient_stride, grad_logsumexp_ptr, grad_logsumexp_stride,
    loss_ptr, row_max_ptr, log_sum_ptr,
    vocab, ignore_index, bias_ptr, class_weight_ptr, class_weight_sum_ptr, fill_ptr,
    SMOOTHING: tl.constexpr, SMOOTHING_COEF: tl.constexpr, LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # rows times vocabulary may pass 2^31
    logits_ptr += row * logits_stride
    gradient_ptr += row * gradient_stride
    target, ignored = _target(target_ptr + row, ignore_index, vocab)
    if grad_logsumexp_ptr is not None:
        target = tl.where(ignored, 0, target)  # any word will do
    if ignored & (grad_logsumexp_ptr is None):
        if loss_ptr is not None:
            tl.store(loss_ptr + row, 0.0)
        zeros = tl.zeros([COLUMNS], gradient_ptr.dtype.element_ty)
        whole = vocab // COLUMNS
        for block in range(0, whole):
            tl.store(gradient_ptr + block * COLUMNS + tl.arange(0, COLUMNS), zeros)
        column = whole * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(gradient_ptr + column, zeros, mask=column < vocab)
    else:
        target_logit, target_slope = _target_logit(
            logits_ptr, target, vocab, bias_ptr, fill_ptr, LOGIT_SCALE, SOFTCAP
        )
        if loss_ptr is not None:
            loss, row_max, log_sum = _loss(
                logits_ptr, target, target_logit, vocab, bias_ptr, class_weight_ptr,
                class_weight_sum_ptr, fill_ptr, SMOOTHING, SMOOTHING_COEF, LOGIT_SCALE, SOFTCAP,
                COLUMNS,
            )  # fmt: skip
            tl.store(loss_ptr + row, loss)
        else:
            row_max = tl.load(row_max_ptr + row)
            log_sum = tl.load(log_sum_ptr + row)

        # The gradient is factor p_v less coefficient smoothing_coef_v, and at_target at the target.
        nll = log_sum - (target_logit - row_max)
        target_coef = _target_coef(target, target_logit, vocab, class_weight_ptr, SMOOTHING)
        common = _smoothing_coef_sum(target_logit, class_weight_sum_ptr, SMOOTHING, SMOOTHING_COEF)
        at_target = common * tl.exp(-nll) - target_coef * one_minus_exp_of_minus(nll)
        if SMOOTHING > 0:
            at_target -= _smoothing_coef(
                target, vocab, class_weight_ptr, target_logit, SMOOTHING_COEF
            )
        if coefficient_ptr is not None:
            coefficient = tl.load(coefficient_ptr + row * coefficient_stride)
        else:
            coefficient = tl.full([], 1, target_logit.dtype)
        coefficient = tl.where(ignored, 0, coefficient)
        at_target *= coefficient
        factor = coefficient * (target_coef + common)
        if grad_logsumexp_ptr is not None:
            grad_logsumexp = tl.load(grad_logsumexp_ptr + row * grad_logsumexp_stride)
            at_target += grad_logsumexp * tl.exp(-nll)
            factor += grad_logsumexp
        at_target *= target_slope
        factor *= tl.exp(-log_sum)

        # From left to right, because the gradient may lie in the row's own memory. Its element j
        # then covers bytes of logits at j or before it. So a block's store overwrites only logits
        # that this block or an earlier one has loaded. The barrier makes all warps load before any
        # of them stores.
        whole = vocab // COLUMNS
        for block in range(0, whole):
            column = block * COLUMNS + tl.arange(0, COLUMNS)
            _store_gradient(
                logits_ptr, gradient_ptr, column, None, target, at_target, factor, row_max,
                coefficient, vocab, bias_ptr, class_weight_ptr, fill_ptr,
                SMOOTHING, SMOOTHING_COEF, LOGIT_SCALE, SOFTCAP,
            )  # fmt: skip
        if whole * COLUMNS < vocab:
            column = whole * COLUMNS + tl.arange(0, COLUMNS)
            _store_gradient(
                logits_ptr, gradient_ptr, column, column < vocab, target, at_target, factor,
                row_max, coefficient, vocab, bias_ptr, class_weight_ptr, fill_ptr,
                SMOOTHING, SMOOTHING_COEF, LOGIT_SCALE, SOFTCAP,
            )  # fmt: skip


@triton.jit
def _target(target_ptr, ignore_index, vocab):
    """A row's target, -1 if that is no word, and whether it is ignored.

    In 32 bits: each column is compared with it.
    """
    target = tl.load(target_ptr)
    ignored = target == ignore_index
    return tl.where((target >= 0) & (target < vocab), target, -1).to(tl.int32), ignored


@triton.jit
def _store_gradient(
    logits_ptr, gradient_ptr, column, inside, target, at_target, factor, row_max, coefficient,
    vocab, bias_ptr, class_weight_ptr, fill_ptr, SMOOTHING: tl.constexpr,
    SMOOTHING_COEF: tl.constexpr, LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One block of a row's gradient."""
    logit, slope = _logit(logits_ptr, column, inside, bias_ptr, fill_ptr, LOGIT_SCALE, SOFTCAP)
    gradient = factor * tl.exp(logit - row_max)
    if SMOOTHING > 0:
        gradient -= coefficient * _smoothing_coef(
            column, vocab, class_weight_ptr, logit, SMOOTHING_COEF
        )
    gradient = tl.where(column == target, at_target, gradient * slope)
    tl.debug_barrier()
    gradient = gradient.to(gradient_ptr.dtype.element_ty)
    if inside is None:
        tl.store(gradient_ptr + column, gradient)
    else:
        tl.store(gradient_ptr + column, gradient, mask=inside)


@triton.jit
def _loss(
    logits_ptr, target, target_logit, vocab, bias_ptr, class_weight_ptr, class_weight_sum_ptr,
    fill_ptr, SMOOTHING: tl.constexpr, SMOOTHING_COEF: tl.constexpr, LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One read of a row: its loss, its largest logit, and its log_sum."""
    # The smallest number, not -inf: then -inf less the largest so far is -inf and never NaN.
    largest = tl.full([COLUMNS], -3.4028234663852886e38, target_logit.dtype)
    others = tl.zeros([COLUMNS], target_logit.dtype)
    # For the smoothing: the sum of c_v (z_v - shift). Any shift is right; a near one saves digits.
    shift = tl.where(tl.abs(target_logit) < float("inf"), target_logit, 0)
    weighted = tl.zeros([COLUMNS], target_logit.dtype)
    # From right to left: the gradient starts at the left, where the cache is then warm. Only the
    # last block is masked: a mask would keep the others from being read 16 bytes at once.
    whole = vocab // COLUMNS
    if whole * COLUMNS < vocab:
        column = whole * COLUMNS + tl.arange(0, COLUMNS)
        largest, others, weighted = _add_block(
            largest, others, weighted, logits_ptr, column, column < vocab, target, shift, bias_ptr,
            class_weight_ptr, fill_ptr, SMOOTHING, LOGIT_SCALE, SOFTCAP,
        )  # fmt: skip
    for block in range(0, whole):
        column = (whole - 1 - block) * COLUMNS + tl.arange(0, COLUMNS)
        largest, others, weighted = _add_block(
            largest, others, weighted, logits_ptr, column, None, target, shift, bias_ptr,
            class_weight_ptr, fill_ptr, SMOOTHING, LOGIT_SCALE, SOFTCAP,
        )  # fmt: skip
    row_max = tl.maximum(tl.max(largest), target_logit)
    total = tl.sum(others * tl.exp(largest - row_max))
    log_sum = log_of_sum(total, target_logit, row_max)

    nll = log_sum - (target_logit - row_max)
    loss = _target_coef(target, target_logit, vocab, class_weight_ptr, SMOOTHING) * nll
    if SMOOTHING > 0:
        smoothing_coef_sum = _smoothing_coef_sum(
            target_logit, class_weight_sum_ptr, SMOOTHING, SMOOTHING_COEF
        )
        loss += smoothing_coef_sum * (log_sum + (row_max - shift)) - SMOOTHING_COEF * tl.sum(
            weighted
        )
    return loss, row_max, log_sum


@triton.jit
def _add_block(
    largest, others, weighted, logits_ptr, column, inside, target, shift, bias_ptr,
    class_weight_ptr, fill_ptr, SMOOTHING: tl.constexpr, LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The three running results of ``_loss``, with one more block of a row."""
    logit, _ = _logit(logits_ptr, column, inside, bias_ptr, fill_ptr, LOGIT_SCALE, SOFTCAP)
    if SMOOTHING > 0:
        share = logit - shift
        if inside is not None:
            share = tl.where(inside, share, 0)
        if class_weight_ptr is not None:
            share *= _of_words(class_weight_ptr, column, inside).to(logit.dtype)
        weighted += share
    # Each lane has a sum of its own, relative to its own largest logit. That takes one
    # exponential for each logit, and threads exchange nothing before the end.
    logit = tl.where(column != target, logit, -float("inf"))
    if inside is not None:
        logit = tl.where(inside, logit, -float("inf"))
    smaller = tl.exp(-tl.abs(logit - largest))
    others = tl.where(logit > largest, others * smaller + 1, others + smaller)
    return tl.maximum(largest, logit), others, weighted


@triton.jit
def _of_words(ptr, column, inside):
    """A row's elements at the columns; ``inside`` says which exist, and is None if all do."""
    if inside is None:
        return tl.load(ptr + column)
    else:
        return tl.load(ptr + column, mask=inside, other=0)


@triton.jit
def _logit(
    logits_ptr, column, inside, bias_ptr, fill_ptr,
    LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Logits as the loss sees them, and their derivative with respect to the product's result."""
    logit = _of_words(logits_ptr, column, inside)
    slope = tl.full([], 1, logit.dtype)
    if bias_ptr is not None:
        logit += _of_words(bias_ptr, column, inside).to(logit.dtype)
    if LOGIT_SCALE is not None:
        logit *= LOGIT_SCALE
        slope *= LOGIT_SCALE
    if SOFTCAP is not None:
        scaled = logit * (1 / SOFTCAP)
        if SOFTCAP > 0:
            capped, derivative = tanh_and_slope(scaled)
        else:
            root = 1 / tl.sqrt(1 + scaled * scaled)
            capped, derivative = scaled * root, root * root * root
        logit = SOFTCAP * capped
        slope *= derivative
    if fill_ptr is not None:
        fill = _of_words(fill_ptr, column, inside).to(logit.dtype)
        is_masked = fill == fill  # NaN is not
        logit = tl.where(is_masked, fill, logit)
        slope = tl.where(is_masked, 0, slope)
    return logit, slope


@triton.jit
def _target_logit(
    logits_ptr, target, vocab, bias_ptr, fill_ptr,
    LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    in_range = (target >= 0) & (target < vocab)
    logit, slope = _logit(logits_ptr, target, in_range, bias_ptr, fill_ptr, LOGIT_SCALE, SOFTCAP)
    return tl.where(in_range, logit, float("nan")), slope


@triton.jit
def _target_coef(target, like, vocab, class_weight_ptr, SMOOTHING: tl.constexpr):
    """(1 - e) c_t, in the dtype of ``like``."""
    target_coef = tl.full([], 1 - SMOOTHING, like.dtype)
    if class_weight_ptr is not None:
        in_range = (target >= 0) & (target < vocab)
        target_coef *= tl.load(class_weight_ptr + target, mask=in_range, other=0).to(like.dtype)
    return target_coef


@triton.jit
def _smoothing_coef(column, vocab, class_weight_ptr, like, SMOOTHING_COEF: tl.constexpr):
    """e / V c_v, in the dtype of ``like``."""
    coef = tl.full([], SMOOTHING_COEF, like.dtype)
    if class_weight_ptr is not None:
        inside = (column >= 0) & (column < vocab)
        coef *= tl.load(class_weight_ptr + column, mask=inside, other=0).to(like.dtype)
    return coef


@triton.jit
def _smoothing_coef_sum(
    like, class_weight_sum_ptr, SMOOTHING: tl.constexpr, SMOOTHING_COEF: tl.constexpr
):
    """e C / V, in the dtype of ``like``."""
    if class_weight_sum_ptr is not None:
        return SMOOTHING_COEF * tl.load(class_weight_sum_ptr).to(like.dtype)
    else:
        return tl.full([], SMOOTHING, like.dtype)
