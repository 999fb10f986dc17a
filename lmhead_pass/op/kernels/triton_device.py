"""Triton launches on the current device, whatever its arguments are on: this makes both one."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """A block in which the device of ``tensor`` is the current one."""
    if tensor.device.type == "cpu":  # in Triton's interpreter
        return contextlib.nullcontext()
    return torch.accelerator.device_index(tensor.device.index)
