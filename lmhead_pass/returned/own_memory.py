"""A copy that Inductor does not do without.

A graph that Inductor compiles and that returns a view of one buffer twice returns two tensors, and
autograd gives a history to one of them. Lazy logits need the very tensor that gets it.
"""

from typing import Any

import torch
from torch import Tensor

from ..compat.library import add_fake_kernel, define


class _OwnMemory(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        copy: Tensor = torch.ops.lmhead_pass._copy(tensor)
        return copy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


define("_copy(Tensor tensor) -> Tensor", lambda tensor: tensor.clone())
add_fake_kernel("_copy", torch.empty_like)
define("own_memory(Tensor tensor) -> Tensor", _OwnMemory.apply, "CompositeImplicitAutograd")
