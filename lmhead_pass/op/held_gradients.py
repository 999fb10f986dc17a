"""Gradients that the forward has computed, times the gradient that the backward is given."""

import torch
from torch import Tensor

from ..compat.compiling import is_saved_for_once

# So many elements are scaled in one step.
_AT_ONCE = 1 << 18


def scaled(gradient: Tensor, factor: Tensor, are_hooked: bool) -> Tensor:
    """``gradient * factor``, in the memory of ``gradient`` where nobody else has it or reads it
    again: the weight's is large.

    ``are_hooked`` if hooks have seen what autograd saved.
    """
    if are_hooked or not is_saved_for_once(factor) or gradient.dim() == 0:
        return _product(gradient, factor)
    rows = max(1, _AT_ONCE * len(gradient) // max(1, gradient.numel()))
    for part in torch.split(gradient, rows):
        part.copy_(_product(part, factor))
    return gradient


def _product(gradient: Tensor, factor: Tensor) -> Tensor:
    # In a narrower dtype the product would round the factor first: a loss divided by 3 would
    # give BF16 gradients that are all off by the same part in 800.
    return gradient.to(factor.dtype) * factor
