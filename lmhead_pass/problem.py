"""What one call of the op is asked: its tensors, its options, and the dtypes that follow."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """Arguments of one linear cross entropy, as the op's schema names them."""

    hidden: Tensor
    """``[N, H]`` floating point: one row per token."""
    weight: Tensor
    """``[V, H]`` floating point: one row per word of the vocabulary."""
    bias: Tensor | None
    """``[V]`` floating point."""
    target: Tensor
    """``[N]`` int64: class indices in ``[0, V)``, or ``ignore_index``."""
    class_weight: Tensor | None
    """``[V]`` floating point: the ``weight`` argument of ``cross_entropy``."""
    coefficient: Tensor | None
    """``[N]`` floating point: what each row's loss is multiplied by, for reduction "sum" only."""
    reduction: str
    """``"mean"``, ``"sum"`` or ``"none"``."""
    ignore_index: int
    """Rows with this target count for nothing."""
    label_smoothing: float
    """In ``[0, 1]``."""
    logit_scale: float
    """What logits are multiplied by, bias and all. Not 0; 1 is off."""
    softcap: float | None
    """Positive: logits ``z`` become ``softcap * tanh(z / softcap)``, after the scale."""
    compute_dtype: torch.dtype
    """The dtype of the matrix products: under autocast it is not that of the tensors."""
    batch_chunk_size: int
    """At most this many rows of logits exist at once."""

    def __post_init__(self) -> None:
        if self.coefficient is not None and self.reduction != "sum":
            raise ValueError(
                "lmhead_pass: linear_cross_entropy takes a coefficient for each row with reduction "
                f"'sum' only, not with '{self.reduction}'"
            )

    @property
    def accumulate_dtype(self) -> torch.dtype:
        """The dtype of the softmax and of every sum."""
        return torch.promote_types(self.compute_dtype, torch.float32)

    @cached_property
    def compute_weight(self) -> Tensor:
        """``weight`` in the compute dtype: under autocast a copy that lives for this call only."""
        return self.weight.to(self.compute_dtype)


class Gradients(NamedTuple):
    """Gradients of the three differentiable inputs; an empty tensor where none is needed."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor


def held_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a gradient waits for the upstream gradient.

    FP16 has too little range for that: before a loss scale is applied, gradients of a mean
    over thousands of tokens underflow in it.
    """
    return torch.float32 if dtype == torch.float16 else dtype
