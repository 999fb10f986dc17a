"""What fills, copies, and puts together."""

import torch

from ..graph import same
from ..op import RowCount
from .alignment import aligned, along, chunk_dim, ints, needed, space_of
from .call import Call, Context, Mixes, New, describe_call, plain
from .layout import Dim
from .values import rest_of


def like(context: Context, call: Call) -> New:
    held = along(context, call)
    if "size" in call.named and not (
        len(call.named["size"]) == len(held.sizes)
        and all(map(same, call.named["size"], held.sizes))
    ):
        raise Mixes(f"{describe_call(call.function)} has other rows than those that it looks at")
    name = call.name.split(".")[0]
    number = call.named.get("fill_value", 1 if "ones" in name else 0)
    made = context.make(
        "aten.full_like.default", context.read(held), *plain([number]), dtype=call.out.dtype
    )
    return New(made, held.finest, held.space)


def fill(context: Context, call: Call) -> New:
    held, value = along(context, call), call.named.get("value", 0)
    name, number = "aten.full_like.default", value
    if isinstance(value, torch.Tensor):
        if value.dim() or context.traced(value) is not None:
            raise Mixes("fill takes a number that is made of rows")
        number = context.constant(context.outer(value), ())
        zeros = context.make(name, context.read(held), 0)
        return New(context.make("aten.add.Tensor", zeros, number), held.finest, held.space)
    return New(context.make(name, context.read(held), *plain([number])), held.finest, held.space)


def copy(context: Context, call: Call) -> New:
    """``src``, in the form of ``self``."""
    held, source = along(context, call), call.named["src"]
    dims = held.finest
    value = aligned(context, source, dims, held.sizes, held.space)
    value = context.make("aten._to_copy.default", value, dtype=call.out.dtype)
    zeros = context.make("aten.full_like.default", context.read(held), 0, dtype=call.out.dtype)
    return New(context.make("aten.expand_as.default", value, zeros), dims, held.space)


def cat(context: Context, call: Call) -> New:
    space, tensors = space_of(context, call), call.named["tensors"]
    (held, *_) = (found for x in tensors if (found := context.traced(x)) is not None)
    if any(x.dim() != len(held.dims) for x in tensors):
        raise Mixes("cat joins an empty tensor")
    dims = held.finest
    place = needed(dims, call.named["dim"], call)
    parts = []
    for x in tensors:
        part = aligned(context, x, dims, tuple(x.shape), space)
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


def stack(context: Context, call: Call) -> New:
    space, tensors = space_of(context, call), call.named["tensors"]
    (held, *_) = (found for x in tensors if (found := context.traced(x)) is not None)
    dim = call.named["dim"] % (len(held.dims) + 1)
    dims: tuple[Dim, ...] = (*held.finest[:dim], None, *held.finest[dim:])
    if not all(context.traced(x) is not None for x in tensors):
        raise Mixes("stack joins rows and what has none")
    parts = [aligned(context, x, held.finest, held.sizes, space) for x in tensors]
    place = chunk_dim(dims, dim)
    return New(context.make("aten.stack.default", parts, place), dims, space)


def index_put(context: Context, call: Call) -> New:
    """``logits[mask] = number``."""
    held, indices, values = along(context, call), call.named["indices"], call.named["values"]
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
            mask = aligned(context, index, dims, held.sizes, held.space)
        elif place == 0 and index.dim() == len(dims):
            mask = aligned(context, index, dims, held.sizes, held.space)
        elif index.dim() == 1 and dims[place] is None and context.traced(index) is None:
            rest = [1] * len(held.rest)
            rest[sum(dim is None for dim in dims[:place])] = index.size(0)
            mask = context.constant(context.outer(index), ints(rest))
        else:
            raise Mixes("a mask of rows is not understood")
        made = context.make("aten.where.self", mask, number, context.read(held))
        return New(made, dims, held.space)
    if index.dtype == torch.int32 and context.traced(index) is None:
        with context.outside():
            index = index.long()
    is_of_words = index.dtype == torch.int64 and dims[place] is None
    if index.dim() == 1 and is_of_words and context.traced(index) is None:
        made = context.make(
            "aten.index_fill.int_Tensor",
            *(context.read(held), needed(dims, place, call)),
            *(context.constant(context.outer(index), ints(index.shape)), number),
        )
        return New(made, dims, held.space)
    raise Mixes("a write by an index is not understood")
