"""Writes to lazy tensors: what is in their memory afterwards, and its history.

A function that writes is run on values, and all that shares their memory gets the history of what
is in it then. Plain tensors in that memory may be written to as well, without a call that is seen.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compat import lazy_tensors as compat
from .cells import Call, Cell
from .history import Become, Lose, Values
from .lazy_tensor import LazyTensor, lazy_in
from .plain_values import on_values, read, values
from .recipe import SETTING
from .steps import DETACHING, NEW_SHAPES, RESIZING

SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


def write(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call ``func``, which writes to one of its arguments.

    All that shares its memory gets the history of what is in it afterwards.
    """
    written = (
        kwargs["out"] if kwargs.get("out") is not None else next(iter((*args, *kwargs.values())))
    )
    if not isinstance(written, LazyTensor):
        for logits in lazy_in(written):  # a list (torch._foreach_mul_): follow_writes
            read(func, logits._cell)
            logits._cell.keep_original()
        return on_values(func, args, kwargs)
    read(func, written._cell)
    written._cell.keep_original()
    if not torch.is_grad_enabled():
        return on_values(func, args, kwargs)
    for logits in lazy_in((args, kwargs)):
        read(func, logits._cell)
    with compat.without_torch_function():
        first = _first_owner(written._cell)
        for leaf in (written, first.owner()):
            if leaf is not None and leaf.is_leaf and leaf.requires_grad:
                what = "a leaf" if leaf is written else "a view of a leaf"
                raise RuntimeError(
                    f"{what} Variable that requires grad is being used in an in-place operation."
                )
        pairs = _views_of(first)
    owned = {id(logits): value for logits, value in pairs}
    result_args = compat.tree_map(lambda leaf: owned.get(id(leaf), leaf), (args, kwargs))
    result = on_values(func, *result_args)
    with compat.without_torch_function():
        _become(pairs, written)
    owners = {id(value): logits for logits, value in pairs}
    return compat.tree_map(lambda leaf: owners.get(id(leaf), leaf), result)


def set_data(logits: LazyTensor, data: Tensor) -> None:
    """Other values for ``logits``, with the history that they had."""
    like = logits._cell.like
    if (data.shape, data.dtype) != (like.shape, like.dtype):
        raise _no_other_form()
    read(SET_DATA, logits._cell)
    logits._cell.keep_original()
    logits._cell.replace_value(data.detach())
    logits._plain = None


def reshape(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Let the first argument be what ``func`` makes of it."""
    logits, *others = args
    if func in RESIZING:
        raise _no_other_form()
    if logits.is_leaf and logits.requires_grad and torch.is_grad_enabled():
        return on_values(func, args, kwargs)  # autograd refuses it
    view = NEW_SHAPES[func](logits, *others, **kwargs)
    view._cell.owner = logits._cell.owner = lambda: None
    with compat.without_torch_function():
        compat.give_history(logits, view)
    logits._cell.owner = weakref.ref(logits)
    return logits


def _no_other_form() -> RuntimeError:
    return RuntimeError(
        "lmhead_pass: logits that a compiled model returned cannot be given another size or dtype "
        f"in place. Change a clone of them, or set {SETTING}."
    )


def follow_writes(logits: LazyTensor) -> None:
    """Give ``logits`` and their views the history of what is in them, if their values were written
    to by a name that is not followed (``ravel``, ``torch._foreach_mul_``)."""
    plain = logits._plain
    if plain is None or plain.tensor.grad_fn is plain.made_by:
        return
    with compat.without_torch_function(), torch.enable_grad():
        _become(_views_of(logits._cell), logits)


def _become(pairs: Sequence[tuple[LazyTensor, Tensor]], written: LazyTensor) -> None:
    """Give lazy tensors the history of the plain ones beside them. All but the first are views of
    it: theirs goes through its own."""
    (first, value), *views = pairs
    _take_history(first, value, value, written)
    if views:
        value = Values.apply(first, value.detach()) if value.requires_grad else value  # type: ignore[no-untyped-call]
        again = _views_of(first._cell, value)[1:]
        for (logits, before), (_, view) in zip(views, again, strict=True):
            _take_history(logits, view, before, written)


def _take_history(logits: LazyTensor, value: Tensor, plain: Tensor, written: LazyTensor) -> None:
    """Give ``logits`` the history of ``value``. ``plain`` is what was written to in its place."""
    logits._plain = None
    if not plain.requires_grad:
        return
    try:
        _ = plain.grad_fn  # An error where autograd has none.
        Become.apply(logits, value)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if logits is written:
            raise
        Lose.apply(logits, str(error))  # type: ignore[no-untyped-call]


def _first_owner(cell: Cell) -> Cell:
    """The first in the same memory whose tensor somebody holds."""
    first = cell
    while cell.is_view:
        assert isinstance(cell.source, Call)
        if cell.source.function in DETACHING:
            break  # What is written has no history there, and may be a leaf.
        (cell,) = cell.source.cells
        if cell.owner() is not None:
            first = cell
    return first


def _views_of(cell: Cell, value: Tensor | None = None) -> list[tuple[LazyTensor, Tensor]]:
    """The tensor of ``cell`` and those that are views of it, with their values and histories.

    ``value`` is that of the first, if it is not to be its own.
    """
    owner = cell.owner()
    assert isinstance(owner, LazyTensor)
    if value is None:
        value = values(owner)
        if value is cell.value:
            value = value.detach()
    found: list[tuple[LazyTensor, Tensor]] = [(owner, value)]
    pending = [(cell, value)]
    while pending:
        parent, of_parent = pending.pop()
        for made in parent.made:
            if made.is_view:
                assert isinstance(made.source, Call)
                view = made.source.run({parent: of_parent})
                pending.append((made, view))
                tensor = made.owner()
                if isinstance(tensor, LazyTensor):
                    found.append((tensor, view))
    return found
