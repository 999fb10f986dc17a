"""Functions of numbers, for the row kernels.

Not every backend of Triton has log1p, expm1 and tanh. They are computed from exp and log where that
loses no digits, and near 0 from series that are long enough for FP64.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def log_of_sum(others, target_logit, row_max):
    """log(sum_v exp(z_v - row_max)), of the ``others``' sum of such exponentials and the target."""
    # The sum of all exponentials less 1. If the target has the largest logit, its own is this 1,
    # and is never added.
    confident = target_logit == row_max
    excess = tl.where(confident, others, (others - 1) + tl.exp(target_logit - row_max))
    return log1p(excess)


@triton.jit
def log1p(x):
    # log(1 + x) = 2 artanh(s) = 2 (s + s^3 / 3 + s^5 / 5 + ...)
    s = x / (2 + x)
    series = tl.full([], 1 / 23, x.dtype)
    for power in tl.static_range(21, 0, -2):
        series = series * s * s + 1 / power
    return tl.where(tl.abs(x) < 0.5, 2 * s * series, tl.log(1 + x))


@triton.jit
def one_minus_exp_of_minus(x):
    # x (1 - x / 2 (1 - x / 3 (1 - ...)))
    series = tl.full([], 1, x.dtype)
    for order in tl.static_range(15, 1, -1):
        series = 1 - x / order * series
    return tl.where(tl.abs(x) < 0.5, x * series, 1 - tl.exp(-x))


@triton.jit
def tanh_and_slope(x):
    """tanh(x) and its derivative, with one reciprocal."""
    e = tl.exp(-2 * tl.abs(x))
    is_near = tl.abs(x) < 0.5
    # Lambert's continued fraction to its seventh level.
    s = x * x
    near = x * (135135 + s * (17325 + s * (378 + s)))
    near_below = 135135 + s * (62370 + s * (3150 + s * 28))
    reciprocal = 1 / tl.where(is_near, near_below, 1 + e)
    tanh = tl.where(is_near, near, tl.where(x < 0, e - 1, 1 - e)) * reciprocal
    # Not 1 - tanh^2 where tanh is close to 1: that loses nearly all digits.
    return tanh, tl.where(is_near, 1 - tanh * tanh, 4 * e * reciprocal * reciprocal)
