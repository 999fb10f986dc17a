"""A few rows of unread logits, computed without the others: the last one, to generate from."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..compat import lazy_tensors as compat
from .cells import Call, Cell
from .recipe import Recipe
from .steps import ELEMENTWISE, TAKING_ROWS


def run_on_rows_alone(func: Callable[..., Any], args: Any, kwargs: Any, cell: Cell) -> Any:
    """The result of ``func``, which is given ``cell`` and no others, if it reads rows alone.

    NotImplemented if it may keep the memory of what it is given, or write to it: that of these rows
    is no part of the logits'.
    """
    rows = _rows_of(cell)
    if rows is None:
        return NotImplemented
    return run_apart(func, args, kwargs, {id(cell): rows})


def run_apart(
    func: Callable[..., Any], args: Any, kwargs: Any, values: Mapping[int, Tensor]
) -> Any:
    """The result of ``func`` for values in place of what has these ids, in memory of their own.

    NotImplemented if it may keep their memory or write to it.
    """
    versions = [compat.version_of(value) for value in values.values()]
    memory = {compat.memory_of(value) for value in values.values()}
    args, kwargs = compat.tree_map(lambda leaf: values.get(id(leaf), leaf), (args, kwargs))
    result = func(*args, **kwargs)
    is_apart = versions == [compat.version_of(value) for value in values.values()] and all(
        isinstance(leaf, Tensor) and compat.memory_of(leaf) not in memory
        for leaf in compat.tree_leaves(result)
    )
    return result if is_apart else NotImplemented


def _rows_of(cell: Cell) -> Tensor | None:
    """The value of ``cell``, in memory of its own; None if that is most of the logits, or no rows
    of them, or has been read."""
    if cell.value is not None:
        return None
    if cell.alone is None:
        with compat.outside_of_modes(), torch.inference_mode(False), torch.no_grad():
            cell.alone = _computed(cell)
    return cell.alone


def _computed(cell: Cell) -> Tensor | None:
    roots, calls = cell.roots, list[Call]()
    rows = taking = None
    while isinstance(call := cell.source, Call) and len(call.cells) == 1:
        if call.function in TAKING_ROWS:
            rows, taking, after = cell, call, len(calls)
        calls.append(call)
        (cell,) = call.cells
    if roots != (cell,) or rows is None or taking is None:
        return None
    (root,) = roots
    before = calls[after + 1 :]
    if any(call.function not in ELEMENTWISE for call in before):
        return None
    value = _taken(root, taking, rows.like)
    if value is None:
        return None
    for call in reversed(calls[:after] + before):
        with compat.autocast_as(call.autocast):
            value = call.run(dict.fromkeys(call.cells, value))
    return value


def _taken(root: Cell, taking: Call, like: Tensor) -> Tensor | None:
    """What ``taking`` takes of the logits, which is ``like`` this.

    Who takes the same twice has the same numbers: other products differ in the last digits.
    """
    way = None
    if all(map(_is_plain_index, taking.args[1:])) and not taking.kwargs:
        way = taking.function, repr(taking.args[1:])
    if way is not None and root.rows_alone is not None and root.rows_alone[0] == way:
        assert isinstance(root.source, Recipe)
        root.source.check_unchanged()
        return root.rows_alone[1]
    # Once half of them are computed apart, all may as well be.
    if 2 * (root.numbers_alone + like.numel()) > root.like.numel():
        return None
    value = _product(root, taking, like.shape)
    if value is not None:
        root.numbers_alone += like.numel()
        root.rows_alone = None if way is None else (way, value)
    return value


def _product(root: Cell, taking: Call, shape: torch.Size) -> Tensor | None:
    """What ``taking`` takes of the logits, of this ``shape``; None if these are no whole rows."""
    recipe = root.source
    assert isinstance(recipe, Recipe)
    hidden, size, vocab = recipe.hidden, recipe.hidden.size(-1), root.like.size(-1)
    is_plain = recipe.vocab_dim == hidden.dim() - 1 and root.like.is_contiguous()
    if not is_plain or size == vocab:
        return None
    if hidden.device.type != "cpu" and not all(map(_is_plain_index, taking.args[1:])):
        return None  # A number of a word that is too large an index is no exception there.
    try:
        taken: Tensor = taking.run(dict.fromkeys(taking.cells, hidden))
    except (IndexError, RuntimeError):  # of words there are more than of features
        return None
    # If it took words, it would have taken as many features.
    if taken.shape[-1:] != (size,) or (*taken.shape[:-1], vocab) != shape:
        return None
    recipe.check_unchanged()
    alone = replace(recipe, hidden=taken, strides=(), vocab_dim=taken.dim() - 1)
    return alone.apply(*alone.tensors)


def _is_plain_index(index: Any) -> bool:
    """Whether ``index`` has neither tensors nor lists, which become tensors on the device."""
    if isinstance(index, tuple):
        return all(map(_is_plain_index, index))
    return index is None or isinstance(index, int | slice | type(...))
