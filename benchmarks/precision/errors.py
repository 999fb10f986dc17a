"""The exact loss and gradients, and how far others are from them."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import Case, Inputs


class Results(NamedTuple):
    """The loss ``[]``, and its gradients with respect to ``Inputs``, in their shapes."""

    loss: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor


def exact(inputs: Inputs) -> Results:
    """The mean loss and its gradients in FP64, a few rows at a time.

    Where ``p`` is nearly 1, FP64 too has few digits of ``p - 1`` left: the gradient of a target's
    logit is taken for the negative of the sum of the others' instead.
    """
    hidden, weight, bias = (leaf.detach().double() for leaf in inputs[:3])
    results = Results(weight.new_zeros(()), *map(torch.zeros_like, (hidden, weight, bias)))
    for rows in torch.arange(len(hidden)).split(256):
        target = inputs.target[rows].unsqueeze(1)
        logits = F.linear(hidden[rows], weight, bias)
        grad_logits = logits.softmax(1).scatter(1, target, 0)
        others = grad_logits.sum(1, keepdim=True)
        nll = logits.logsumexp(1, keepdim=True) - logits.gather(1, target)
        nll = torch.where(others < 0.5, -torch.log1p(-others), nll)
        grad_logits = grad_logits.scatter(1, target, -others) / len(hidden)
        results.loss.add_(nll.sum() / len(hidden))
        results.hidden[rows] = grad_logits @ weight
        results.weight.addmm_(grad_logits.t(), hidden[rows])
        results.bias.add_(grad_logits.sum(0))
    return results


def errors(
    case: Case, results: Results, exact: Results, dtype: torch.dtype, loss_scale: float = 1.0
) -> list[float]:
    """Of the loss and of the gradients of hidden, weight and bias, in units of ``dtype``'s eps.

    ``loss_scale`` is what the loss was multiplied by before the backward; it is taken out here.
    Infinite where a result is not finite.
    """
    words = slice(case.first_word, None)
    least = torch.finfo(dtype).tiny / loss_scale
    pairs = [
        (results.hidden, exact.hidden),
        (results.weight[words], exact.weight[words]),
        (results.bias[words], exact.bias[words]),
    ]
    gradients = (
        _error(result.double() / loss_scale, right, case.by_row, least) for result, right in pairs
    )
    loss = _error(results.loss.double(), exact.loss)
    return [error / torch.finfo(dtype).eps for error in (loss, *gradients)]


def _error(result: Tensor, exact: Tensor, by_row: bool = False, least: float = 0) -> float:
    """The largest error, relative to the largest exact value.

    With ``by_row`` that of the worst of those rows whose largest exact value is at least ``least``.
    """
    if not result.isfinite().all():
        return math.inf
    rows = len(exact) if by_row else 1
    largest = exact.reshape(rows, -1).abs().amax(1)
    relative = (result - exact).reshape(rows, -1).abs().amax(1) / largest
    if by_row:
        relative = relative[largest >= least]
    return relative.amax().item()


class OutOfRange(NamedTuple):
    """How many entries of all gradients are not what FP16 could hold."""

    underflow: int
    """0, where the exact value is at least FP16's smallest number."""
    overflow: int
    """Not finite, where the exact value is at most FP16's largest."""


def out_of_range(results: Results, exact: Results, loss_scale: float) -> OutOfRange:
    """Counts in gradients of the loss times ``loss_scale``."""
    half = torch.finfo(torch.float16)
    underflow = overflow = 0
    for result, right in zip(results[1:], exact[1:], strict=True):
        size = right.abs() * loss_scale
        underflow += ((result == 0) & (size >= half.smallest_normal * half.eps)).sum().item()
        overflow += (~result.isfinite() & (size <= half.max)).sum().item()
    return OutOfRange(underflow, overflow)
