"""Recognises a weighted sum of per-row losses, whose weights are known before the losses are.

``(losses * mask).sum() / mask.sum()``: what the backward will multiply each row's gradient by is,
but for one number, ``mask``. So the gradients can be computed in the forward.
"""

from itertools import pairwise
from typing import Any

import torch
from torch.fx import Node

from .emitter import Emitter, size_of
from .match import Weighting
from .softmaxes import summed_dims
from .spelling import arguments, operation
from .tensors import is_number, same, tensor_of, value_of


def weighted_sum(losses: Node) -> Weighting | None:
    """The nodes from ``losses`` to a single number that is a weighted sum of them; else None."""
    nodes = [losses]
    while tensor_of(nodes[-1]).dim() > 0:
        after = _only_user(nodes[-1])
        if after is None or not tensor_of(after).requires_grad:
            return None
        is_reduced = any(operation(node) in ("sum", "mean") for node in nodes)
        if not _is_linear(nodes[-1], after, is_reduced):
            return None
        nodes.append(after)
    return Weighting(tuple(nodes[1:])) if len(nodes) > 1 else None


def _only_user(node: Node) -> Node | None:
    users = list(node.users)
    if len(users) != 1 or not isinstance(value_of(users[0]), torch.Tensor):
        return None
    uses = sum(argument is node for argument in (*users[0].args, *users[0].kwargs.values()))
    return users[0] if uses == 1 else None


def _is_linear(before: Node, after: Node, is_reduced: bool) -> bool:
    """Whether ``after`` is a sum of what ``before`` holds, or a product with what is known."""
    name = operation(after)
    if name in ("sum", "mean"):
        return reduced_dims(after) is not None
    if name in ("mul", "div"):
        factor = other_operand(before, after)
        return factor is not None and _is_known(before, after, factor)
    if name in ("where", "masked_fill"):
        mask = kept_rows(before, after)
        return mask is not None and _is_known(before, after, mask[0])
    if name == "reshape":
        return not is_reduced and not after.kwargs and after.args[0] is before
    return name in ("cast", "neg")


def other_operand(before: Node, after: Node) -> Any:
    """What ``after`` multiplies ``before`` with, or divides it by; None if it is not that."""
    call = arguments(after, lambda input, other: locals())
    if call is None:
        return None
    if call["input"] is before:
        return call["other"]
    return call["input"] if operation(after) == "mul" else None


def kept_rows(before: Node, after: Node) -> tuple[Node, bool] | None:
    """A mask with which ``after`` sets losses to 0, and whether it says which are kept.

    None if ``after`` is other than that.
    """
    call: dict[str, Any] | None
    if operation(after) == "masked_fill":
        call = arguments(after, lambda input, mask, value: locals())
        if call is not None and call["input"] is before and _is_zero(call["value"]):
            return call["mask"], False
        return None
    if after.op == "call_method":  # losses.where(mask, 0)
        call = arguments(after, lambda input, condition, other: locals())
    else:
        call = arguments(after, lambda condition, input=None, other=None: locals())
    if call is None or not isinstance(call["condition"], Node):
        return None
    if call["input"] is before and _is_zero(call["other"]):
        return call["condition"], True
    if call["other"] is before and _is_zero(call["input"]):
        return call["condition"], False
    return None


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value == 0


def _is_known(before: Node, after: Node, factor: Any) -> bool:
    if is_number(factor):
        return True
    shapes = tensor_of(before).shape, tensor_of(after).shape
    return (
        not tensor_of(factor).requires_grad
        and len(shapes[0]) == len(shapes[1])
        and all(map(same, *shapes))
    )


def reduced_dims(node: Node) -> tuple[tuple[int, ...], bool] | None:
    """The dimensions that a sum or mean runs over, counted from the front, and whether it keeps
    them; None if that is not clear."""
    reduction = summed_dims(node)
    if reduction is None:
        return None
    dims, keeps = reduction
    rank = tensor_of(node.args[0] if node.args else node.kwargs["input"]).dim()
    if dims is None:
        return tuple(range(rank)), keeps
    dims = (dims,) if isinstance(dims, int) else dims
    if not isinstance(dims, tuple | list) or not all(isinstance(dim, int) for dim in dims):
        return None
    return tuple(dim % rank for dim in dims), keeps


def emit_weights(emit: Emitter, losses: Node, weighting: Weighting, target: Node) -> Node:
    """``[N]``: the weight of each row of ``losses``, which has the shape of ``target``."""
    dtype = torch.promote_types(tensor_of(losses).dtype, torch.float32)
    weights = emit(torch.ones_like, target, dtype=dtype)
    # Weights keep the dimensions that losses are summed over: which ones losses still have, ...
    kept = list(range(tensor_of(losses).dim()))
    summed: set[int] = set()  # ... and which of those have a size of 1.
    for before, node in pairwise((losses, *weighting.nodes)):
        name = operation(node)
        if name == "reshape":
            weights = emit(node.target, weights, *node.args[1:])
            kept = list(range(tensor_of(node).dim()))
        elif name == "neg":
            weights = emit("neg", weights)
        elif name in ("mul", "div"):
            weights = emit(name, weights, _spread(emit, other_operand(before, node), kept, weights))
        elif (mask := kept_rows(before, node)) is not None and name in ("where", "masked_fill"):
            dropped = emit("logical_not", mask[0]) if mask[1] else mask[0]
            weights = emit("masked_fill", weights, _spread(emit, dropped, kept, weights), 0)
        elif (reduction := reduced_dims(node)) is not None and name in ("sum", "mean"):
            dims = {kept[dim] for dim in reduction[0]}
            if name == "mean":
                for dim in dims - summed:
                    weights = emit("div", weights, size_of(emit, weights, dim))
            summed |= dims
            if not reduction[1]:
                kept = [dim for dim in kept if dim not in dims]
    return emit("reshape", weights, -1)


def _spread(emit: Emitter, factor: Any, kept: list[int], weights: Node) -> Any:
    """``factor``, whose dimensions are the last of ``kept``, with all dimensions of ``weights``."""
    if is_number(factor):
        return factor
    rank = tensor_of(weights).dim()
    for dim in reversed(range(rank)):
        behind = rank - 1 - dim
        if dim not in kept and tensor_of(factor).dim() >= behind:
            factor = emit("unsqueeze", factor, -1 - behind)
    return factor
