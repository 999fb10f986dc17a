"""What runs along dimensions that are no rows: scans, sorts, picks, reductions; sums over rows."""

from typing import Any

import torch

from ..graph import same
from .alignment import aligned, along, ints, needed
from .call import Call, Context, Mixes, New, Result, Summed, describe_call
from .layout import Dim, Space
from .values import Expression, Traced


def scan(context: Context, call: Call) -> Result | list[Result]:
    """Along a dimension that stays, perhaps with another size; other tensors lie beside."""
    held, first = along(context, call), call.function._schema.arguments[0].name
    name = "dim" if "dim" in call.named else "dims"
    dims = held.finest
    changed: dict[str, Any] = {
        first: context.read(held),
        name: needed(dims, call.named[name], call),
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
    return aligned(context, tensor, dims, tuple(tensor.shape), held.space)


def scan_with_index(context: Context, call: Call) -> Result | list[Result]:
    """The same, with an index, and perhaps a source, for all rows."""
    held, index = along(context, call), call.named["index"]
    if context.traced(index) is not None or index.dim() > 1:
        raise Mixes(f"{describe_call(call.function)} has an index that is made of rows")
    dims = held.finest
    changed: dict[str, Any] = {
        "self": context.read(held),
        "dim": needed(dims, call.named["dim"], call),
        "index": context.constant(context.outer(index), ints(index.shape)),
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


def reduction(context: Context, call: Call) -> Result | list[Result]:
    held, first = along(context, call), call.function._schema.arguments[0].name
    dims, given = held.finest, call.named.get("dim")
    keeps = bool(call.named.get("keepdim", False))
    listed = [given] if isinstance(given, int) else list(given or [])
    over = {dim % max(1, len(dims)) for dim in listed} or set(range(len(dims)))
    of_rows = {dim for dim in over if dims[dim] is not None}
    if of_rows:
        if call.name.split(".")[0] not in BY_DIMS:
            raise Mixes(f"{describe_call(call.function)} runs over rows")
        return _summed(context, call, held, over - of_rows)
    if not listed and dims and not isinstance(given, int) and _takes_one(call):
        raise Mixes(f"{describe_call(call.function)} runs over all dimensions at once")
    places = [needed(dims, dim, call) for dim in sorted(over)]
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
BY_DIMS = {"sum": "dim_IntList", "mean": "dim", "amax": "default", "amin": "default"}
_OF_ALL = {"max": "amax", "min": "amin"}


def _summed(context: Context, call: Call, held: Traced, over: set[int]) -> Summed:
    """The operation over the words ``over`` in each row, and then over rows."""
    name = call.name.split(".")[0]
    name = _OF_ALL.get(name, name)
    dims, value = held.finest, context.read(held)
    sizes = tuple(1 if number in over else size for number, size in enumerate(held.sizes))
    dtype = call.named.get("dtype")
    named = {"dtype": dtype} if dtype is not None else {}
    if over:
        places = [needed(dims, dim, call) for dim in sorted(over)]
        value = context.make(f"aten.{name}.{BY_DIMS[name]}", value, places, True, **named)
    partial = New(value, dims, held.space)

    def finish(tensor: torch.Tensor) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        others = [value for key, value in call.named.items() if key not in ("self", "dtype")]
        return call.function, (tensor, *others), named

    return Summed(partial, sizes, call.out.dtype if over else _dtype_of(call), finish)


def reduction_of_all(context: Context, call: Call) -> Summed:
    """``sum()`` and the like, without a dimension."""
    held = along(context, call)
    return _summed(context, call, held, {n for n, dim in enumerate(held.finest) if dim is None})


def _dtype_of(call: Call) -> torch.dtype:
    dtype: torch.dtype = call.named["self"].dtype
    return dtype
