"""How the tensors of an operation lie beside each other: which dimensions of a chunk are which."""

from collections.abc import Sequence
from typing import Any

import torch

from ..graph import Refused, same
from ..op import RowCount
from .call import Call, Context, Mixes, describe_call
from .layout import Dim, Space, finest
from .values import Expression, Traced, rest_of


def space_of(context: Context, call: Call) -> Space:
    found = {held.space for x in call.tensors if (held := context.traced(x)) is not None}
    if len(found) != 1:
        raise Mixes(f"{describe_call(call.function)} puts rows of different places together")
    return found.pop()


def check_rows(dims: tuple[Dim, ...], space: Space, name: str) -> tuple[Dim, ...]:
    dims = finest(dims)
    labels = [label for dim in dims if dim is not None for label in dim]
    if len(labels) != len(set(labels)) or set(labels) != set(space.finest):
        raise Mixes(f"{name} pairs rows with rows")
    return dims


def aligned(
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
            None if dim is None or (same(size, 1) and not same(whole, 1)) else dim
            for dim, size, whole in zip(wanted, tensor.shape, sizes[offset:], strict=True)
        )
        if all(dim is None for dim in own):
            kept = tuple(
                size for dim, size in zip(wanted, tensor.shape, strict=True) if dim is None
            )
            return context.constant(context.outer(tensor), ints(kept))
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
    return context.make("aten.reshape.default", value, [RowCount(), *ints(rest)])


def ints(sizes: Sequence[Any]) -> tuple[int, ...]:
    if not all(isinstance(size, int) for size in sizes):
        raise Refused("something else than the number of rows is a dynamic size")
    return tuple(sizes)


def broadcast(context: Context, call: Call, shape: Sequence[Any]) -> tuple[Dim, ...]:
    dims: list[Dim] = [None] * len(shape)
    for tensor in call.tensors:
        held = context.traced(tensor)
        if held is not None:
            for number, dim in enumerate(held.finest, len(shape) - tensor.dim()):
                if dim is not None:
                    if dims[number] not in (None, dim):
                        raise Mixes(f"{describe_call(call.function)} pairs rows with rows")
                    dims[number] = dim
    return check_rows(tuple(dims), space_of(context, call), describe_call(call.function))


def chunk_dim(dims: tuple[Dim, ...], dim: int) -> int | None:
    """Where a dimension is in a chunk; None if it is one of rows."""
    dim %= max(1, len(dims))
    if dims and dims[dim] is not None:
        return None
    return 1 + sum(other is None for other in dims[:dim])


def along(context: Context, call: Call) -> Traced:
    """The first argument, which the operation runs along."""
    held = context.traced(call.named[call.function._schema.arguments[0].name])
    if held is None:
        raise Mixes(f"{describe_call(call.function)} puts rows into what has none")
    return held


def needed(dims: tuple[Dim, ...], dim: Any, call: Call) -> Any:
    """``dim`` of a chunk; Mixes if it is one of rows."""
    if isinstance(dim, list | tuple):
        return [needed(dims, one, call) for one in dim]
    place = chunk_dim(dims, dim)
    if place is None:
        raise Mixes(f"{describe_call(call.function)} runs over rows")
    return place
