"""Losses of torch that are reduced in one operation."""

import torch

from ..graph import same
from ..op import RowCount
from .alignment import aligned, along, broadcast, ints, needed, space_of
from .along_words import BY_DIMS
from .call import Call, Context, Mixes, New, Quotient, Result, Summed, describe_call
from .values import rest_of


def reduced_loss(context: Context, call: Call) -> Result:
    """An elementwise loss that is reduced in the same operation."""
    reduction = call.named["reduction"]
    if any(x.dim() > call.named["self"].dim() for x in call.tensors):
        raise Mixes(f"{describe_call(call.function)} repeats rows")
    shape = call.out.shape if reduction == 0 else call.named["self"].shape
    space, dims = space_of(context, call), broadcast(context, call, shape)
    changed = {
        name: aligned(context, value, dims, shape, space)
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
        places = [needed(dims, dim, call) for dim in over]
        value = context.make(f"aten.{name}.{BY_DIMS[name]}", value, places, True)
    sizes = tuple(1 if number in over else size for number, size in enumerate(shape))
    function = getattr(torch.ops.aten, name).default
    dtype = call.out.dtype
    return Summed(New(value, dims, space), sizes, dtype, lambda tensor: (function, (tensor,), {}))


def nll_loss(context: Context, call: Call) -> list[Result]:
    held, target = along(context, call), call.named["target"]
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
    index = aligned(context, target, others, sizes, held.space)
    index = make("aten.reshape.default", index, [RowCount()])
    if target.dtype != torch.uint8:  # Inductor takes other integers than ATen's.
        index = make("aten._to_copy.default", index, dtype=torch.int64)
    if not isinstance(ignored, int):
        raise Mixes("nll_loss has an ignore_index that changes")
    given = None
    if weight is not None:
        if context.traced(weight) is not None:
            raise Mixes("nll_loss has class weights that are made of rows")
        given = context.constant(context.outer(weight), ints(weight.shape))
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
