"""What a node of a graph calls where it is run in FP32, and the model has less."""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from ..compat.lazy_tensors import tree_map
from .tensors import tensor_of

NARROW = (torch.bfloat16, torch.float16)
_METHODS = {"half": "float", "bfloat16": "float"}
_NAN_TO_NUM = ("input", "nan", "posinf", "neginf")


def in_fp32(node: Node, args: Any, kwargs: Any) -> tuple[Callable[..., Any], Any, Any]:
    """The function of ``node``, a call, and its arguments, given those for its own nodes."""
    args, kwargs = tree_map(_wide, (args, kwargs))
    function = node.target
    if str(getattr(function, "__name__", function)).startswith("nan_to_num"):
        kwargs = _largest(tensor_of(node).dtype, args, kwargs)
    if node.op == "call_method":
        function = getattr(torch.Tensor, _METHODS.get(str(function), str(function)))
    assert callable(function)
    return function, args, kwargs


def _wide(argument: Any) -> Any:
    return torch.float32 if isinstance(argument, torch.dtype) and argument in NARROW else argument


def _largest(dtype: torch.dtype, args: Any, kwargs: Any) -> dict[str, Any]:
    """With what infinities become if ``nan_to_num`` is not told: largest numbers of ``dtype``."""
    if not dtype.is_floating_point:
        return dict(kwargs)
    limits = {"posinf": torch.finfo(dtype).max, "neginf": torch.finfo(dtype).min}
    told = {name for name, number in kwargs.items() if number is not None}
    told.update(_NAN_TO_NUM[: len(args)])
    return {**kwargs, **{name: limits[name] for name in limits.keys() - told}}
