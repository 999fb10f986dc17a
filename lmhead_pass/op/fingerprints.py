"""``torch.ops.lmhead_pass.fingerprint``: numbers that change when the contents of tensors do.

``Tensor._version`` would be cheaper, but fused optimizers and writes through ``.data`` do not count
it up, and a step that changes nothing (at a learning rate of 0) does. Here the tensor's bits, as
64-bit integers, are multiplied by numbers for their columns and rows and summed: it is read once
and never copied. The order of such a sum does not matter, so the number never differs while the
contents are the same, and ATen's is Triton's. That a change goes unseen, or that values change
places unseen, takes a coincidence of 64 bits.
"""

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..compat.library import add_fake_kernel, define
from .kernels.compiled_blocks import run_compiled
from .kernels.dispatch import runs_triton

# Elements at a time: products of so many stay in the cache. Compiled code holds none.
_BLOCK = 1 << 16
_COMPILED_BLOCK = 1 << 18
_WORTH_COMPILING = 1 << 22

# Bits of the golden ratio: multiplied by them, numbers that follow each other come far apart.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensors: Sequence[Tensor]) -> Tensor:
    """``[len(tensors)]`` int64, on the device of the first; waits for no device."""
    return cast(Tensor, torch.ops.lmhead_pass.fingerprint(list(tensors)))


def _fingerprint(tensors: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.stack([_of_one(as_integers(tensor.detach())) for tensor in tensors])


def _of_one(bits: Tensor) -> Tensor:
    """``[]`` int64: each element times a number for its column and one for its row, summed."""
    if runs_triton(bits.device.type):
        from .kernels.triton_fingerprint import fingerprint_of

        return fingerprint_of(bits)
    weights = _held_weights if bits.is_cpu else _weights
    rows, columns = (weights(size, bits.device) for size in bits.shape)
    size = bits.size(1)
    if not bits.is_cpu or len(bits) * size <= _BLOCK:
        return _of_block(bits, rows, columns)[0]
    compiled = len(bits) * size >= _WORTH_COMPILING
    step = max(1, (_COMPILED_BLOCK if compiled else _BLOCK) // size)
    sums: list[Any] = []
    for block in zip(torch.split(bits, step), torch.split(rows, step), strict=True):
        is_whole = compiled and len(block[0]) == step
        given = (*block, columns)
        sums += run_compiled(_of_block, given) if is_whole else _of_block(*given)
    return torch.stack(sums).sum()


def _of_block(bits: Tensor, rows: Tensor, columns: Tensor) -> list[Tensor]:
    products = bits * columns
    # Else two flips of highest bits would cancel out, whatever they are multiplied by.
    products ^= products >> 32
    return [(products.sum(1) * rows).sum()]


def _weights(size: int, device: torch.device) -> Tensor:
    """``[size]`` odd numbers, so that every change of one element shows, each another one."""
    numbers = torch.arange(1, size + 1, device=device)
    mixed = (numbers ^ numbers << 13) * _GOLDEN
    return (mixed ^ mixed >> 29) * _GOLDEN | 1


_held_weights = functools.lru_cache(maxsize=16)(_weights)


def as_integers(tensor: Tensor) -> Tensor:
    """The same memory as a contiguous matrix of integers, of 64 bits if they divide its rows."""
    if tensor.dim() == 2 and tensor.stride(0) == 1:
        tensor = tensor.t()
    tensor = tensor.contiguous()
    matrix = tensor.reshape(-1, tensor.size(-1)) if tensor.dim() else tensor.reshape(1, 1)
    if matrix.size(1) * matrix.element_size() % 8 == 0 and matrix.data_ptr() % 8 == 0:
        return matrix.view(torch.int64)
    return matrix.view(_INTEGERS[matrix.element_size()])


define("fingerprint(Tensor[] tensors) -> Tensor", _fingerprint)
add_fake_kernel(
    "fingerprint", lambda tensors: tensors[0].new_empty([len(tensors)], dtype=torch.int64)
)
