"""Triton kernels on rows of exponentials: their losses, and gradients in place.

They finish what ``triton_products.exponentials`` leaves of each tile of logits: ``largest`` and
``total`` ``[tiles, rows]``, ``target_logit`` ``[rows]`` and the exponentials. The losses are those
of ``triton_row_kernels.py`` without label smoothing and softcap; ``target_coef`` ``[rows]`` is its
class weight, and 0 where the target is ignored:

    loss = target_coef nll                               nll = row_max + log_sum - z_t
    d loss / d z_v = target_coef p_v                     v other than t
    d loss / d z_t = -target_coef (1 - p_t)
    p_v = exponential_v 2^-15 exp(largest - row_max - log_sum)

All numbers of a row are FP32. ``word`` is the target, or -1 where there is none in the vocabulary:
then the loss is NaN if the row is not ``ignored``.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from .triton_device import on_device_of
from .triton_math import log_of_sum, one_minus_exp_of_minus
from .triton_products import TILE_WORDS

_ROWS = 32
_TILES = 16


def exponential_losses(
    largest: Tensor,
    total: Tensor,
    target_logit: Tensor,
    word: Tensor,
    ignored: Tensor,
    target_coef: Tensor,
    loss: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
) -> None:
    """Write each row's loss, largest logit, and log of its sum of ``exp(logit - largest)``."""
    tiles, rows = largest.shape
    with on_device_of(loss):
        _loss_kernel[(triton.cdiv(rows, _ROWS),)](
            largest, total, target_logit, word, ignored, target_coef, loss, row_max, log_sum,
            rows, tiles, ROWS=_ROWS, TILES=_TILES, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip


def exponential_gradients(
    exponentials: Tensor,
    gradient: Tensor,
    largest: Tensor,
    target_logit: Tensor,
    word: Tensor,
    ignored: Tensor,
    target_coef: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    fill: Tensor | None,
    logit_scale: float,
    coefficient: Tensor,
    grad_logsumexp: Tensor | None,
) -> None:
    """Write the gradient of each row's loss with respect to the result of the product.

    ``exponentials`` and ``gradient`` ``[rows, width]`` are of one size, and may be one memory.
    ``coefficient`` ``[rows]``, 0 where the target is ignored, is the gradient with respect to the
    rows' losses, and ``grad_logsumexp`` that with respect to the log-sum-exps of all rows; None is
    0. Both may have any stride. ``fill`` ``[V]`` is NaN for all words but those that are masked,
    which get no gradient.
    """
    rows, width = exponentials.shape
    blocks = triton.cdiv(width, TILE_WORDS * _TILES)
    with on_device_of(exponentials):
        _gradient_kernel[(rows, blocks)](
            exponentials, gradient, exponentials.stride(0), largest, target_logit, word, ignored,
            target_coef, row_max, log_sum, fill, coefficient, coefficient.stride(0),
            grad_logsumexp, 0 if grad_logsumexp is None else grad_logsumexp.stride(0),
            rows, largest.size(0), width, 0 if fill is None else len(fill),
            LOGIT_SCALE=logit_scale,
            TILES=_TILES, WORDS=TILE_WORDS, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit
def _loss_kernel(
    largest_ptr, total_ptr, target_logit_ptr, word_ptr, ignored_ptr, target_coef_ptr,
    loss_ptr, row_max_ptr, log_sum_ptr, rows, tiles,
    ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    ignored = tl.load(ignored_ptr + row, mask=exists, other=0) != 0
    has_target = tl.load(word_ptr + row, mask=exists, other=-1) >= 0
    target_logit = tl.load(target_logit_ptr + row, mask=exists & has_target, other=-float("inf"))
    # Each lane has a sum of its own, relative to its own largest logit.
    lane_max = tl.full([TILES, ROWS], -3.4028234663852886e38, tl.float32)
    others = tl.zeros([TILES, ROWS], tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        inside = (tile < tiles)[:, None] & exists[None, :]
        place = tile[:, None] * rows + row[None, :]
        largest = tl.load(largest_ptr + place, mask=inside, other=-3.4028234663852886e38)
        total = tl.load(total_ptr + place, mask=inside, other=0)
        new_max = tl.maximum(lane_max, largest)
        others = others * tl.exp(lane_max - new_max) + total * tl.exp(largest - new_max)
        lane_max = new_max
    row_max = tl.maximum(tl.max(lane_max, 0), target_logit)
    total = tl.sum(others * tl.exp(lane_max - row_max[None, :]), 0)
    log_sum = log_of_sum(total, target_logit, row_max)
    nll = log_sum - (target_logit - row_max)
    nll = tl.where(has_target, nll, float("nan"))
    loss = tl.load(target_coef_ptr + row, mask=exists, other=0) * nll
    tl.store(loss_ptr + row, tl.where(ignored, 0, loss), mask=exists)
    tl.store(row_max_ptr + row, row_max, mask=exists)
    tl.store(log_sum_ptr + row, log_sum, mask=exists)


@triton.jit
def _gradient_kernel(
    exponentials_ptr, gradient_ptr, stride, largest_ptr, target_logit_ptr, word_ptr, ignored_ptr,
    target_coef_ptr, row_max_ptr, log_sum_ptr, fill_ptr, coefficient_ptr, coefficient_stride,
    grad_logsumexp_ptr, grad_logsumexp_stride, rows, tiles, width, vocab,
    LOGIT_SCALE: tl.constexpr, TILES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    column = tile[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    inside = column < width
    place = row.to(tl.int64) * stride + column  # rows times vocabulary may pass 2^31
    word = tl.load(word_ptr + row)
    dead = tl.load(ignored_ptr + row) != 0
    if grad_logsumexp_ptr is not None:
        dead = False
    if dead:
        zeros = tl.zeros([TILES, WORDS], gradient_ptr.dtype.element_ty)
        tl.store(gradient_ptr + place, zeros, mask=inside)
    else:
        exponential = tl.load(exponentials_ptr + place, mask=inside, other=0).to(tl.float32)
        largest = tl.load(largest_ptr + tile * rows + row, mask=tile < tiles, other=-float("inf"))
        row_max = tl.load(row_max_ptr + row)
        log_sum = tl.load(log_sum_ptr + row)
        nll = log_sum - (tl.load(target_logit_ptr + row) - row_max)
        share = tl.load(coefficient_ptr + row * coefficient_stride)
        share *= tl.load(target_coef_ptr + row)
        at_target = -share * one_minus_exp_of_minus(nll)
        if grad_logsumexp_ptr is not None:
            of_lse = tl.load(grad_logsumexp_ptr + row * grad_logsumexp_stride)
            at_target += of_lse * tl.exp(-nll)
            share += of_lse
        factor = LOGIT_SCALE * share * tl.exp(-log_sum) * 0.000030517578125
        gradient = exponential * (factor * tl.exp(largest - row_max))[:, None]
        gradient = tl.where(column == word, LOGIT_SCALE * at_target, gradient)
        if fill_ptr is not None:
            fill = tl.load(fill_ptr + column, mask=column < vocab, other=0)
            gradient = tl.where(fill == fill, 0, gradient)  # NaN is not
        tl.debug_barrier()
        tl.store(gradient_ptr + place, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)
