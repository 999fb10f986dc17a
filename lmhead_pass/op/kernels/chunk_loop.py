"""What a chunk loop computes: one loop for the CPU, one for GPUs, and one around either."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..problem import Gradients, Problem
from .measures import Measure


class ChunkLoop(Protocol):
    """What a module that runs the chunk loop has."""

    def forward(self, problem: Problem, measures: Sequence[Measure]) -> list[Tensor]:
        """The loss and the measures: one product.

        Returns ``[loss, row_max, log_sum, *measures]``. The first three are in the accumulation
        dtype. The loss is ``[]``, or ``[N]`` for reduction "none". ``row_max`` and ``log_sum``
        ``[N]`` are what the backward of "none" needs of each row: its largest logit, and the log of
        its sum of ``exp(logit - row_max)``. For rows without a loss these two may be
        anything, unless measures are asked for.
        """

    def forward_and_gradients(
        self,
        problem: Problem,
        needed: Sequence[bool],
        measures: Sequence[Measure],
        saved: tuple[Tensor, Tensor] | None = None,
    ) -> list[Tensor]:
        """The scalar loss, its gradients and the measures in one pass: three products.

        ``needed`` says for hidden, weight and bias whether a gradient is wanted. Returns the loss,
        the three ``Gradients`` for an upstream gradient of 1, each in ``held_dtype`` of its input,
        ``Pending``, and the measures. ``saved`` ``[N]`` gets the ``row_max`` and ``log_sum`` that
        ``forward`` returns.
        """

    def backward(
        self,
        problem: Problem,
        needed: Sequence[bool],
        row_max: Tensor,
        log_sum: Tensor,
        grad_losses: Tensor | None,
        grad_logsumexp: Tensor | None,
    ) -> Gradients:
        """Gradients of per-row losses, and of the measure "logsumexp": three products.

        ``grad_losses`` and ``grad_logsumexp`` ``[N]`` come from upstream; None is 0. ``row_max``
        and ``log_sum`` are what ``forward`` returned. The gradients come in ``held_dtype`` of their
        input.
        """
