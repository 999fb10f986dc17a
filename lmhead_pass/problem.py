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
    logsumexp_coefficient: Tensor | None
    """``[N]`` floating point: each row, ignored or not, adds to the loss its log-sum-exp times
    this, for reduction "sum" only."""
    z_loss: Tensor | None
    """``[N]`` floating point: the same for the square of its log-sum-exp. Not with FP16 products:
    how far gradients reach would not be known before."""
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
        by_row = ("coefficient", "logsumexp_coefficient", "z_loss")
        given = [name for name in by_row if getattr(self, name) is not None]
        if given and self.reduction != "sum":
            raise ValueError(
                f"lmhead_pass: linear_cross_entropy takes a {given[0]} for each row with reduction "
                f"'sum' only, not with '{self.reduction}'"
            )
        if self.z_loss is not None and self.compute_dtype == torch.float16:
            raise ValueError("lmhead_pass: linear_cross_entropy takes no z_loss in torch.float16")

    @property
    def has_logsumexp_terms(self) -> bool:
        """Whether the loss has terms of each row's log-sum-exp, beside its cross entropy."""
        return self.logsumexp_coefficient is not None or self.z_loss is not None

    def logsumexp_terms(self, lse: Tensor) -> Tensor:
        """``[]``: the sum of these terms, for log-sum-exps ``[N]``."""
        total = lse.new_zeros(())
        for factor, value in ((self.logsumexp_coefficient, lse), (self.z_loss, lse * lse)):
            if factor is not None:
                # As with the coefficient: a row that counts for nothing may have any log-sum-exp.
                total = total + (factor.to(lse.dtype) * value).masked_fill(factor == 0, 0).sum()
        return total

    def grad_logsumexp(self, lse: Tensor, rows: Tensor | slice) -> Tensor:
        """The gradient of that sum with respect to the log-sum-exps ``lse`` of the ``rows``."""
        gradient = torch.zeros_like(lse)
        if self.logsumexp_coefficient is not None:
            gradient += self.logsumexp_coefficient[rows]
        if self.z_loss is not None:
            z_loss = self.z_loss[rows].to(lse.dtype)
            gradient += (2 * z_loss * lse).masked_fill(z_loss == 0, 0)
        return gradient

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
