"""What one call of the op is given: its tensors, its options, and the dtypes that follow."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

_BY_ROW = ("coefficient", "logsumexp_coefficient", "z_loss")


def _wrong(what: str) -> ValueError:
    return ValueError(f"lmhead_pass: linear_cross_entropy {what}")


def _differ(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are known to be different: to ask a dynamic one would fix it."""
    return isinstance(a, int) and isinstance(b, int) and a != b


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
    """``[N]`` floating point: each row's loss is multiplied by this, for reduction "sum" only."""
    logsumexp_coefficient: Tensor | None
    """``[N]`` floating point: each row, ignored or not, adds this times its log-sum-exp to the
    loss, for reduction "sum" only."""
    z_loss: Tensor | None
    """``[N]`` floating point: the same with the square of its log-sum-exp."""
    fill: Tensor | None
    """``[V]`` floating point: what masked words have instead of their logits, after scale and
    softcap; NaN for words that are not masked."""
    reduction: str
    """``"mean"``, ``"sum"`` or ``"none"``."""
    ignore_index: int
    """Rows with this target count for nothing."""
    label_smoothing: float
    """In ``[0, 1]``."""
    logit_scale: float
    """The logits, with their bias, are multiplied by this. Not 0; 1 is off."""
    softcap: float | None
    """Positive: logits ``z`` become ``softcap * cap(z / softcap)``, after the scale."""
    softcap_kind: str
    """What ``cap`` is: ``"tanh"``, or ``"algebraic"``, which is ``x / sqrt(1 + x * x)``."""
    compute_dtype: torch.dtype
    """The dtype of the matrix products: under autocast it is not that of the tensors."""
    batch_chunk_size: int
    """At most this many rows of logits exist at once."""
    vocab_chunk_size: int | None = None
    """For so many words at a time the weight's gradient is computed; None: for all at once, with an
    FP32 sum of its size. Without label smoothing only (``kernels/by_words.py``)."""

    def __post_init__(self) -> None:
        self._check_options()
        self._check_tensors()
        given = [name for name in _BY_ROW if getattr(self, name) is not None]
        if given and self.reduction != "sum":
            raise _wrong(
                f"takes a {given[0]} for each row with reduction 'sum' only, not with "
                f"'{self.reduction}'"
            )

    def _check_options(self) -> None:
        """ValueError, with its name, for an option that means nothing."""
        rows, words = self.batch_chunk_size, self.vocab_chunk_size
        for name, takes, good in (
            ("reduction", "'mean', 'sum' or 'none'", self.reduction in ("mean", "sum", "none")),
            ("label_smoothing", "a number from 0 to 1", 0 <= self.label_smoothing <= 1),
            ("logit_scale", "a number other than 0", self.logit_scale != 0),
            ("softcap", "a positive number or None", self.softcap is None or self.softcap > 0),
            ("compute_dtype", "a floating dtype", self.compute_dtype.is_floating_point),
            # A dynamic number is not asked: that would fix it.
            ("batch_chunk_size", "at least 1 row", not isinstance(rows, int) or rows >= 1),
            ("vocab_chunk_size", "at least 1 word", not isinstance(words, int) or words >= 1),
            (
                "label_smoothing",
                "0 beside vocab_chunk_size",
                words is None or not self.label_smoothing,
            ),
        ):
            if not good:
                raise _wrong(f"takes {takes} as {name}, not {getattr(self, name)!r}")

    def _check_tensors(self) -> None:
        """ValueError, with its name, for a tensor of another shape or kind than the others'."""
        for name in ("hidden", "weight"):
            if getattr(self, name).dim() != 2:
                shape = list(getattr(self, name).shape)
                raise _wrong(f"takes a matrix as {name}, not a tensor of shape {shape}")
        (tokens, features), (words, of_weight) = self.hidden.shape, self.weight.shape
        if _differ(features, of_weight):
            raise _wrong(f"takes a weight of {features} columns, as hidden has, not {of_weight}")
        if self.target.dtype != torch.int64:
            raise _wrong(f"takes a target of torch.int64, not {self.target.dtype}")
        sizes = dict.fromkeys(("target", *_BY_ROW), (tokens, "row of hidden"))
        sizes |= dict.fromkeys(("bias", "class_weight"), (words, "row of weight"))
        for name, (size, of_what) in sizes.items():
            tensor = getattr(self, name)
            if tensor is not None and (tensor.dim() != 1 or _differ(tensor.size(0), size)):
                shape = list(tensor.shape)
                raise _wrong(f"takes one number for each {of_what} as {name}: {size}, not {shape}")

    @property
    def has_logsumexp_terms(self) -> bool:
        """Whether the loss is more than a cross entropy: terms of each row's log-sum-exp."""
        return self.logsumexp_coefficient is not None or self.z_loss is not None

    def logsumexp_terms(self, lse: Tensor) -> Tensor:
        """``[]``: the sum of these terms, for log-sum-exps ``lse`` ``[N]``."""
        total = lse.new_zeros(())
        for factor, value in ((self.logsumexp_coefficient, lse), (self.z_loss, lse * lse)):
            if factor is not None:
                # A row with factor 0 counts for nothing, even if its log-sum-exp is infinite.
                total = total + (factor.to(lse.dtype) * value).masked_fill(factor == 0, 0).sum()
        return total

    def grad_logsumexp(self, lse: Tensor, rows: Tensor | slice) -> Tensor:
        """The gradient of that sum with respect to the log-sum-exps ``lse`` of the ``rows``."""
        gradient = torch.zeros_like(lse)
        if self.logsumexp_coefficient is not None:
            gradient += self.logsumexp_coefficient[rows]
        if self.z_loss is not None:
            gradient += 2 * self.z_loss[rows].to(lse.dtype) * lse
        return gradient

    def logsumexp_grad_bound(self) -> Tensor:
        """``[N]``: bounds on these gradients, from what is known before any product.

        A log-sum-exp exceeds the largest logit by at most the log of the number of words. Without
        the bias, a logit is no larger than the product of the norms of its rows of hidden and
        weight (Cauchy-Schwarz). Of the bias only the element that makes logits largest counts:
        others may be -inf.
        """
        dtype = self.accumulate_dtype
        bound = torch.zeros(len(self.hidden), dtype=dtype, device=self.hidden.device)
        if self.logsumexp_coefficient is not None:
            bound += self.logsumexp_coefficient.abs()
        if self.z_loss is not None:
            of_words = torch.linalg.vector_norm(self.compute_weight, dim=1, dtype=dtype)
            of_rows = torch.linalg.vector_norm(self.hidden, dim=1, dtype=dtype)
            largest = of_rows * of_words.amax()
            if self.bias is not None:
                bias = self.bias.to(dtype)
                largest += (bias.amax() if self.logit_scale > 0 else bias.amin()).abs()
            largest *= abs(self.logit_scale)
            if self.softcap is not None:
                largest.clamp_(max=self.softcap)
            if self.fill is not None:  # what is low raises no log-sum-exp
                largest.clamp_(min=self.fill.to(dtype).nan_to_num(-math.inf).amax())
            z_loss = self.z_loss.to(dtype).abs()
            of_square = 2 * z_loss * (largest + math.log(len(self.weight)))
            bound += of_square.masked_fill(z_loss == 0, 0)
        return bound

    @property
    def has_narrow_range(self) -> bool:
        """Whether gradients of logits fit into the compute dtype only if they are scaled."""
        return self.compute_dtype == torch.float16

    @property
    def accumulate_dtype(self) -> torch.dtype:
        """The dtype of the softmax and of every sum."""
        return torch.promote_types(self.compute_dtype, torch.float32)

    @cached_property
    def compute_weight(self) -> Tensor:
        """``weight`` in the compute dtype: under autocast a copy that lives for this call only."""
        return self.weight.to(self.compute_dtype)

    @cached_property
    def masked(self) -> tuple[Tensor, Tensor] | None:
        """``[K]``, ``[K]``: the masked words, and their logits in the accumulation dtype."""
        if self.fill is None:
            return None
        words = (~self.fill.isnan()).nonzero().squeeze(1)
        return words, self.fill[words].to(self.accumulate_dtype)

    def inputs_with_gradient(self, needed: Sequence[bool]) -> list[Tensor | None]:
        """Hidden, weight and bias; None for those that have no gradient or need none."""
        inputs = (self.hidden, self.weight, self.bias)
        return [tensor if wanted else None for tensor, wanted in zip(inputs, needed, strict=True)]


class Gradients(NamedTuple):
    """Gradients of the three differentiable inputs; an empty tensor where none is needed."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor


class Pending(NamedTuple):
    """What the gradient of the weight still lacks: ``grad_logits.T @ hidden``, of the last chunk.

    The gradient is the sum of that and of ``Gradients.weight``, divided by ``scale``. That sum is
    ``[V, H]``, or ``[2, H]`` zeros if there is no other chunk. Where nothing is lacking, all three
    are empty.
    """

    grad_logits: Tensor
    """``[rows, >= V]`` in the compute dtype. What is behind the words is undefined."""
    hidden: Tensor
    """``[rows, H]`` in the compute dtype."""
    scale: Tensor
    """``[]`` FP32."""

    @property
    def is_needed(self) -> bool:
        """Whether anything is lacking."""
        return self.grad_logits.dim() == 2


def nothing_pending(problem: Problem) -> Pending:
    """Of a weight whose gradient lacks nothing."""
    return Pending(*(problem.hidden.new_empty(0) for _ in Pending._fields))


def held_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a gradient waits for the upstream gradient.

    FP16 has too little range for that: gradients of a mean over thousands of tokens underflow
    in it before a loss scale is applied.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def padded_width(vocab: int, dtype: torch.dtype) -> int:
    """The width of a GPU's buffers for ``[rows, vocab]``: each row starts at 128 bytes' alignment.

    Only so do products and kernels read and write 16 bytes at once, whatever the vocabulary.
    """
    step = 128 // dtype.itemsize
    return (vocab + step - 1) // step * step
