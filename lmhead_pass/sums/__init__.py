"""Sums of per-row numbers, each times a weight that is known before the numbers are.

The gradient of such a sum can be computed together with its value, in the forward.
``meeting_points`` finds the single numbers through which all gradients pass, ``linear_reduction``
those that are such sums, with a graph that computes their weights.
"""

from .linear_reduction import LinearReduction, can_be_made_behind, emit_weights, sums

__all__ = ["LinearReduction", "can_be_made_behind", "emit_weights", "sums"]
