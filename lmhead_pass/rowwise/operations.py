"""Which ATen operations treat rows apart, and what they are on chunks of rows: one table.

Decided from what an operation does: it is elementwise, perhaps with broadcasts; it reduces, scans,
sorts or picks along a dimension that is no row; it only looks at its input in another shape. A sum
over rows ends what is done in chunks. All else mixes rows, as far as is known.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..graph import Refused, same
from ..op import RowCount
from .layout import Dim, Label, Move, Rows, Space, finest, reshaped
from .values import Expression, Expressions, Outer, Traced, View, rest_of


class Mixes(Refused):
    """An operation mixes rows, or nobody knows that it does not."""


@dataclass(frozen=True)
class New:
    """A result in memory of its own."""

    expression: Expression
    dims: tuple[Dim, ...]
    space: Space


@dataclass(frozen=True)
class Summed:
    """A result that is computed of ``partial``, a few numbers for each row, after all chunks."""

    partial: New
    sizes: tuple[Any, ...]
    """Of the partial."""
    dtype: torch.dtype
    """Of the partial."""
    finish: Callable[[torch.Tensor], tuple[Any, tuple[Any, ...], dict[str, Any]]]
    """The ATen operation and its arguments, for a tensor that stands for the partial."""


@dataclass(frozen=True)
class Quotient:
    """One sum by another."""

    total: Summed
    by: torch.Tensor
    """A fake tensor that is known outside of chunks."""


Result = New | Traced | Summed | Quotient | torch.Tensor


class Context(Protocol):
    """What operations ask of the tracer."""

    make: Expressions

    def traced(self, tensor: Any) -> Traced | None:
        """What is known of a tensor that is computed in chunks; None if it is not."""

    def read(self, traced: Traced) -> Expression:
        """What it holds now."""

    def outer(self, tensor: torch.Tensor) -> Outer:
        """What a tensor is that is not computed in chunks."""

    def by_row(self, outer: Outer, dims: tuple[Dim, ...], space: Space) -> Expression:
        """``[n, ...]``: an input with a value for each row."""

    def constant(self, outer: Outer, sizes: tuple[int, ...]) -> Expression:
        """An input that is the same for all rows."""

    def outside(self) -> AbstractContextManager[Any]:
        """A block in which what is computed is written down as well."""


@dataclass(frozen=True)
class Call:
    """A call of an ATen operation that writes to nothing."""

    function: Any
    named: dict[str, Any]
    """The arguments by name, defaults too."""
    out: Any

    @property
    def name(self) -> str:
        return f"{self.function._schema.name.split('::')[1]}.{self.function._overloadname}"

    @property
    def op(self) -> str:
        return f"aten.{self.name}"

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [one for one in _flat(self.named.values()) if isinstance(one, torch.Tensor)]

    def with_arguments(self, make: Expressions, changed: dict[str, Any]) -> Expression:
        """The operation with some arguments of its own and others ``changed``."""
        args, kwargs = [], {}
        for argument in self.function._schema.arguments:
            value = changed.get(argument.name, self.named[argument.name])
            if argument.kwarg_only:
                if argument.name not in _PLACES and value is not None:
                    kwargs[argument.name] = _plain(value)
            else:
                args.append(_plain(value))
        return make(self.op, *args, **kwargs)


_PLACES = ("device", "layout", "pin_memory", "non_blocking", "memory_format", "generator", "out")


def _flat(values: Any) -> list[Any]:
    found = []
    for value in values:
        found += _flat(value) if isinstance(value, list | tuple) else [value]
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        raise Refused(f"{value} is another number in another call")
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, torch.Tensor):
        raise Refused("a tensor is where none is understood")
    return value


def describe_call(function: Any) -> str:
    return str(function._schema.name.split("::")[1]).strip("_")


def rowwise(context: Context, call: Call) -> Result | list[Result]:
    """What ``call`` gives; Mixes if it may mix rows."""
    function = call.function
    if torch.Tag.nondeterministic_seeded in function.tags:
        raise Mixes(f"{describe_call(function)} draws random numbers")
    if function.namespace != "aten":
        raise Mixes(f"{function} is no operation of torch")
    handler = _TABLE.get(call.name) or _TABLE.get(call.name.split(".")[0])
    if handler is None and torch.Tag.pointwise in function.tags:
        handler = _pointwise
    if handler is None:
        raise Mixes(f"{describe_call(function)} is not known to treat rows apart")
    result: Result | list[Result] = handler(context, call)
    return result


# Layout.


def _space(context: Context, call: Call) -> Space:
    found = {held.space for x in call.tensors if (held := context.traced(x)) is not None}
    if len(found) != 1:
        raise Mixes(f"{describe_call(call.function)} puts rows of different places together")
    return found.pop()


def _check_rows(dims: tuple[Dim, ...], space: Space, name: str) -> tuple[Dim, ...]:
    dims = finest(dims)
    labels = [label for dim in dims if dim is not None for label in dim]
    if len(labels) != len(set(labels)) or set(labels) != set(space.finest):
        raise Mixes(f"{name} pairs rows with rows")
    return dims


def _aligned(
    context: Context,
    tensor: torch.Tensor,
    dims: tuple[Dim, ...],
    sizes: Sequence[Any],
    space: Space,
) -> Expression:
    """``tensor``, of which a result of ``dims`` and ``sizes`` is made, in the form of its chunk."""
    offset = len(dims) - tensor.dim()
    place = finest(dims)
    held = context.traced(tensor)
    own: tuple[Dim, ...]
    if held is not None:
        own = held.finest
    else:
        wanted = place[offset:]
        if any(
            dim is not None and not same(size, 1) and not same(size, whole)
            for dim, size, whole in zip(wanted, tensor.shape, sizes[offset:], strict=True)
        ):
            raise Mixes("rows are put together with what has another number of rows")
        own = tuple(
            None if dim is None or same(size, 1) else dim
            for dim, size in zip(wanted, tensor.shape, strict=True)
        )
        if all(dim is None for dim in own):
            kept = tuple(
                size for dim, size in zip(wanted, tensor.shape, strict=True) if dim is None
            )
            return context.constant(context.outer(tensor), _ints(kept))
    rest = []
    for number, whole in enumerate(place):
        dim = None if number < offset else own[number - offset]
        size = 1 if number < offset else tensor.shape[number - offset]
        if whole is None:
            if dim is not None:
                raise Mixes("rows are put together with words")
            rest.append(size)
        elif dim is None and not same(size, 1):
            raise Mixes("rows are put together with words")
        elif dim is not None and dim != whole:
            raise Mixes("rows are put together with other rows")
    if held is not None:
        value, has = context.read(held), held.rest
    else:
        value = context.by_row(context.outer(tensor), own, space)
        has = rest_of(own, tuple(tensor.shape))
    if tuple(rest) == tuple(has):
        return value
    return context.make("aten.reshape.default", value, [RowCount(), *_ints(rest)])


def _ints(sizes: Sequence[Any]) -> tuple[int, ...]:
    if not all(isinstance(size, int) for size in sizes):
        raise Refused("something else than the number of rows is a dynamic size")
    return tuple(sizes)


def _broadcast(context: Context, call: Call, shape: Sequence[Any]) -> tuple[Dim, ...]:
    dims: list[Dim] = [None] * len(shape)
    for tensor in call.tensors:
        held = context.traced(tensor)
        if held is not None:
            for number, dim in enumerate(held.finest, len(shape) - tensor.dim()):
                if dim is not None:
                    if dims[number] not in (None, dim):
                        raise Mixes(f"{describe_call(call.function)} pairs rows with rows")
                    dims[number] = dim
    return _check_rows(tuple(dims), _space(context, call), describe_call(call.function))


def _pointwise(context: Context, call: Call) -> New:
    if not isinstance(call.out, torch.Tensor):
        raise Mixes(f"{describe_call(call.function)} is not known to treat rows apart")
    space, dims = _space(context, call), _broadcast(context, call, call.out.shape)

    def aligned(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [aligned(part) for part in value]
        if isinstance(value, torch.Tensor):
            return _aligned(context, value, dims, call.out.shape, space)
        return value

    changed = {name: aligned(value) for name, value in call.named.items()}
    return New(call.with_arguments(context.make, changed), dims, space)


# Dimensions.


def _chunk_dim(dims: tuple[Dim, ...], dim: int) -> int | None:
    """Where a dimension is in a chunk; None if it is one of rows."""
    dim %= max(1, len(dims))
    if dims and dims[dim] is not None:
        return None
    return 1 + sum(other is None for other in dims[:dim])


def _along(context: Context, call: Call) -> Traced:
    """The first argument, which the operation runs along."""
    held = context.traced(call.named[call.function._schema.arguments[0].name])
    if held is None:
        raise Mixes(f"{describe_call(call.function)} puts rows into what has none")
    return held


def _needed(dims: tuple[Dim, ...], dim: Any, call: Call) -> Any:
    """``dim`` of a chunk; Mixes if it is one of rows."""
    if isinstance(dim, list | tuple):
        return [_needed(dims, one, call) for one in dim]
    place = _chunk_dim(dims, dim)
    if place is None:
        raise Mixes(f"{describe_call(call.function)} runs over rows")
    return place


def _scan(context: Context, call: Call) -> Result | list[Result]:
    """Along a dimension that stays, perhaps with another size; other tensors lie beside."""
    held, first = _along(context, call), call.function._schema.arguments[0].name
    name = "dim" if "dim" in call.named else "dims"
    dims = held.finest
    changed: dict[str, Any] = {
        first: context.read(held),
        name: _needed(dims, call.named[name], call),
    }
    for other, value in call.named.items():
        if isinstance(value, torch.Tensor) and other != first:
            changed[other] = _beside(context, value, held, call)
    made = call.with_arguments(context.make, changed)
    return _results(context, call, made, dims, held.space)


def _beside(context: Context, tensor: torch.Tensor, held: Traced, call: Call) -> Expression:
    """``tensor``, with the rows of ``held`` in the same places."""
    dims = held.finest
    if tensor.dim() != len(dims) or any(
        dim is not None and not same(size, whole)
        for dim, size, whole in zip(dims, tensor.shape, held.sizes, strict=True)
    ):
        raise Mixes(f"{describe_call(call.function)} is given other rows than those that it reads")
    return _aligned(context, tensor, dims, tuple(tensor.shape), held.space)


def _scan_with_index(context: Context, call: Call) -> Result | list[Result]:
    """The same, with an index, and perhaps a source, for all rows."""
    held, index = _along(context, call), call.named["index"]
    if context.traced(index) is not None or index.dim() > 1:
        raise Mixes(f"{describe_call(call.function)} has an index that is made of rows")
    dims = held.finest
    changed: dict[str, Any] = {
        "self": context.read(held),
        "dim": _needed(dims, call.named["dim"], call),
        "index": context.constant(context.outer(index), _ints(index.shape)),
    }
    for name in ("source", "value"):
        value = call.named.get(name)
        if isinstance(value, torch.Tensor):
            if value.dim() == 0 and context.traced(value) is None:
                changed[name] = context.constant(context.outer(value), ())
            else:
                changed[name] = _beside(context, value, held, call)
    made = call.with_arguments(context.make, changed)
    return _results(context, call, made, dims, held.space)


def _results(
    context: Context, call: Call, made: Expression, dims: tuple[Dim, ...], space: Space
) -> Result | list[Result]:
    if isinstance(call.out, torch.Tensor):
        return New(made, dims, space)
    return [
        New(context.make("getitem", made, number), dims, space) for number in range(len(call.out))
    ]


def _reduced(dims: tuple[Dim, ...], over: set[int], keeps: bool) -> tuple[Dim, ...]:
    return tuple(
        None if number in over else dim
        for number, dim in enumerate(dims)
        if keeps or number not in over
    )


def _reduction(context: Context, call: Call) -> Result | list[Result]:
    held, first = _along(context, call), call.function._schema.arguments[0].name
    dims, given = held.finest, call.named.get("dim")
    keeps = bool(call.named.get("keepdim", False))
    listed = [given] if isinstance(given, int) else list(given or [])
    over = {dim % max(1, len(dims)) for dim in listed} or set(range(len(dims)))
    of_rows = {dim for dim in over if dims[dim] is not None}
    if of_rows:
        if call.name.split(".")[0] not in _SPLIT:
            raise Mixes(f"{describe_call(call.function)} runs over rows")
        return _summed(context, call, held, over - of_rows)
    if not listed and dims and not isinstance(given, int) and _takes_one(call):
        raise Mixes(f"{describe_call(call.function)} runs over all dimensions at once")
    places = [_needed(dims, dim, call) for dim in sorted(over)]
    changed: dict[str, Any] = {
        first: context.read(held),
        "dim": places[0] if isinstance(given, int) or _takes_one(call) else places,
    }
    made = call.with_arguments(context.make, changed)
    return _results(context, call, made, _reduced(dims, over, keeps), held.space)


def _takes_one(call: Call) -> bool:
    """Whether the operation takes a single dimension, or none for all."""
    (kind,) = (str(a.type) for a in call.function._schema.arguments if a.name == "dim")
    return kind in ("int", "Optional[int]")


# Sums over rows: what is summed over the words first is then summed over rows.
_SPLIT = {"sum": "dim_IntList", "mean": "dim", "amax": "default", "amin": "default"}
_SPLIT_OF_ALL = {"sum": "sum", "mean": "mean", "max": "amax", "min": "amin"}


def _summed(context: Context, call: Call, held: Traced, over: set[int]) -> Summed:
    name = call.name.split(".")[0]
    dims, value = held.finest, context.read(held)
    sizes = tuple(1 if number in over else size for number, size in enumerate(held.sizes))
    dtype = call.named.get("dtype")
    named = {"dtype": dtype} if dtype is not None else {}
    if over:
        places = [_needed(dims, dim, call) for dim in sorted(over)]
        value = context.make(f"aten.{name}.{_SPLIT[name]}", value, places, True, **named)
    partial = New(value, dims, held.space)

    def finish(tensor: torch.Tensor) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        others = [value for key, value in call.named.items() if key not in ("self", "dtype")]
        return call.function, (tensor, *others), named

    return Summed(partial, sizes, call.out.dtype if over else _dtype_of(call), finish)


def _reduction_of_all(context: Context, call: Call) -> Summed:
    """``sum()`` and the like, without a dimension."""
    held = _along(context, call)
    name = _SPLIT_OF_ALL[call.name.split(".")[0]]
    dims, value = held.finest, context.read(held)
    over = [number for number, dim in enumerate(dims) if dim is None]
    dtype = call.named.get("dtype")
    named = {"dtype": dtype} if dtype is not None else {}
    if over:
        places = [_needed(dims, dim, call) for dim in over]
        value = context.make(f"aten.{name}.{_SPLIT[name]}", value, places, True, **named)
    sizes = tuple(1 if number in over else size for number, size in enumerate(held.sizes))
    return Summed(
        New(value, dims, held.space),
        sizes,
        call.out.dtype if over else _dtype_of(call),
        lambda tensor: (call.function, (tensor,), named),
    )


def _dtype_of(call: Call) -> torch.dtype:
    dtype: torch.dtype = call.named["self"].dtype
    return dtype


# Views.


def _viewed(
    held: Traced, call: Call, dims: tuple[Dim, ...], view: View | None, space: Space | None = None
) -> Traced:
    views = held.views if view is None else (*held.views, view)
    return Traced(held.cell, views, dims, tuple(call.out.shape), space or held.space)


def _same(context: Context, call: Call) -> Traced:
    held = _along(context, call)
    return _viewed(held, call, held.finest, None)


def _copied(context: Context, call: Call) -> New:
    held = _along(context, call)
    return New(context.read(held), held.finest, held.space)


def _reshape(context: Context, call: Call) -> Traced:
    held = _along(context, call)
    dims = _check_rows(
        reshaped(held.dims, held.sizes, call.out.shape), held.space, describe_call(call.function)
    )
    before, after = held.rest, rest_of(dims, tuple(call.out.shape))
    view = None if before == after else View("reshape", before, after)
    return _viewed(held, call, dims, view)


def _permute(context: Context, call: Call) -> Traced:
    held = _along(context, call)
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
    places = [_chunk_dim(dims, dim) for dim in order if dims[dim] is None]
    moved = (0, *(place for place in places if place is not None))
    is_moved = list(moved) != sorted(moved)
    view = View("permute", held.rest, moved) if is_moved else None
    return _viewed(held, call, tuple(dims[dim] for dim in order), view)


def _expand(context: Context, call: Call) -> Traced:
    held = _along(context, call)
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


def _slice(context: Context, call: Call) -> Traced:
    held, dim = _along(context, call), call.named["dim"]
    dims = held.finest
    start, stop, step = (call.named[name] for name in ("start", "end", "step"))
    return _part(held, call, dims, dim, (start, stop, step), call.out)


def _part(
    held: Traced, call: Call, dims: tuple[Dim, ...], dim: int, numbers: tuple[Any, ...], out: Any
) -> Traced:
    """A slice of dimension ``dim``."""
    place, whole = _chunk_dim(dims, dim), held.sizes[dim]
    start, stop, step = numbers
    if same(out.size(dim), whole) and step == 1:
        return Traced(held.cell, held.views, dims, tuple(out.shape), held.space)
    if place is not None:
        view = View("slice", held.rest, (place, *_plain([start, stop, step])))
        return Traced(held.cell, (*held.views, view), dims, tuple(out.shape), held.space)
    label = Label(out.size(dim))
    space = held.space.after(Move("slice", _rows(dims, dim), tuple(_plain(list(numbers)))), label)
    return Traced(held.cell, held.views, _with(dims, dim, space), tuple(out.shape), space)


def _rows(dims: tuple[Dim, ...], dim: int) -> Rows:
    rows = dims[dim]
    assert rows is not None
    return rows


def _with(dims: tuple[Dim, ...], dim: int, space: Space) -> tuple[Dim, ...]:
    assert space.result is not None
    return tuple((space.result,) if n == dim % len(dims) else one for n, one in enumerate(dims))


def _select(context: Context, call: Call) -> Traced:
    held, dim, index = _along(context, call), call.named["dim"], call.named["index"]
    dims = held.finest
    return _one(held, dims, dim % len(dims), index, call.out)


def _one(held: Traced, dims: tuple[Dim, ...], dim: int, index: Any, out: Any) -> Traced:
    """Place ``index`` of dimension ``dim``."""
    place, (index,) = _chunk_dim(dims, dim), _plain([index])
    others = (*dims[:dim], *dims[dim + 1 :])
    if place is not None:
        view = View("select", held.rest, (place, index))
        return Traced(held.cell, (*held.views, view), others, tuple(out.shape), held.space)
    space = held.space.after(Move("select", _rows(dims, dim), (index,)), None)
    return Traced(held.cell, held.views, others, tuple(out.shape), space)


def _split(context: Context, call: Call) -> list[Result]:
    held, dim = _along(context, call), call.named["dim"]
    dims, found, start = held.finest, list[Result](), 0
    for out in call.out:
        stop = start + out.size(dim)
        found.append(_part(held, call, dims, dim % len(dims), (start, stop, 1), out))
        start = stop
    return found


def _unbind(context: Context, call: Call) -> list[Result]:
    held = _along(context, call)
    dims = held.finest
    dim = call.named["dim"] % len(dims)
    return [_one(held, dims, dim, number, out) for number, out in enumerate(call.out)]


def _index(context: Context, call: Call) -> Result:
    held, indices = _along(context, call), call.named["indices"]
    dims = held.finest
    given = [(place, index) for place, index in enumerate(indices) if index is not None]
    if len(given) == 1:
        place, index = given[0]
        is_plain = index.dtype in (torch.int64, torch.int32) and index.dim() == 1
        if is_plain and dims[place] is None and context.traced(index) is None:
            made = context.make(
                "aten.index_select.default",
                *(context.read(held), _needed(dims, place, call)),
                context.constant(context.outer(index), _ints(index.shape)),
            )
            return New(made, dims, held.space)
    raise Mixes(f"{describe_call(call.function)} picks rows")


# What fills, copies, puts together.


def _like(context: Context, call: Call) -> New:
    held = _along(context, call)
    if "size" in call.named and not (
        len(call.named["size"]) == len(held.sizes)
        and all(map(same, call.named["size"], held.sizes))
    ):
        raise Mixes(f"{describe_call(call.function)} has other rows than those that it looks at")
    name = call.name.split(".")[0]
    number = call.named.get("fill_value", 1 if "ones" in name else 0)
    made = context.make(
        "aten.full_like.default", context.read(held), *_plain([number]), dtype=call.out.dtype
    )
    return New(made, held.finest, held.space)


def _fill(context: Context, call: Call) -> New:
    held, value = _along(context, call), call.named.get("value", 0)
    name, number = "aten.full_like.default", value
    if isinstance(value, torch.Tensor):
        if value.dim() or context.traced(value) is not None:
            raise Mixes("fill takes a number that is made of rows")
        number = context.constant(context.outer(value), ())
        zeros = context.make(name, context.read(held), 0)
        return New(context.make("aten.add.Tensor", zeros, number), held.finest, held.space)
    return New(context.make(name, context.read(held), *_plain([number])), held.finest, held.space)


def _copy(context: Context, call: Call) -> New:
    """``src``, in the form of ``self``."""
    held, source = _along(context, call), call.named["src"]
    dims = held.finest
    value = _aligned(context, source, dims, held.sizes, held.space)
    value = context.make("aten._to_copy.default", value, dtype=call.out.dtype)
    zeros = context.make("aten.full_like.default", context.read(held), 0, dtype=call.out.dtype)
    return New(context.make("aten.expand_as.default", value, zeros), dims, held.space)


def _cat(context: Context, call: Call) -> New:
    space, tensors = _space(context, call), call.named["tensors"]
    (held, *_) = (found for x in tensors if (found := context.traced(x)) is not None)
    if any(x.dim() != len(held.dims) for x in tensors):
        raise Mixes("cat joins an empty tensor")
    dims = held.finest
    place = _needed(dims, call.named["dim"], call)
    parts = []
    for x in tensors:
        part = _aligned(context, x, dims, tuple(x.shape), space)
        sizes = rest_of(dims, tuple(x.shape))
        if context.traced(x) is None:  # a constant has no rows yet
            part = context.make("aten.expand.default", part, [RowCount(), *sizes])
        parts.append(part)
        if any(
            d is not None and not same(a, b)
            for d, a, b in zip(dims, x.shape, held.sizes, strict=True)
        ):
            raise Mixes("cat joins other rows")
    return New(context.make("aten.cat.default", parts, place), dims, space)


def _stack(context: Context, call: Call) -> New:
    space, tensors = _space(context, call), call.named["tensors"]
    (held, *_) = (found for x in tensors if (found := context.traced(x)) is not None)
    dim = call.named["dim"] % (len(held.dims) + 1)
    dims: tuple[Dim, ...] = (*held.finest[:dim], None, *held.finest[dim:])
    if not all(context.traced(x) is not None for x in tensors):
        raise Mixes("stack joins rows and what has none")
    parts = [_aligned(context, x, held.finest, held.sizes, space) for x in tensors]
    place = _chunk_dim(dims, dim)
    return New(context.make("aten.stack.default", parts, place), dims, space)


def _index_put(context: Context, call: Call) -> New:
    """``logits[mask] = number``."""
    held, indices, values = _along(context, call), call.named["indices"], call.named["values"]
    given = [(place, index) for place, index in enumerate(indices) if index is not None]
    dims = held.finest
    is_number = values.dim() == 0 and context.traced(values) is None
    if len(given) != 1 or call.named["accumulate"] or not is_number:
        raise Mixes("a write by an index is not understood")
    place, index = given[0]
    number = context.constant(context.outer(values), ())
    if index.dtype == torch.bool:
        shape = (*([1] * place), *index.shape, *([1] * (len(dims) - place - index.dim())))
        if not all(
            same(size, 1) or same(size, whole)
            for size, whole in zip(shape, held.sizes, strict=True)
        ):
            raise Mixes("a mask has other rows than what it masks")
        if place == 0 and context.traced(index) is None:
            with context.outside():
                index = index.reshape(shape)
            mask = _aligned(context, index, dims, held.sizes, held.space)
        elif place == 0 and index.dim() == len(dims):
            mask = _aligned(context, index, dims, held.sizes, held.space)
        elif index.dim() == 1 and dims[place] is None and context.traced(index) is None:
            rest = [1] * len(held.rest)
            rest[sum(dim is None for dim in dims[:place])] = index.size(0)
            mask = context.constant(context.outer(index), _ints(rest))
        else:
            raise Mixes("a mask of rows is not understood")
        made = context.make("aten.where.self", mask, number, context.read(held))
        return New(made, dims, held.space)
    if index.dim() == 1 and dims[place] is None and context.traced(index) is None:
        made = context.make(
            "aten.index_fill.int_Tensor",
            *(context.read(held), _needed(dims, place, call)),
            *(context.constant(context.outer(index), _ints(index.shape)), number),
        )
        return New(made, dims, held.space)
    raise Mixes("a write by an index is not understood")


# Losses with a reduction.


def _reduced_loss(context: Context, call: Call) -> Result:
    """An elementwise loss that is reduced in the same operation."""
    reduction = call.named["reduction"]
    if any(x.dim() > call.named["self"].dim() for x in call.tensors):
        raise Mixes(f"{describe_call(call.function)} repeats rows")
    shape = call.out.shape if reduction == 0 else call.named["self"].shape
    space, dims = _space(context, call), _broadcast(context, call, shape)
    changed = {
        name: _aligned(context, value, dims, shape, space)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in call.named.items()
    }
    value = call.with_arguments(context.make, {**changed, "reduction": 0})
    if reduction == 0:
        return New(value, dims, space)
    name = "mean" if reduction == 1 else "sum"
    over = [number for number, dim in enumerate(dims) if dim is None]
    if over:
        places = [_needed(dims, dim, call) for dim in over]
        value = context.make(f"aten.{name}.{_SPLIT[name]}", value, places, True)
    sizes = tuple(1 if number in over else size for number, size in enumerate(shape))
    function = getattr(torch.ops.aten, name).default
    dtype = call.out.dtype
    return Summed(New(value, dims, space), sizes, dtype, lambda tensor: (function, (tensor,), {}))


def _nll_loss(context: Context, call: Call) -> list[Result]:
    held, target = _along(context, call), call.named["target"]
    weight, ignored = call.named["weight"], call.named["ignore_index"]
    dims = held.finest
    class_dim = 1 if len(dims) > 1 else 0
    if [number for number, dim in enumerate(dims) if dim is None and number != class_dim and
        not same(held.sizes[number], 1)] or dims[class_dim] is not None:  # fmt: skip
        raise Mixes("nll_loss takes its classes from rows")
    others = (*dims[:class_dim], *dims[class_dim + 1 :])
    sizes = (*held.sizes[:class_dim], *held.sizes[class_dim + 1 :])
    make = context.make
    words = held.sizes[class_dim]
    value = make("aten.reshape.default", context.read(held), [RowCount(), words])
    index = _aligned(context, target, others, sizes, held.space)
    index = make("aten.reshape.default", index, [RowCount()])
    given = None
    if weight is not None:
        if context.traced(weight) is not None:
            raise Mixes("nll_loss has class weights that are made of rows")
        given = context.constant(context.outer(weight), _ints(weight.shape))
    loss = make(
        "getitem", make("aten.nll_loss_forward.default", value, index, given, 0, ignored), 0
    )
    loss = make("aten.reshape.default", loss, [RowCount(), *rest_of(others, sizes)])
    partial = New(loss, others, held.space)
    reduction = call.named["reduction"]
    if reduction == 0:
        return [partial, partial]
    aten = torch.ops.aten
    dtype = call.out[0].dtype
    total = Summed(partial, sizes, dtype, lambda tensor: (aten.sum.default, (tensor,), {}))
    if reduction == 2:
        return [total, total]
    if context.traced(target) is not None:
        raise Mixes("nll_loss has targets that are made of rows")
    with context.outside():
        counted = target != ignored
        if weight is not None:
            counted = weight[target * counted] * counted
        count = counted.sum().to(call.out[0].dtype)
    return [Quotient(total, count), count]


def _names(handler: Any, *names: str) -> dict[str, Any]:
    return dict.fromkeys(names, handler)


_TABLE: dict[str, Callable[[Context, Call], Any]] = {
    # Elementwise, though torch does not say so.
    **_names(_pointwise, "_to_copy", "where", "masked_fill", "clamp", "nan_to_num", "xlogy"),
    **_names(_pointwise, "logical_and", "logical_or", "logical_not", "isnan", "isinf"),
    **_names(_copied, "clone"),
    # Along a dimension that stays.
    **_names(_scan, "_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp", "cummax"),
    **_names(_scan, "cummin", "sort", "topk", "flip", "gather", "scatter", "scatter_add"),
    **_names(_scan, "scatter_reduce", "glu"),
    **_names(_scan_with_index, "index_select", "index_fill", "index_add", "index_copy"),
    # Over a dimension that goes.
    **_names(
        _reduction, "sum.dim_IntList", "mean.dim", "amax", "amin", "logsumexp", "prod.dim_int"
    ),
    **_names(_reduction, "any.dim", "any.dims", "all.dim", "all.dims", "argmax", "argmin"),
    **_names(_reduction, "max.dim", "min.dim", "median.dim", "nanmedian.dim", "mode", "kthvalue"),
    **_names(_reduction, "var.correction", "std.correction", "var_mean.correction"),
    **_names(_reduction, "std_mean.correction", "linalg_vector_norm"),
    **_names(_reduction, "count_nonzero"),
    **_names(_reduction_of_all, "sum.default", "mean.default", "max.default", "min.default"),
    # Other shapes.
    **_names(_same, "alias", "detach"),
    **_names(_reshape, "view", "_unsafe_view", "unsqueeze", "squeeze"),
    **_names(_permute, "permute", "transpose", "t"),
    **_names(_expand, "expand"),
    **_names(_slice, "slice"),
    **_names(_select, "select"),
    **_names(_split, "split", "split_with_sizes"),
    **_names(_unbind, "unbind"),
    **_names(_index, "index"),
    # Other values.
    **_names(_like, "zeros_like", "ones_like", "full_like", "empty_like"),
    **_names(_like, "new_zeros", "new_ones", "new_full", "new_empty"),
    **_names(_fill, "fill", "zero"),
    **_names(_copy, "copy"),
    **_names(_cat, "cat"),
    **_names(_stack, "stack"),
    **_names(_index_put, "index_put"),
    # Losses.
    **_names(_reduced_loss, "mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy"),
    **_names(_reduced_loss, "binary_cross_entropy_with_logits"),
    **_names(_nll_loss, "nll_loss_forward", "nll_loss2d_forward"),
}
