"""Chooses the implementation of the chunk loop when an op runs: by the device of its tensors.

Graphs are compiled, cached and loaded without one: nothing here imports Triton before the first
call on a GPU.
"""

import functools
import logging
from types import ModuleType

from torch import Tensor

from ..problem import Gradients, Problem
from . import aten

log = logging.getLogger("lmhead_pass")

# As torch names them: "cuda" is ROCm too.
_TRITON_DEVICES = ("cuda", "xpu")


def forward(problem: Problem, measures: list[str]) -> list[Tensor]:
    """See ``aten.forward``."""
    return _loop(problem).forward(problem, measures)


def forward_and_gradients(
    problem: Problem, needed: list[bool], measures: list[str]
) -> list[Tensor]:
    """See ``aten.forward_and_gradients``."""
    return _loop(problem).forward_and_gradients(problem, needed, measures)


def backward(
    problem: Problem,
    needed: list[bool],
    row_max: Tensor,
    log_sum: Tensor,
    grad_losses: Tensor | None,
    grad_logsumexp: Tensor | None,
) -> Gradients:
    """See ``aten.backward``."""
    gradients = (grad_losses, grad_logsumexp)
    return _loop(problem).backward(problem, needed, row_max, log_sum, *gradients)


def _loop(problem: Problem) -> ModuleType:
    return loop_for(problem.hidden.device.type)


@functools.cache
def loop_for(device_type: str) -> ModuleType:
    """The module that runs the chunk loop on a kind of device."""
    if device_type == "cpu":
        return aten
    why = f"there are no Triton kernels for {device_type}"
    if device_type in _TRITON_DEVICES:
        try:
            from . import triton_loop
        except ImportError as error:
            why = f"Triton cannot be imported ({error})"
        else:
            return triton_loop
    log.info("the chunk loop runs in plain ATen on %s, which is slower: %s", device_type, why)
    return aten
