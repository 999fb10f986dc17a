"""Inductor as a compiler of plain functions of tensors."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .lookup import find
from .settings import passes_patched

_BY_ATEN = "what is done in chunks without a fused form is run by ATen, operation by operation"


def compile_as_it_is(function: Callable[..., Any], forms: Sequence[Any]) -> Callable[..., Any]:
    """Compile ``function`` for contiguous tensors of these ``forms``: shape, dtype and device.

    It is run once, on fake tensors, and may write to what it is given. No pre-grad pass sees it.
    """
    compile_graph = find("torch._inductor.compile", _BY_ATEN)
    fake_mode = find("torch._subclasses.fake_tensor.FakeTensorMode", _BY_ATEN)
    make_fx = find("torch.fx.experimental.proxy_tensor.make_fx", _BY_ATEN)
    if compile_graph is None or fake_mode is None or make_fx is None:
        raise RuntimeError("torch lacks what it takes")
    with torch.no_grad():
        with fake_mode():
            examples = [
                torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in forms
            ]
            graph = make_fx(function)(*examples)
        with passes_patched(importlib.import_module("torch._inductor.config"), []):
            compiled: Callable[..., Any] = compile_graph(graph, examples)
    return compiled
