"""What the chunk loops share: the terms of each row's loss, and the sums of gradients.

With class weights ``c`` (1 if there are none), label smoothing ``e`` and ``V`` words, a row with
target ``t`` has the loss

    target_coef (lse - z_t) + sum_v smoothing_coef_v (lse - z_v)

    target_coef = (1 - e) c_t        smoothing_coef_v = e / V c_v        lse = log(sum_v exp z_v)

``aten_loop.py`` derives its gradient.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..problem import Gradients, Problem, held_dtype

# FP16 reaches from 6e-8 to 65504. Gradients of logits are scaled before they are rounded to it, so
# that their bounds come to at most this. Three times as much still fits, and small probabilities
# have all that is below.
_FP16_MAGNITUDE = 2.0**14


class RowTerms:
    """The constants of the rows' losses, and the step from the rows' losses to the loss.

    A loop works on ``M`` of the ``N`` rows of the problem: those that ``select`` keeps.
    """

    def __init__(
        self, problem: Problem, target_weight: Tensor, smoothing_coef_sum: Tensor | float
    ) -> None:
        """``target_weight`` ``[M]`` holds c_t, and 0 where the target is ignored.

        ``smoothing_coef_sum`` ``[]`` is e / V sum_v c_v.
        """
        self._problem = problem
        self.target_coef = (1 - problem.label_smoothing) * target_weight
        """``[M]``: (1 - e) c_t, and 0 where the target is ignored."""
        self.smoothing_coef_sum = smoothing_coef_sum
        self._denominator = (
            target_weight.sum() if problem.reduction == "mean" else target_weight.new_ones(())
        )
        self._coefficient = None
        if problem.coefficient is not None:
            self._coefficient = self.select(problem.coefficient).to(problem.accumulate_dtype)

    def select(self, values: Tensor) -> Tensor:
        """``[M]``: of ``values`` ``[N]`` those of the loop's rows, and 0 for ignored rows."""
        raise NotImplementedError

    def reduce(self, losses: Tensor, row_max: Tensor, log_sum: Tensor) -> Tensor:
        """The loss of the problem. All arguments are ``[N]``; the rows' losses are 0 if ignored."""
        if self._problem.reduction == "none":
            return losses
        if self._coefficient is not None:
            losses = self.select(losses) * self._coefficient
            # A row with coefficient 0 counts for nothing, even if its loss is infinite.
            losses = losses.masked_fill(self._coefficient == 0, 0)
        loss = losses.sum() / self._denominator
        if self._problem.has_logsumexp_terms:
            loss = loss + self._problem.logsumexp_terms(row_max + log_sum)
        return loss

    @property
    def upstream(self) -> Tensor:
        """``[M]``: the gradient of a scalar loss with respect to each row's loss."""
        if self._coefficient is not None:
            return self._coefficient
        return self.select(self._denominator.reciprocal().expand(self._problem.target.size(0)))

    def grad_bound(self, upstream: Tensor) -> Tensor:
        """``[M]``: twice this bounds the gradients of each row's logits.

        ``upstream`` ``[M]`` is the gradient with respect to the rows' losses.
        """
        return (upstream * (self.target_coef + self.smoothing_coef_sum)).abs()


class GradientSums:
    """The gradients of hidden, weight and bias. A loop adds the share of one chunk after another.

    FP16 gradients of logits are scaled by a power of two, which ``finish`` takes out again.
    """

    def __init__(
        self,
        problem: Problem,
        needed: Sequence[bool],
        scale: Tensor | None,
        weight_dtype: torch.dtype,
        new: Callable[..., Tensor],
        words: int,
    ) -> None:
        """``new`` is ``Tensor.new_zeros``, or ``new_empty`` if all elements get written.

        ``scale`` ``[]`` comes from ``power_of_two_scale``; None is 1. The sum for the weight is
        ``[words, H]``.
        """
        self._problem = problem
        self._needed = needed
        self._inputs = problem.inputs_with_gradient(needed)
        self._scale = scale
        # Each row of hidden gets its gradient once; the others are sums over chunks.
        dtypes = held_dtype(problem.hidden.dtype), weight_dtype, problem.accumulate_dtype
        shapes = problem.hidden.shape, (words, problem.hidden.size(1)), (len(problem.weight),)
        self._sums = Gradients(
            *(
                problem.hidden.new_empty(0) if tensor is None else new(tensor, shape, dtype=dtype)
                for tensor, shape, dtype in zip(self._inputs, shapes, dtypes, strict=True)
            )
        )

    def scaled(self, upstream: Tensor) -> Tensor:
        """The upstream gradient that the chunks must use."""
        return upstream if self._scale is None else upstream * self._scale

    def finish(self) -> Gradients:
        """The gradients, each in ``held_dtype`` of its input."""
        return Gradients(
            *(
                total if tensor is None else self._unscaled(total).to(held_dtype(tensor.dtype))
                for tensor, total in zip(self._inputs, self._sums, strict=True)
            )
        )

    def _unscaled(self, total: Tensor) -> Tensor:
        return total if self._scale is None else total.div_(self._scale)


def power_of_two_scale(bound: Tensor) -> Tensor:
    """``[]``: the factor that brings the largest of ``bound``, in FP32, to about 2^14.

    It is 1 if the largest is 0 or not finite. Nothing here waits for the device.
    """
    if not bound.numel():
        return bound.new_ones(())
    # The exponent's bits of FP32 alone are the power of two at or just below the number.
    power = (bound.amax().view(torch.int32) & 0x7F800000).view(torch.float32)
    scale = _FP16_MAGNITUDE / 2 / power
    return torch.where((scale > 0) & (scale < torch.inf), scale, 1)
