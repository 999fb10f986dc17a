"""Chooses the implementation of the chunk loop when an op runs: by the device of its tensors.

Graphs are compiled, cached and loaded without one: nothing here imports Triton before the first
call on a GPU.
"""

import functools
import logging

import torch
from torch import Tensor

from ..problem import Pending, Problem
from . import aten_loop
from .by_words import ByWords
from .chunk_loop import ChunkLoop

log = logging.getLogger("lmhead_pass")

# As torch names them: "cuda" is ROCm too.
_TRITON_DEVICES = ("cuda", "xpu")


def loop_of(problem: Problem) -> ChunkLoop | ByWords:
    """The loop that runs ``problem``."""
    loop = loop_for(problem.hidden.device.type)
    return loop if problem.vocab_chunk_size is None else ByWords(loop)


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


def runs_triton(device_type: str) -> bool:
    """Whether Triton kernels run on a kind of device."""
    return loop_for(device_type) is not aten_loop


def finish_weight_gradient(
    total: Tensor, pending: Pending, factor: Tensor, vocab: int, dtype: torch.dtype
) -> Tensor:
    """The gradient ``[vocab, H]`` of the weight in ``dtype``, where a loop left something pending.

    ``total`` is what ``forward_and_gradients`` returned for it; ``factor`` ``[]`` FP32 is the
    upstream gradient. Only the Triton loop leaves anything.
    """
    from . import triton_loop

    return triton_loop.finish_weight_gradient(total, pending, factor, vocab, dtype)
