"""Sums of per-row numbers, each times a weight that is known before the numbers are.

The gradient of such a sum can be computed together with its value, in the forward.
"""

from .linear_ops import emit_again
from .linear_reduction import can_be_made_behind, emit_weights, sums, weighted_sum
from .types import LinearReduction

__all__ = [
    "LinearReduction",
    "can_be_made_behind",
    "emit_again",
    "emit_weights",
    "sums",
    "weighted_sum",
]
