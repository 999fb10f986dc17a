"""Recognises a weighted sum of numbers of each row, whose weights are known before these are.

``(losses * mask).sum() / mask.sum()``: what the backward will multiply each row's gradient by is,
but for one number, ``mask``. So the gradients can be computed in the forward. The same holds for
the squares of log-sum-exps in a z-loss.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from . import mutation
from .emitter import Emitter, size_of
from .match import Weighting
from .softmaxes import summed_dims
from .spelling import arguments, operation
from .tensors import is_cut_off, is_number, is_plain, same, same_shape, tensor_of, value_of


def weighted_sum(values: Node) -> Weighting | None:
    """The nodes from ``values`` to a number that is a weighted sum of them alone; else None.

    Nothing else reads any of them.
    """
    return _weighting(values, with_others=False)


def weighted_sum_of_others_too(values: Node) -> Weighting | None:
    """The nodes by which a gradient comes to ``values``, or to their squares, from a number.

    It is a weighted sum of them and of what is added on the way; None if it is not. Others may read
    any of them, if no gradient comes from there.
    """
    return _weighting(values, with_others=True)


def _weighting(values: Node, with_others: bool) -> Weighting | None:
    nodes, power = [values], 1
    while tensor_of(nodes[-1]).dim() > 0:
        before = nodes[-1]
        after = differentiable_user(before) if with_others else _only_user(before)
        if after is None or not tensor_of(after).requires_grad:
            return None
        is_reduced = any(operation(node) in ("sum", "mean") for node in nodes)
        is_sum_already = is_reduced or any(operation(node) in ("add", "sub") for node in nodes[1:])
        if with_others and power == 1 and is_square(before, after) and not is_sum_already:
            power = 2
        elif not ((with_others and is_sum(before, after)) or _is_linear(before, after, is_reduced)):
            return None
        nodes.append(after)
    return Weighting(tuple(nodes[1:]), power) if len(nodes) > 1 else None


def _only_user(node: Node) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and _uses_once(users[0], node) else None


def differentiable_user(node: Node) -> Node | None:
    """Who alone passes a gradient back to ``node``; None if that is not one node."""
    users = [user for user in node.users if _may_pass_gradient(user)]
    if len(users) != 1 or users[0].op == "output":
        return None
    user = users[0]
    if mutation.may_write(user) and mutation.has_other_names(user):
        return None  # a gradient may come from there
    return user if _uses_once(user, node) or is_square(node, user) else None


def _may_pass_gradient(node: Node) -> bool:
    """Whether one may come to ``node`` and go on to what it reads: not from what is detached."""
    seen: set[Node] = set()
    pending = [node]
    while pending:
        node = pending.pop()
        value = value_of(node)
        if not is_plain(value):  # the graph's output, or not understood
            return True
        if value.requires_grad and node not in seen:
            if mutation.may_write(node):
                return True
            seen.add(node)
            pending += node.users
    return False


def _uses_once(user: Node, node: Node) -> bool:
    uses = sum(leaf is node for leaf in tree_leaves((user.args, user.kwargs)))
    value = value_of(user)
    is_known = is_plain(value) and value.is_floating_point() and not is_cut_off(user)
    return uses == 1 and is_known


def is_square(before: Node, after: Node) -> bool:
    """Whether ``after`` is the square of ``before``."""
    name = operation(after)
    if name == "pow":
        call = arguments(after, lambda input, exponent: locals())
        return call is not None and call["input"] is before and call["exponent"] in (2, 2.0)
    return name == "square" or (name == "mul" and after.args == (before, before))


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
    if name == "reshape" or (name == "getitem" and _is_plain_index(after.args[1])):
        return not is_reduced and not after.kwargs and after.args[0] is before
    # Weights are made where the values are.
    return name in ("cast", "neg") and tensor_of(before).device == tensor_of(after).device


def _is_plain_index(index: Any) -> bool:
    """Whether ``index`` takes each element once at most, and how many does not depend on data."""
    return all(
        part is None or part is Ellipsis or isinstance(part, slice) or type(part) is int
        for part in (index if isinstance(index, tuple) else (index,))
    )


def is_sum(before: Node, after: Node) -> bool:
    """Whether ``after`` is the sum of ``before`` and another, or a difference of them."""
    is_one = operation(after) in ("add", "sub")
    has_no_alpha = arguments(after, lambda input, other: locals()) is not None
    return is_one and has_no_alpha and same_shape(before, after)


def is_negated(before: Node, after: Node) -> bool:
    """Whether ``after`` is a difference that ``before`` is taken from something for."""
    call = arguments(after, lambda input, other: locals())
    return operation(after) == "sub" and call is not None and call["other"] is before


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
    return not tensor_of(factor).requires_grad and same_shape(before, after)


def factors_of(values: Node, weighting: Weighting) -> Iterator[Node]:
    """What ``emit_weights`` makes the weights of."""
    for before, node in pairwise((values, *weighting.nodes)):
        if operation(node) not in ("add", "sub"):
            yield from (source for source in node.all_input_nodes if source is not before)


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
    dims = dims or range(rank)
    return tuple(dim % rank for dim in dims), keeps


def emit_weights(emit: Emitter, values: Node, weighting: Weighting, ones: Node) -> Node:
    """``[N]``: the weight of each of ``values``, or of its square; ``ones`` has their shape."""
    weights = ones
    places = _places(emit, values, weighting, ones)
    # Weights keep the dimensions that values are summed over: which ones values still have, ...
    kept = list(range(tensor_of(values).dim()))
    summed: set[int] = set()  # ... and which of those have a size of 1.
    for before, node in pairwise((values, *weighting.nodes)):
        name = operation(node)
        if name in ("reshape", "getitem"):
            weights = emit(node.target, weights, *node.args[1:])
            places = places and emit(node.target, places, *node.args[1:])
            kept = list(range(tensor_of(node).dim()))
        elif name == "neg" or is_negated(before, node):
            weights = emit("neg", weights)
        elif is_square(before, node):
            weights = emit("square", weights)
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
    weights = emit("reshape", weights, -1)
    if places is None:
        return weights
    zeros = emit("reshape", emit(torch.zeros_like, ones), -1)
    return emit("scatter", zeros, 0, emit("reshape", places, -1), weights)


def _places(emit: Emitter, values: Node, weighting: Weighting, ones: Node) -> Node | None:
    """Which of all each of ``values`` is, where some are left out of the sum; else None."""
    sizes = [tensor_of(node).numel() for node in (values, *weighting.nodes)]
    if all(
        operation(node) != "getitem" or same(before, after)
        for node, (before, after) in zip(weighting.nodes, pairwise(sizes), strict=True)
    ):
        return None
    counted = emit("reshape", emit(torch.ones_like, ones, dtype=torch.int64), -1)
    return emit("view_as", emit("sub", emit("cumsum", counted, 0), 1), ones)


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
