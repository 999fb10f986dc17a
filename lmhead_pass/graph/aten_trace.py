"""Traces a function of fake tensors to a graph of ATen operations."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx


def trace(function: Callable[..., list[torch.Tensor]], values: Sequence[Any]) -> Graph:
    """What ``function`` does to ``values``, the first a fake tensor, as a graph of ATen operations.

    It writes to nothing. An error if that would add a guard (from torch 2.13 on).
    """
    mode = values[0].fake_mode
    frozen = getattr(mode.shape_env, "error_on_new_guards", nullcontext)
    table = {product: _wide_product(product) for product in _PRODUCTS}
    with mode, enable_python_dispatcher(), torch.enable_grad(), frozen():
        made = make_fx(torch.func.functionalize(function), decomposition_table=table)(*values)
    return made.graph


_ATEN = torch.ops.aten
_PRODUCTS = (_ATEN.mm.default, _ATEN.mv.default, _ATEN.bmm.default, _ATEN.dot.default)


def _wide_product(product: torch._ops.OpOverload) -> Callable[..., torch.Tensor]:
    """``product`` in FP64: autocast leaves that alone, and TF32 has no say in it."""

    def run(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        if first.dtype == torch.float64:
            return NotImplemented
        return product(first.double(), second.double()).to(first.dtype)

    return run
