"""What looks at the same values in another shape, or at some of them."""

from typing import Any

import torch

from ..graph import same
from .alignment import along, check_rows, chunk_dim, ints, needed
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
    if len(given) == 1:
        place, index = given[0]
        is_plain = index.dtype in (torch.int64, torch.int32) and index.dim() == 1
        if is_plain and dims[place] is None and context.traced(index) is None:
            with context.outside():  # index_select counts none from the end
                index = torch.where(index < 0, index + call.named["self"].size(place), index)
            made = context.make(
                "aten.index_select.default",
                *(context.read(held), needed(dims, place, call)),
                context.constant(context.outer(index), ints(index.shape)),
            )
            return New(made, dims, held.space)
    raise Mixes(f"{describe_call(call.function)} picks rows")
