"""Maps every spelling of an operation to one name. The pass understands no others."""

import builtins
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from ..compat.graphs import MAKE_DUAL
from ..compat.versions import TRANSPOSING_ATTRIBUTES

# What cuts a tensor into several.
_CUTS = ("chunk", "split", "split_with_sizes", "tensor_split", "unbind")

_NAMES = {
    # Heads.
    "linear": ["linear", "inner"],
    "matmul": ["matmul", "__matmul__", "mm"],
    "product": ["dot", "vdot", "mv", "bmm"],
    "addmm": ["addmm"],
    "einsum": ["einsum"],
    "conv1d": ["conv1d"],
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
    # Some of the rows, or of the words.
    "getitem": ["getitem", "__getitem__"],
    "select": ["select"],
    "index_select": ["index_select"],
    "narrow": ["narrow"],
    "expand": ["expand", "expand_as", "broadcast_to"],
    "broadcast_tensors": ["broadcast_tensors"],
    **{name: [name] for name in _CUTS},
    # What becomes of each value.
    "mul": ["mul", "multiply", "__mul__", "__rmul__"],
    "div": ["div", "divide", "true_divide", "truediv", "__truediv__"],
    "add": ["add", "__add__", "__radd__"],
    "sub": ["sub", "subtract", "__sub__"],
    "neg": ["neg", "negative", "__neg__"],
    "pow": ["pow", "__pow__", "float_power"],
    "square": ["square"],
    "sqrt": ["sqrt"],
    "rsqrt": ["rsqrt"],
    "reciprocal": ["reciprocal"],
    "tanh": ["tanh"],
    "sigmoid": ["sigmoid", "expit"],
    "masked_fill": ["masked_fill"],
    "index_fill": ["index_fill"],
    "fill": ["fill", "zero"],
    "setitem": ["setitem", "__setitem__"],
    # Softmaxes, and what is read of them.
    "softmax": ["softmax"],
    "log_softmax": ["log_softmax"],
    "log": ["log"],
    "exp": ["exp"],
    "entr": ["entr"],
    "clamp": ["clamp", "clip", "clamp_min"],
    "logsumexp": ["logsumexp"],
    "one_hot": ["one_hot"],
    "arange": ["arange"],
    "gather": ["gather"],
    "take_along_dim": ["take_along_dim"],
    "sum": ["sum"],
    # What looks at a tensor's shape, dtype and device alone.
    "like": [
        *("ones_like", "zeros_like", "full_like", "empty_like"),
        *("new_ones", "new_zeros", "new_full", "new_empty", "new_tensor", "size", "numel"),
    ],
    "stack": ["stack"],
    "cat": ["cat", "concat", "concatenate"],
    "index_add": ["index_add"],
    "scatter_add": ["scatter_add"],
    "mean": ["mean"],
    "where": ["where"],
    "argmax": ["argmax"],
    "amax": ["amax"],
    "max": ["max"],
    "topk": ["topk"],
    # What changes which derivatives there are.
    "detach_": ["detach_"],
    "nll_loss": ["nll_loss"],
    "cross_entropy": ["cross_entropy"],
}
_NAMESPACES = (torch, F, torch.Tensor, torch.special, operator)
_METHODS = {name: operation for operation, names in _NAMES.items() for name in names}
# ``x.div_(2)`` and ``x /= 2``: the same, written to the first argument.
_CHANGED = (
    *("mul", "div", "add", "sub", "neg", "tanh", "sigmoid", "masked_fill"),
    *("index_fill", "fill", "index_add", "scatter_add"),
)
_IN_PLACE = {
    name: operation
    for operation in _CHANGED
    for plain in _NAMES[operation]
    for name in (f"{plain}_", f"i{plain}", f"__i{plain.strip('_')}__")
} | dict.fromkeys(_NAMES["setitem"], "setitem")


def _functions(methods: dict[str, str]) -> dict[object, str]:
    return {
        getattr(namespace, name): operation
        for name, operation in methods.items()
        for namespace in _NAMESPACES
        if hasattr(namespace, name)
    }


_FUNCTIONS = {
    **_functions(_METHODS),
    **dict.fromkeys(TRANSPOSING_ATTRIBUTES, "permute"),
    **dict.fromkeys(MAKE_DUAL, "make_dual"),
}
_WRITING_FUNCTIONS = _functions(_IN_PLACE)
_ATTRIBUTES = {"T": "permute", "mT": "permute"}


def canonical_op(node: Node) -> str | None:
    """Return the name of the operation that ``node`` does; None if it is not in the table."""
    if node.op == "call_method":
        return _METHODS.get(node.target) or _IN_PLACE.get(node.target)
    if node.op == "call_function":
        if node.target is builtins.getattr:
            return _ATTRIBUTES.get(node.args[1])
        return _FUNCTIONS.get(node.target) or _WRITING_FUNCTIONS.get(node.target)
    return None


def is_pieces(node: Node) -> bool:
    """Whether ``node`` cuts a tensor into several."""
    return canonical_op(node) in _CUTS


def is_in_place(node: Node) -> bool:
    """Whether ``node`` writes what ``canonical_op(node)`` gives to its first argument."""
    if node.op == "call_method":
        return node.target in _IN_PLACE
    return node.op == "call_function" and node.target in _WRITING_FUNCTIONS


def arguments(node: Node, signature: Callable[..., dict[str, Any]]) -> dict[str, Any] | None:
    """Return the arguments of ``node`` by name; None if they do not fit ``signature``.

    ``signature`` is a function with the operation's parameters that returns its ``locals()``.
    """
    try:
        return signature(*node.args, **node.kwargs)
    except TypeError:
        return None


def describe(node: Node) -> str:
    """Name ``node`` in a message, as a user would: ``cross_entropy``, ``input 'x'``."""
    if node.op == "placeholder":
        return f"input {node.target!r}"
    if node.op == "output":
        return "return value"
    if node.target is builtins.getattr:
        return f".{node.args[1]}"
    return str(getattr(node.target, "__name__", node.target))
