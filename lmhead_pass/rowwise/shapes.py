"""What looks at the same values in another shape, or at some of them."""

from collections.abc import Sequence
from typing import Any

import torch

from ..graph import same
from .alignment import aligned, along, check_rows, chunk_dim, ints, needed
from .along_words import scan_with_index
from .call import Call, Context, Mixes, New, Result, describe_call, plain
from .layout import Dim, Label, Move, Rows, Space, reshaped
from .values import Traced, View, rest_of


def _viewed(
    held: Traced, call: Call, dims: tuple[Dim, ...], view: View | None, space: Space | None = None
) -> Traced:
    views = held.views if view is None else (*held.views, view)
    return Traced(held.cell, views, dims, tuple(call.out.shape), space or held.space)


def same_values(context: Context, call: Call) -> Traced:
    held = along(context, call)
    return _viewed(held, call, held.finest, None)


def copied(context: Context, call: Call) -> New:
    held = along(context, call)
    return New(context.read(held), held.finest, held.space)


def reshape(context: Context, call: Call) -> Traced:
    held = along(context, call)
    dims = check_rows(
        reshaped(held.dims, held.sizes, call.out.shape), held.space, describe_call(call.function)
    )
    before, after = held.rest, rest_of(dims, tuple(call.out.shape))
    view = None if before == after else View("reshape", before, after)
    return _viewed(held, call, dims, view)


def permute(context: Context, call: Call) -> Traced:
    held = along(context, call)
    dims, rank = held.finest, len(held.dims)
    order = list(range(rank))
    match call.name.split(".")[0]:
        case "permute":
            order = [dim % rank for dim in call.named["dims"]]
        case "transpose":
            first, second = call.named["dim0"] % rank, call.named["dim1"] % rank
            order[first], order[second] = second, first
        case _:
            order.reverse()
    places = [chunk_dim(dims, dim) for dim in order if dims[dim] is None]
    moved = (0, *(place for place in places if place is not None))
    is_moved = list(moved) != sorted(moved)
    view = View("permute", held.rest, moved) if is_moved else None
    return _viewed(held, call, tuple(dims[dim] for dim in order), view)


def expand(context: Context, call: Call) -> Traced:
    held = along(context, call)
    dims, shape = held.finest, tuple(call.out.shape)
    wider: tuple[Dim, ...] = (*([None] * (len(shape) - len(dims))), *dims)
    before = (*([1] * (len(shape) - len(dims))), *held.sizes)
    beside = _viewed(held, call, wider, None)
    views = list(held.views)
    ones = rest_of(wider, before)
    if ones != held.rest:
        views.append(View("reshape", held.rest, ones))
    if ones != beside.rest:
        views.append(View("expand", ones, beside.rest))
    return Traced(held.cell, tuple(views), wider, shape, held.space)


def slice_of(context: Context, call: Call) -> Traced:
    held, dim = along(context, call), call.named["dim"]
    dims = held.finest
    start, stop, step = (call.named[name] for name in ("start", "end", "step"))
    return _part(held, call, dims, dim, (start, stop, step), call.out)


def _part(
    held: Traced, call: Call, dims: tuple[Dim, ...], dim: int, numbers: tuple[Any, ...], out: Any
) -> Traced:
    """A slice of dimension ``dim``."""
    place, whole = chunk_dim(dims, dim), held.sizes[dim]
    start, stop, step = numbers
    if same(out.size(dim), whole) and step == 1:
        return Traced(held.cell, held.views, dims, tuple(out.shape), held.space)
    if place is not None:
        view = View("slice", held.rest, (place, *plain([start, stop, step])))
        return Traced(held.cell, (*held.views, view), dims, tuple(out.shape), held.space)
    label = Label(out.size(dim))
    space = held.space.after(Move("slice", _rows(dims, dim), tuple(plain(list(numbers)))), label)
    return Traced(held.cell, held.views, _with(dims, dim, space), tuple(out.shape), space)


def _rows(dims: tuple[Dim, ...], dim: int) -> Rows:
    rows = dims[dim]
    assert rows is not None
    return rows


def _with(dims: tuple[Dim, ...], dim: int, space: Space) -> tuple[Dim, ...]:
    assert space.result is not None
    return tuple((space.result,) if n == dim % len(dims) else one for n, one in enumerate(dims))


def select(context: Context, call: Call) -> Traced:
    held, dim, index = along(context, call), call.named["dim"], call.named["index"]
    dims = held.finest
    return _one(held, dims, dim % len(dims), index, call.out)


def _one(held: Traced, dims: tuple[Dim, ...], dim: int, index: Any, out: Any) -> Traced:
    """Place ``index`` of dimension ``dim``."""
    place, (index,) = chunk_dim(dims, dim), plain([index])
    others = (*dims[:dim], *dims[dim + 1 :])
    if place is not None:
        view = View("select", held.rest, (place, index))
        return Traced(held.cell, (*held.views, view), others, tuple(out.shape), held.space)
    space = held.space.after(Move("select", _rows(dims, dim), (index,)), None)
    return Traced(held.cell, held.views, others, tuple(out.shape), space)


def split(context: Context, call: Call) -> list[Result]:
    held, dim = along(context, call), call.named["dim"]
    dims, found, start = held.finest, list[Result](), 0
    for out in call.out:
        stop = start + out.size(dim)
        found.append(_part(held, call, dims, dim % len(dims), (start, stop, 1), out))
        start = stop
    return found


def unbind(context: Context, call: Call) -> list[Result]:
    held = along(context, call)
    dims = held.finest
    dim = call.named["dim"] % len(dims)
    return [_one(held, dims, dim, number, out) for number, out in enumerate(call.out)]


def pick(context: Context, call: Call) -> Result:
    held, indices = along(context, call), call.named["indices"]
    dims = held.finest
    given = [(place, index) for place, index in enumerate(indices) if index is not None]
    if any(one.dtype not in (torch.int64, torch.int32) or one.dim() != 1 for _, one in given):
        raise Mixes(f"{describe_call(call.function)} picks rows by other than vectors of numbers")
    (first, index), *_ = given
    if len(given) > 1 or dims[first] is not None:
        return _picked(context, call, dict(given))
    if context.traced(index) is not None:
        raise Mixes(f"{describe_call(call.function)} has an index that is made of rows")
    with context.outside():  # index_select counts none from the end
        index = _from_start(index, call.named["self"].size(first))
    made = context.make(
        "aten.index_select.default",
        *(context.read(held), needed(dims, first, call)),
        context.constant(context.outer(index), ints(index.shape)),
    )
    return New(made, dims, held.space)


def _from_start(index: torch.Tensor, size: Any) -> torch.Tensor:
    """``index`` with numbers that are counted from the end."""
    return torch.where(index < 0, index + size, index)


def index_select(context: Context, call: Call) -> Result | list[Result]:
    held, index = along(context, call), call.named["index"]
    place = call.named["dim"] % len(held.dims)
    if held.finest[place] is None or index.dim() != 1:
        return scan_with_index(context, call)
    return _picked(context, call, {place: index})


def _picked(context: Context, call: Call, given: dict[int, torch.Tensor]) -> New:
    """Rows by a vector for each of some dimensions, or single words by one more for the words."""
    source, held = call.named["self"], along(context, call)
    dims, places = held.finest, [*given]
    of_rows = [p for p in places if dims[p] is not None or same(source.size(p), 1)]
    of_words = places[len(of_rows) :]
    first, behind = places[0], places[-1] + 1
    if (
        of_rows + of_words != [*range(first, behind)]
        or (of_words and (len(of_words) > 1 or places != [*range(source.dim())]))
        or all(dims[place] is None for place in of_rows)
        or any(not same(one.size(0), call.out.size(first)) for one in given.values())
    ):
        raise Mixes(f"{describe_call(call.function)} picks rows in a way that is not understood")
    if any(context.traced(one) is not None for one in given.values()):
        raise Mixes(f"{describe_call(call.function)} has an index that is made of rows")
    rows = tuple(label for place in of_rows for label in dims[place] or ())
    index = _number_of_row(context, [(source.size(place), given[place]) for place in of_rows])
    move = Move("pick", rows, (context.outer(index),))
    space = held.space.after(move, Label(call.out.size(first)))
    assert space.result is not None
    taken, picked = context.read(held), (*dims[:first], (space.result,), *dims[behind:])
    for place in reversed(of_rows):
        if dims[place] is None:  # of size 1
            taken = context.make("aten.select.int", taken, chunk_dim(dims, place), 0)
    for place in of_words:
        with context.outside():
            word = _from_start(given[place].long(), source.size(place)).unsqueeze(1)
        words = aligned(context, word, (*picked, None), (*call.out.shape, 1), space)
        taken = context.make("aten.gather.default", taken, 1, words)
        taken = context.make("aten.select.int", taken, 1, 0)
    return New(taken, picked, space)


def _number_of_row(context: Context, given: Sequence[tuple[Any, torch.Tensor]]) -> torch.Tensor:
    """Where rows are among all, from where they are in each dimension, and the sizes of these."""
    if len(given) == 1:
        return given[0][1]
    with context.outside():
        number = torch.zeros_like(given[0][1]).long()
        is_none = number < 0
        for size, index in given:
            index = _from_start(index.long(), size)
            number, is_none = number * size + index, is_none | (index < 0) | (index >= size)
        # A place that there is not must not become one of the next row: this is an error, too.
        return number.masked_fill(is_none, torch.iinfo(torch.int64).max)
