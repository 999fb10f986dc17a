"""Rows that are picked by a mask: ``logits[mask]``."""

from typing import Any

import torch
from torch import Tensor


def by_numbers(logits: Any, index: Any) -> Any:
    """``logits[index]`` by the numbers of rows, if ``index`` starts with a mask of rows; else
    NotImplemented.

    How many a mask picks is known from its values alone, and a function that is given numbers is
    known by the form of these.
    """
    mask, *others = index if isinstance(index, tuple) else (index,)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        return NotImplemented
    dims = mask.dim()
    if not 0 < dims < logits.dim() or mask.shape != logits.shape[:dims]:
        return NotImplemented
    (numbers,) = mask.flatten().nonzero(as_tuple=True)
    return logits.flatten(0, dims - 1)[(numbers, *others)]
