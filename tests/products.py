"""Counts the multiplications of matrix products."""

from collections.abc import Callable
from math import prod

from torch.profiler import ProfilerActivity, profile

# Where each has its operands.
_OPERANDS = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::bmm": 0}


def multiplications(function: Callable[[], object]) -> int:
    """How many ``function`` does, in whatever it runs."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        function()
    total = 0
    for event in found.events():
        if event.name in _OPERANDS:
            first, second = event.input_shapes[_OPERANDS[event.name] :][:2]
            total += prod(first) * second[-1]
    return total
