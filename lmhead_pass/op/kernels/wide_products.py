"""The library's matrix products, as a GPU does them well.

CUDA (and ROCm) multiply BF16 and FP16 into FP32 (``out_dtype``), which does not round the sum that
the hardware formed, and can add it to the output. Whether a device can do that is the only
difference between vendors that the GPU path has to know.

Where a size is no multiple of 8, the library's kernels for 16-bit operands are several times slower
(50257 words: 99 to 131 TFLOP/s instead of 700 on an H200), even if each row starts where it should.
Then the bulk and the rest are two products.
"""

import functools

import torch
from torch import Tensor

from ...compat.kernels import has_kernel

_MULTIPLE = 8


def multiply_into(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """``out = a @ b``, or ``out += a @ b`` if ``add``.

    The sums are in the dtype of ``out`` if it is the wider one.

    ``a`` ``[m, k]`` and ``b`` ``[k, n]`` have one dtype; ``out`` is ``[m, n]`` in rows of any
    stride. FP32 operands follow the user's TF32 settings.
    """
    if a.dtype.itemsize < torch.float32.itemsize and not _widens(out.device.type):
        # As exact, at the price of wide copies. On a CPU these copies also keep BF16 products from
        # reading memory behind the rows of a strided matrix.
        a, b = a.float(), b.float()
    if a.dtype.itemsize < torch.float32.itemsize and all(map(_has_even_rows, (out, a, b))):
        _multiply_in_parts(out, a, b, add)
    else:
        _multiply(out, a, b, add)


def _multiply_in_parts(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """By bulk and rest of ``n``, of ``m`` where that lies along the rows of ``a``, and of ``k``."""
    (m, k), n = a.shape, b.size(1)
    if bulk := _bulk(n):
        for columns in (slice(bulk), slice(bulk, n)):
            _multiply_in_parts(out[:, columns], a, b[:, columns], add)
    elif a.stride(0) == 1 and (bulk := _bulk(m)):
        for rows in (slice(bulk), slice(bulk, m)):
            _multiply_in_parts(out[rows], a[rows], b, add)
    elif bulk := _bulk(k):
        # The sum of both parts is rounded once.
        dtype = torch.promote_types(out.dtype, torch.float32)
        total = out if out.dtype == dtype else out.new_empty(out.shape, dtype=dtype)
        _multiply(total, a[:, :bulk], b[:bulk], add)
        _multiply(total, a[:, bulk:], b[bulk:], add=True)
        if total is not out:
            out.copy_(total)
    else:
        _multiply(out, a, b, add)


def _bulk(size: int) -> int:
    """What a product takes at full speed, where that is not all; otherwise 0."""
    return size // _MULTIPLE * _MULTIPLE if size % _MULTIPLE else 0


def _has_even_rows(matrix: Tensor) -> bool:
    return max(matrix.stride()) % _MULTIPLE == 0


def _multiply(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=int(add), out=out)
    elif out.dtype.itemsize > a.dtype.itemsize:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=int(add), out=out)
    else:
        assert not add, "a sum is not held in fewer bits than its terms"
        # FP16 gradients are scaled so that their sums may be too large for FP16, and not for BF16.
        out.copy_(torch.mm(a, b, out_dtype=torch.float32) if a.dtype == torch.float16 else a @ b)


@functools.cache
def _widens(device_type: str) -> bool:
    return has_kernel("aten::addmm.dtype_out", device_type)
