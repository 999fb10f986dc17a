"""Which functions of lazy logits are written down instead of run: they keep the vocabulary."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compat.lazy_tensors import memory_of
from .cells import Cell

_NAMESPACES = (Tensor, torch, F)


def _functions(*names: str) -> set[Any]:
    return {
        getattr(namespace, name)
        for namespace in _NAMESPACES
        for name in names
        if hasattr(namespace, name)
    }


VIEWS = {
    *(getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "data")),
    *_functions(
        *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "view_as"),
        *("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t"),
        *("reshape_as", "__getitem__", "select", "narrow", "detach"),
    ),
}
_CASTS = _functions("to", "float", "half", "bfloat16", "double", "contiguous", "type_as")
_VALUES = _functions(
    *("mul", "multiply", "div", "divide", "true_divide", "add", "sub", "subtract", "neg"),
    *("__mul__", "__rmul__", "__truediv__", "__add__", "__radd__", "__sub__", "__neg__"),
    *("tanh", "sigmoid", "log_softmax", "softmax", "log", "masked_fill", "where"),
    *("exp", "log1p", "expm1", "abs", "square", "pow", "__pow__", "sqrt", "rsqrt", "reciprocal"),
    *("clamp", "clip", "gelu", "softplus", "logsigmoid", "erf", "sin", "cos", "softmin"),
    *("__rsub__", "__rtruediv__", "maximum", "minimum", "logaddexp", "xlogy", "lerp"),
    *("cumsum", "logcumsumexp", "normalize"),
)
PIECES = _functions("chunk", "split", "tensor_split", "unbind")
DETACHING = {Tensor.detach, torch.detach, Tensor.data.__get__}  # type: ignore[attr-defined]
ELEMENTWISE = DETACHING | _CASTS
TAKING_ROWS = PIECES | {Tensor.__getitem__} | _functions("select", "narrow")
"""These may take whole rows of the logits, and leave others."""
_WORD_BY_WORD = _functions(
    *("kl_div", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"),
    *("binary_cross_entropy", "binary_cross_entropy_with_logits"),
)
"""Losses that have the vocabulary in their result without a reduction."""
COMPUTED = _WORD_BY_WORD | {
    Tensor.__getitem__,
    *_functions(
        *("cross_entropy", "nll_loss", "gather", "take_along_dim", "logsumexp"),
        *("argmax", "amax", "max", "sum", "mean", "amin", "min", "std", "var", "norm", "prod"),
        "cosine_similarity",
    ),
}
"""These have no vocabulary in their result, and the op may compute them."""
WRITTEN_DOWN = VIEWS | _CASTS | _VALUES | _WORD_BY_WORD
LOGITS_THEMSELVES = {
    Tensor.__getitem__,
    *_functions("gather", "take_along_dim", "amax", "max", "amin", "min"),
}
"""Of ``COMPUTED``, what returns logits as they are."""
# Without a gradient, so that what is compared may be other tensors of the same values.
COMPARING = _functions(
    *("gt", "ge", "lt", "le", "eq", "ne", "greater", "greater_equal", "less", "less_equal"),
    *("not_equal", "__gt__", "__ge__", "__lt__", "__le__", "__eq__", "__ne__", "equal"),
)
# Of so many words at least one remains in what is written down.
_FEWER = 16


_LINEAR = VIEWS | PIECES | ELEMENTWISE
_LINEAR |= _functions("add", "sub", "subtract", "neg", "__add__", "__radd__", "__sub__", "__neg__")
_LINEAR_IN_ONE = _functions(
    *("mul", "multiply", "div", "divide", "true_divide", "__mul__", "__rmul__", "__truediv__")
)


def is_written_down(func: Callable[..., Any], likes: Any, cells: Sequence[Cell]) -> bool:
    """Whether ``likes``, what ``func`` makes of ``cells``, still has the vocabulary."""
    if func in PIECES:
        return isinstance(likes, tuple | list)
    if func not in WRITTEN_DOWN or not isinstance(likes, Tensor):
        return False
    if func in _WORD_BY_WORD and likes.numel() < max(cell.like.numel() for cell in cells):
        return False
    return likes.is_floating_point() and (
        func not in (Tensor.__getitem__, torch.select, Tensor.select)
        # Who writes to a view writes to the logits.
        or any(memory_of(likes) == memory_of(cell.like) for cell in cells)
        or likes.numel() * _FEWER >= max(cell.like.numel() for cell in cells)
        or (likes.dim() > 0 and any(likes.size(-1) == cell.like.size(-1) for cell in cells))
    )


def is_linear(func: Callable[..., Any], args: Sequence[Any], kwargs: Any) -> bool:
    """Whether the gradient of ``func`` for Cells in ``args`` is the same whatever their values."""
    if func in _LINEAR_IN_ONE:
        numbers = (*args[1:], *kwargs.values())
        return isinstance(args[0], Cell) and not any(isinstance(n, Cell | Tensor) for n in numbers)
    return func in _LINEAR


NEW_SHAPES = {
    getattr(Tensor, f"{name}_"): getattr(Tensor, name)
    for name in ("squeeze", "unsqueeze", "transpose", "swapaxes", "swapdims", "t")
}
"""These write a form alone, and no values: each with the function that returns such a view."""
RESIZING = {Tensor.resize_, Tensor.resize_as_, Tensor.set_, Tensor.as_strided_}


def is_in_place(func: Callable[..., Any], kwargs: Any) -> bool:
    """Whether ``func`` writes to its first argument."""
    schema = getattr(func, "_schema", None)
    if kwargs.get("inplace") or (schema is not None and schema.is_mutable):
        return True
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in _NO_WRITERS)
    return name.endswith("_")


_NO_WRITERS = ("__init__", "__init_subclass__", "__int__", "__index__", "__invert__", "__iter__")
