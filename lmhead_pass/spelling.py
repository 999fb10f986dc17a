"""Every way to write an operation, mapped to one name. What is not here is not understood."""

import builtins
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from .compat import TRANSPOSING_ATTRIBUTES

_NAMES = {
    "linear": ["linear"],
    "matmul": ["matmul", "__matmul__", "mm"],
    "addmm": ["addmm"],
    "einsum": ["einsum"],
    # The same values, in the same places, perhaps in another dtype.
    "cast": [
        *("to", "type", "type_as", "float", "half", "bfloat16", "double"),
        *("contiguous", "clone", "detach"),
    ],
    # The same values in the same order, in another shape.
    "reshape": [
        *("view", "reshape", "view_as", "reshape_as", "flatten", "unflatten"),
        *("squeeze", "unsqueeze"),
    ],
    "permute": ["permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t"],
    "getitem": ["getitem", "__getitem__"],
    "log_softmax": ["log_softmax"],
    "nll_loss": ["nll_loss"],
    "cross_entropy": ["cross_entropy"],
}
_NAMESPACES = (torch, F, torch.Tensor, torch.special, operator)
_METHODS = {name: operation for operation, names in _NAMES.items() for name in names}
_FUNCTIONS = {
    getattr(namespace, name): operation
    for name, operation in _METHODS.items()
    for namespace in _NAMESPACES
    if hasattr(namespace, name)
}
_FUNCTIONS |= dict.fromkeys(TRANSPOSING_ATTRIBUTES, "permute")
_ATTRIBUTES = {"T": "permute", "mT": "permute"}


def operation(node: Node) -> str | None:
    """The name of what ``node`` does, or None."""
    if node.op == "call_method":
        return _METHODS.get(node.target)
    if node.op == "call_function":
        if node.target is builtins.getattr:
            return _ATTRIBUTES.get(node.args[1])
        return _FUNCTIONS.get(node.target)
    return None


def arguments(node: Node, signature: Callable[..., dict[str, Any]]) -> dict[str, Any] | None:
    """Bind ``node``'s arguments, positional or keyword; None if they do not fit.

    ``signature`` is a function with the operation's parameters that returns its ``locals()``.
    """
    try:
        return signature(*node.args, **node.kwargs)
    except TypeError:
        return None


def describe(node: Node) -> str:
    """``node`` as a user would name it: ``cross_entropy``, ``input 'x'``."""
    if node.op == "placeholder":
        return f"input {node.target!r}"
    if node.op == "output":
        return "return value"
    if node.target is builtins.getattr:
        return f".{node.args[1]}"
    return str(getattr(node.target, "__name__", node.target))
