"""Triton kernels for two of the three matrix products, with this op's work done on their results.

``exponentials`` is the product that gives the logits. They are never written: each tile of
``TILE_ROWS`` x ``TILE_WORDS`` logits leaves, for each of its rows, its largest logit ``m``, the sum
of ``exp(z - m)``, and these exponentials themselves in FP16, times 2^15. So

    z = s (hidden @ weight.T + b)          bias b, logit scale s; each may be off
    z = fill                               for masked words
    exponential = 2^15 exp(z - m)          in (0, 2^15]

The words of the targets are left out of all three: of a confident row the other words alone say how
far its loss is from 0. ``target_logits`` computes the logits of the targets apart, in FP32. FP16
keeps 11 bits of what is within e^-20 of the largest of the tile's row, and rounds the rest to
multiples of 2^-39 of it.

``weight_gradient`` is the product that gives the gradient of the weight. It adds the sum of earlier
chunks to it, multiplies by the gradient from upstream, and rounds once.

Both products run one program on each multiprocessor, which works on tile after tile, so that the
loads for the next tile go on while a result is finished. What is done on a result has no branch:
with one, Triton 3.6 no longer does that, and the product takes a quarter longer.
"""

# The arguments of a kernel are values of Triton's own language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..problem import padded_width
from .triton_device import on_device_of

TILE_ROWS, TILE_WORDS = 128, 256
_TILE_HIDDEN = 256
_DEPTH = 64
# So many rows of tiles are worked on side by side, so that they read the other operand together.
_GROUP = 8
_OPTIONS = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}
# Descriptors of the tensor memory access unit take bases and strides of multiples of this.
_ALIGNMENT_BYTES = 16


def exponentials(
    hidden: Tensor,
    weight: Tensor,
    word: Tensor,
    bias: Tensor | None,
    fill: Tensor | None,
    logit_scale: float,
    largest: Tensor,
    total: Tensor,
    out: Tensor | None,
) -> None:
    """Write what the tiles of the logits of ``hidden`` leave (see the module's text).

    ``hidden`` ``[rows, H]`` and ``weight`` ``[V, H]`` are BF16 or FP16, ``H`` a multiple of 8.
    ``word`` ``[rows]`` int32 is each row's target, or -1. ``bias`` and ``fill`` ``[V]`` are
    contiguous; ``fill`` is NaN for words that are not masked.
    ``largest`` and ``total`` ``[tiles, rows]`` are FP32 and contiguous. ``out`` ``[rows, >= V]``
    FP16 gets the exponentials, unless it is None.
    """
    (rows, depth), vocab = hidden.shape, weight.size(0)
    is_transposed = weight.stride(1) != 1 and weight.stride(0) == 1
    if is_transposed:
        described = _operand(weight.t(), [_DEPTH, TILE_WORDS])
    else:
        described = _operand(weight, [TILE_WORDS, _DEPTH])
    programs = _programs(hidden, triton.cdiv(rows, TILE_ROWS) * triton.cdiv(vocab, TILE_WORDS))
    with on_device_of(hidden):
        _exponentials_kernel[(programs,)](
            _operand(hidden, [TILE_ROWS, _DEPTH]), described,
            None if out is None else _descriptor(out[:, :vocab], [TILE_ROWS, TILE_WORDS // 2]),
            word, bias, fill, largest, total, rows, vocab, depth,
            LOGIT_SCALE=None if logit_scale == 1 else logit_scale, IS_TRANSPOSED=is_transposed,
            PROGRAMS=programs, GROUP=_GROUP,
            ROWS=TILE_ROWS, WORDS=TILE_WORDS, DEPTH=_DEPTH, **_OPTIONS,
        )  # fmt: skip


def target_logits(
    hidden: Tensor,
    weight: Tensor,
    word: Tensor,
    bias: Tensor | None,
    fill: Tensor | None,
    logit_scale: float,
    out: Tensor,
) -> None:
    """Write the logit of each row's ``word`` to ``out`` ``[rows]`` FP32; 0 where that is -1.

    All others are as for ``exponentials``, but of any strides.
    """
    rows, depth = hidden.shape
    with on_device_of(hidden):
        _target_logits_kernel[(rows,)](
            hidden, *hidden.stride(), weight, *weight.stride(), word, bias, fill, out, depth,
            LOGIT_SCALE=None if logit_scale == 1 else logit_scale, COLUMNS=1024, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip


def weight_gradient(
    grad_logits: Tensor,
    hidden: Tensor,
    total: Tensor | None,
    factor: Tensor,
    out: Tensor,
) -> None:
    """``out = factor * (grad_logits.T @ hidden + total)``, in FP32 until it is rounded.

    ``grad_logits`` ``[rows, V]`` and ``hidden`` ``[rows, H]`` are BF16 or FP16. ``total`` is
    ``[V, H]`` FP32 and contiguous; None is 0. ``factor`` ``[]`` is FP32. ``out`` is ``[V, H]``.
    """
    (rows, vocab), size = grad_logits.shape, hidden.size(1)
    programs = _programs(hidden, triton.cdiv(vocab, TILE_ROWS) * triton.cdiv(size, _TILE_HIDDEN))
    with on_device_of(hidden):
        _weight_gradient_kernel[(programs,)](
            _operand(grad_logits, [_DEPTH, TILE_ROWS]),
            _operand(hidden, [_DEPTH, _TILE_HIDDEN]),
            total, factor, _descriptor(out, [TILE_ROWS, _TILE_HIDDEN // 4]),
            rows, vocab, size, PROGRAMS=programs, GROUP=_GROUP,
            WORDS=TILE_ROWS, HIDDEN=_TILE_HIDDEN, DEPTH=_DEPTH, **_OPTIONS,
        )  # fmt: skip


def _operand(matrix: Tensor, block: list[int]) -> TensorDescriptor:
    if matrix.device.type == "cpu":
        matrix = matrix.float()  # Triton's interpreter multiplies BF16 as if it were integers
    step = _ALIGNMENT_BYTES // matrix.dtype.itemsize
    if matrix.stride(1) != 1 or matrix.stride(0) % step or matrix.data_ptr() % _ALIGNMENT_BYTES:
        columns = matrix.size(1)
        copy = matrix.new_empty(len(matrix), padded_width(columns, matrix.dtype))[:, :columns]
        matrix = copy.copy_(matrix)
    return _descriptor(matrix, block)


def _descriptor(matrix: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block)


def _programs(tensor: Tensor, tiles: int) -> int:
    if tensor.device.type == "cpu":  # in Triton's interpreter
        return min(tiles, 2)
    return min(tiles, _multiprocessors(tensor.device.index))


@functools.cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


@triton.jit
def _exponentials_kernel(
    hidden, weight, out, word_ptr, bias_ptr, fill_ptr, largest_ptr, total_ptr,
    rows, vocab, depth,
    LOGIT_SCALE: tl.constexpr, IS_TRANSPOSED: tl.constexpr, PROGRAMS: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(vocab, WORDS)
    for tile in tl.range(tl.program_id(0), down * across, PROGRAMS, flatten=True):
        i, j = _place(tile, down, across, GROUP)
        logits = tl.zeros([ROWS, WORDS], tl.float32)
        for k in range(0, tl.cdiv(depth, DEPTH)):
            a = hidden.load([i * ROWS, k * DEPTH])
            if IS_TRANSPOSED:
                b = weight.load([k * DEPTH, j * WORDS])
            else:
                b = weight.load([j * WORDS, k * DEPTH]).T
            logits = tl.dot(a, b, logits)

        row = i * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, WORDS)
        if bias_ptr is not None:
            of_word = j * WORDS + column
            logits += tl.load(bias_ptr + of_word, mask=of_word < vocab, other=0).to(tl.float32)[
                None, :
            ]
        if LOGIT_SCALE is not None:
            logits *= LOGIT_SCALE
        if fill_ptr is not None:
            of_word = j * WORDS + column
            fill = tl.load(fill_ptr + of_word, mask=of_word < vocab, other=0).to(tl.float32)
            logits = tl.where((fill == fill)[None, :], fill[None, :], logits)  # NaN is not
        target = tl.load(word_ptr + row, mask=row < rows, other=-1) - j * WORDS
        is_other = column[None, :] != target[:, None]
        logits = tl.where(is_other, logits, -float("inf"))
        logits = tl.where(column[None, :] < vocab - j * WORDS, logits, -float("inf"))
        # The smallest number, not -inf: then -inf less the largest is -inf and never NaN.
        largest = tl.maximum(tl.max(logits, 1), -3.4028234663852886e38)
        exponential = tl.exp2((logits - largest[:, None]) * 1.4426950408889634 + 15)
        place = j * rows + row
        tl.store(largest_ptr + place, largest, mask=row < rows)
        tl.store(total_ptr + place, tl.sum(exponential, 1) * 0.000030517578125, mask=row < rows)
        if out is not None:
            left, right = _halves(exponential.to(tl.float16), ROWS, WORDS)
            out.store([i * ROWS, j * WORDS], left)
            out.store([i * ROWS, j * WORDS + WORDS // 2], right)


@triton.jit
def _target_logits_kernel(
    hidden_ptr, hidden_stride, hidden_step, weight_ptr, weight_stride, weight_step, word_ptr,
    bias_ptr, fill_ptr, out_ptr, depth, LOGIT_SCALE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    word = tl.load(word_ptr + row).to(tl.int64)
    products = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, depth, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < tl.where(word >= 0, depth, 0)
        of_hidden = hidden_ptr + row * hidden_stride + column * hidden_step
        of_weight = weight_ptr + word * weight_stride + column.to(tl.int64) * weight_step
        a = tl.load(of_hidden, mask=inside, other=0).to(tl.float32)
        products += a * tl.load(of_weight, mask=inside, other=0).to(tl.float32)
    logit = tl.sum(products)
    if bias_ptr is not None:
        logit += tl.load(bias_ptr + word, mask=word >= 0, other=0).to(tl.float32)
    if LOGIT_SCALE is not None:
        logit *= LOGIT_SCALE
    if fill_ptr is not None:
        nan = float("nan")
        fill = tl.load(fill_ptr + word, mask=word >= 0, other=nan).to(tl.float32)
        logit = tl.where(fill == fill, fill, logit)  # NaN is not
    tl.store(out_ptr + row, logit)


@triton.jit
def _weight_gradient_kernel(
    grad_logits, hidden, total_ptr, factor_ptr, out, rows, vocab, size,
    PROGRAMS: tl.constexpr, GROUP: tl.constexpr,
    WORDS: tl.constexpr, HIDDEN: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    down, across = tl.cdiv(vocab, WORDS), tl.cdiv(size, HIDDEN)
    factor = tl.load(factor_ptr)
    for tile in tl.range(tl.program_id(0), down * across, PROGRAMS, flatten=True):
        i, j = _place(tile, down, across, GROUP)
        gradient = tl.zeros([WORDS, HIDDEN], tl.float32)
        for k in range(0, tl.cdiv(rows, DEPTH)):
            a = grad_logits.load([k * DEPTH, i * WORDS]).T
            b = hidden.load([k * DEPTH, j * HIDDEN])
            gradient = tl.dot(a, b, gradient)

        word = i * WORDS + tl.arange(0, WORDS)
        left, right = _halves(gradient, WORDS, HIDDEN)
        quarters = _halves(left, WORDS, HIDDEN // 2) + _halves(right, WORDS, HIDDEN // 2)
        for quarter in tl.static_range(4):
            part = quarters[quarter]
            start = j * HIDDEN + quarter * (HIDDEN // 4)
            if total_ptr is not None:
                column = start + tl.arange(0, HIDDEN // 4)
                place = word[:, None].to(tl.int64) * size + column[None, :]
                inside = (word[:, None] < vocab) & (column[None, :] < size)
                part += tl.load(total_ptr + place, mask=inside, other=0)
            out.store([i * WORDS, start], (factor * part).to(out.dtype))


@triton.jit
def _place(tile, down, across, GROUP: tl.constexpr):
    """Row and column of a tile: ``GROUP`` rows of tiles from left to right, then the next."""
    first = tile // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    within = tile % (GROUP * across)
    return first + within % height, within // height


@triton.jit
def _halves(matrix, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Its left and its right half: what is stored at once lies in shared memory."""
    return tl.split(tl.permute(tl.reshape(matrix, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
