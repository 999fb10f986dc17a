"""What is held of a chunk's logits on a GPU: FP32 logits, or their exponentials in 16 bits.

Exponentials come out of a Triton product that is made for Hopper GPUs (compute capability 9.0).
They serve the plain losses. There the last chunk's share of the weight's gradient waits for the
backward, where one product adds it to the sum, multiplies it by the upstream gradient and rounds.
``kernels/triton_products.py`` has both products; docs/gpu.md says what they save.
"""

import functools
import importlib.util
from collections.abc import Sequence

import torch

from .kernels.measures import Measure
from .problem import Problem

EXPONENTIAL_BYTES = 2
# Rows of operands start at multiples of this many bytes, or the products cannot read them.
_ALIGNMENT_BYTES = 16


def can_hold_exponentials(device: torch.device, dtype: torch.dtype, hidden_size: int) -> bool:
    """Whether the products of ``dtype`` on this device leave exponentials, for a plain loss."""
    return (
        dtype.itemsize == EXPONENTIAL_BYTES
        and hidden_size * dtype.itemsize % _ALIGNMENT_BYTES == 0
        and _is_hopper(device)
    )


def holds_exponentials(problem: Problem, measures: Sequence[Measure]) -> bool:
    """Whether exponentials are held, and not logits, which softcap and other measures read."""
    return (
        problem.softcap is None
        and problem.label_smoothing == 0
        and not any(measure.reads_logits for measure in measures)
        and can_hold_exponentials(
            problem.hidden.device, problem.compute_dtype, problem.hidden.size(1)
        )
    )


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability(device) == (9, 0)
        and importlib.util.find_spec("triton") is not None
    )
