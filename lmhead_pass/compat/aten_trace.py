"""Traces a function of fake tensors to a graph of ATen operations."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.fx import Graph, Node

from .lookup import NO_ROWWISE, find

DispatchMode: Any = find("torch.utils._python_dispatch.TorchDispatchMode", NO_ROWWISE) or object
"""A block in which ATen operations go to ``__torch_dispatch__``."""
tree_map = find("torch.utils._pytree.tree_map", NO_ROWWISE)
"""Nested containers with a function of each thing in them."""

_WITHOUT = "sums of losses leave their gradients to the backward, which computes the logits again"
_ATEN = torch.ops.aten
_PRODUCTS = (_ATEN.mm.default, _ATEN.mv.default, _ATEN.bmm.default, _ATEN.dot.default)


def trace(function: Callable[..., list[torch.Tensor]], values: Sequence[Any]) -> Graph:
    """What ``function`` does to ``values``, the first a fake tensor, as a graph of ATen operations.

    It writes to nothing. An error if that would add a guard (from torch 2.13 on), or if torch lacks
    what this takes.
    """
    make_fx = find("torch.fx.experimental.proxy_tensor.make_fx", _WITHOUT)
    without_autocast = find("torch._C._DisableAutocast", _WITHOUT)
    mode = values[0].fake_mode
    frozen = getattr(mode.shape_env, "error_on_new_guards", nullcontext)
    table = {product: _wide_product(product) for product in _PRODUCTS}
    with mode, by_symbols(), torch.enable_grad(), without_autocast(), frozen():
        made = make_fx(torch.func.functionalize(function), decomposition_table=table)(*values)
    graph: Graph = made.graph
    return graph


def by_symbols() -> AbstractContextManager[Any]:
    """A block in which functions of ATen take fake tensors of symbolic sizes, ``lerp`` too."""
    in_python = find("torch._dispatch.python.enable_python_dispatcher", NO_ROWWISE)
    return nullcontext() if in_python is None else in_python()


def bind_unbacked(first: Any, node: Node, result: Any) -> None:
    """Let sizes of ``result`` that depend on data be those that ``node`` brought in.

    ``first`` is a fake tensor of the same compilation.
    """
    rebind = find("torch.fx.experimental.symbolic_shapes.rebind_unbacked", _WITHOUT)
    rebind(first.fake_mode.shape_env, node, result)


def _wide_product(product: Any) -> Callable[[torch.Tensor, torch.Tensor], Any]:
    """``product`` in FP64: autocast leaves that alone, and TF32 has no say in it."""

    def run(first: torch.Tensor, second: torch.Tensor) -> Any:
        if first.dtype == torch.float64:
            return NotImplemented
        return product(first.double(), second.double()).to(first.dtype)

    return run
