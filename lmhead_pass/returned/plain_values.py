"""The values of lazy tensors, as plain tensors with the history that theirs has."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..compat import lazy_tensors as compat
from ..compat.compiling import is_compiling
from . import reading
from .cells import Cell
from .history import Values
from .lazy_tensor import LazyTensor, Plain, lazy_in


def on_values(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call ``func`` with the values of the lazy logits among its arguments."""
    lazy = lazy_in((args, kwargs))
    for logits in lazy:
        read(func, logits._cell)
    plain = {id(logits): values(logits) for logits in lazy}
    # Not map_arguments: the function may be any, and change lists and dictionaries.
    args, kwargs = compat.tree_map(lambda leaf: plain.get(id(leaf), leaf), (args, kwargs))
    result = func(*args, **kwargs)
    # A function that returns its argument returns the caller's own tensor.
    owners = {id(plain[id(logits)]): logits for logits in lazy}
    return compat.tree_map(lambda leaf: owners.get(id(leaf), leaf), result)


def read(func: Callable[..., Any], cell: Cell) -> None:
    """Compute the value of ``cell`` for ``func``, and log that."""
    if cell.value is None:
        reading.tell(func, cell)
    cell.read()


def values(logits: LazyTensor) -> Tensor:
    """The values, with their gradient where it is recorded."""
    value, plain = logits._cell.read(), logits._plain
    with compat.without_torch_function():
        source = logits.grad_fn if logits.requires_grad else logits
    if plain is not None and plain.made_of is source and torch.is_grad_enabled():
        return plain.tensor
    made = with_history(logits, value)
    if made is not value and not is_compiling():
        logits._plain = Plain(made, made.grad_fn, source)
    return made


def with_history(logits: LazyTensor, value: Tensor) -> Tensor:
    """``value``, with the history of ``logits`` where a gradient is recorded."""
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return value
    # What is traced stays in the modes that trace it.
    modes = contextlib.nullcontext() if is_compiling() else compat.outside_of_modes()
    with modes, compat.without_torch_function():
        return Values.apply(logits, value) if logits.requires_grad else value  # type: ignore[no-untyped-call]
