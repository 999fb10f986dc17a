"""Matrix products whose result is wider than their operands, where the device has them.

CUDA (and ROCm) multiply BF16 and FP16 into FP32 (``out_dtype``), which does not round the sum that
the hardware formed, and can add it to the output. Whether a device can do that is the only
difference between vendors that the GPU path has to know.
"""

import functools

import torch
from torch import Tensor

from ...compat.kernels import has_kernel


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
