"""Chooses the implementation of the chunk loop when an op runs: by the device of its tensors.

Graphs are compiled, cached and loaded without one: nothing here imports Triton before the first
call on a GPU.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..problem import Gradients, Pending, Problem
from . import aten_loop
from .measures import Measure

log = logging.getLogger("lmhead_pass")

# As torch names them: "cuda" is ROCm too.
_TRITON_DEVICES = ("cuda", "xpu")


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
        self, problem: Problem, needed: Sequence[bool], measures: Sequence[Measure]
    ) -> list[Tensor]:
        """The scalar loss, its gradients and the measures in one pass: three products.

        ``needed`` says for hidden, weight and bias whether a gradient is wanted. Returns the loss,
        the three ``Gradients`` for an upstream gradient of 1, each in ``held_dtype`` of its input,
        ``Pending``, and the measures.
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


def loop_of(problem: Problem) -> ChunkLoop:
    """The loop that runs ``problem``."""
    return loop_for(problem.hidden.device.type)


@functools.cache
def loop_for(device_type: str) -> ChunkLoop:
    """The module that runs the chunk loop on a kind of device."""
    if device_type == "cpu":
        return aten_loop
    why = f"there are no Triton kernels for {device_type}"
    if device_type in _TRITON_DEVICES:
        try:
            from . import triton_loop
        except ImportError as error:
            why = f"Triton cannot be imported ({error})"
        else:
            return triton_loop
    log.info("the chunk loop runs in plain ATen on %s, which is slower: %s", device_type, why)
    return aten_loop


def finish_weight_gradient(
    total: Tensor, pending: Pending, factor: Tensor, vocab: int, dtype: torch.dtype
) -> Tensor:
    """The gradient ``[vocab, H]`` of the weight in ``dtype``, where a loop left something pending.

    ``total`` is what ``forward_and_gradients`` returned for it; ``factor`` ``[]`` FP32 is the
    upstream gradient. Only the Triton loop leaves anything.
    """
    from . import triton_loop

    return triton_loop.finish_weight_gradient(total, pending, factor, vocab, dtype)
