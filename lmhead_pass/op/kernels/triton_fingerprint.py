"""A Triton kernel for the fingerprint of a tensor: ``op/fingerprints.py`` says what that is.

One program works on some rows, and leaves one number.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_device import on_device_of

_ROWS = 8
_COLUMNS = 256


def fingerprint_of(bits: Tensor) -> Tensor:
    """``[]`` int64, of a contiguous matrix of integers."""
    rows, columns = bits.shape
    programs = triton.cdiv(rows, _ROWS)
    sums = bits.new_empty(programs, dtype=torch.int64)
    if programs:
        with on_device_of(bits):
            _kernel[(programs,)](bits, sums, rows, columns, ROWS=_ROWS, COLUMNS=_COLUMNS)
    return sums.sum()


@triton.jit
def _kernel(bits_ptr, sums_ptr, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = bits_ptr + row[:, None] * columns
    total = tl.zeros([ROWS, COLUMNS], tl.int64)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        bits = tl.load(place + column[None, :], mask=inside, other=0).to(tl.int64)
        products = bits * _weight(column)[None, :]
        total += products ^ (products >> 32)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(tl.sum(total, 1) * _weight(row)))


@triton.jit
def _weight(place):
    number = place.to(tl.int64) + 1
    # Bits of the golden ratio, 0x9E3779B97F4A7C15, as a number with a sign.
    golden = tl.full([], -7046029254386353131, tl.int64)
    mixed = (number ^ (number << 13)) * golden
    return ((mixed ^ (mixed >> 29)) * golden) | 1
