"""Operations that are linear in a tensor, and what becomes of a gradient on the way back to it.

What only moves numbers to other places is done to their places: that tells where each comes from.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from ..compat.graphs import tree_leaves
from ..graph import (
    Emitter,
    arguments,
    canonical_op,
    is_number,
    is_pieces,
    is_plain,
    same,
    same_shape,
    tensor_of,
    value_of,
)
from ..logits import summed_dims

Sizes = Callable[[], list[Any]]


def arguments_of(node: Node) -> tuple[Any, ...]:
    """The arguments of ``node``; for a piece of a tensor, those of what cuts it."""
    pieces = node.args[0] if node.args else None
    if canonical_op(node) == "getitem" and isinstance(pieces, Node) and is_pieces(pieces):
        return (*pieces.args, *pieces.kwargs.values(), node.args[1])
    return node.args


def read_by(node: Node) -> list[Node]:
    leaves = tree_leaves((arguments_of(node), node.kwargs))
    return list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, Node)))


def _is_known(factor: Any) -> bool:
    value = value_of(factor)
    return is_number(factor) or (is_plain(value) and not value.requires_grad)


def unchanged(emit: Emitter, gradient: Node, sizes: Sizes) -> Node:
    return gradient


def _scaled(node: Node, name: Node) -> dict[str, Any] | None:
    call = arguments(node, lambda input, other: locals())
    if call is None or (canonical_op(node) == "div" and call["input"] is not name):
        return None
    operand = call["other"] if call["input"] is name else call["input"]
    if not _is_known(operand):
        return None
    return {
        "kind": "scale",
        "back": lambda emit, gradient, sizes: emit(canonical_op(node), gradient, operand),
        "reads": (operand,) if isinstance(operand, Node) else (),
    }


def _negated(node: Node, name: Node) -> dict[str, Any] | None:
    return {"kind": "scale", "back": lambda emit, gradient, sizes: emit("neg", gradient)}


def _cast(node: Node, name: Node) -> dict[str, Any] | None:
    # Weights are made where the values are.
    is_there = tensor_of(name).device == tensor_of(node).device
    return {"kind": "move", "back": unchanged} if is_there and _is_first(node, name) else None


def _is_first(node: Node, name: Node) -> bool:
    """Whether it is ``name`` that ``node`` moves, and not what the result is to look like."""
    return arguments_of(node)[:1] == (name,)


def _added(node: Node, name: Node) -> dict[str, Any] | None:
    call = arguments(node, lambda input, other: locals())
    if call is None:
        return None
    is_negated = canonical_op(node) == "sub" and call["other"] is name
    back = (lambda emit, gradient, sizes: emit("neg", gradient)) if is_negated else unchanged
    return {"kind": "sum", "back": back, "has_others": True}


def _summed(node: Node, name: Node) -> dict[str, Any] | None:
    reduction = _reduced_dims(node, tensor_of(name).dim())
    if reduction is None:
        return None
    dims, keeps_dims = reduction

    def back(emit: Emitter, gradient: Node, sizes: Sizes) -> Node:
        for dim in () if keeps_dims else sorted(dims):
            gradient = emit("unsqueeze", gradient, dim)
        for dim in dims if canonical_op(node) == "mean" else ():
            gradient = emit("div", gradient, sizes()[dim])
        return emit("expand", gradient, sizes())

    return {"kind": "sum", "back": back}


def _reduced_dims(node: Node, rank: int) -> tuple[tuple[int, ...], bool] | None:
    """The dimensions that a sum or mean runs over, counted from the front, and whether it keeps
    them; None if that is not clear."""
    reduction = summed_dims(node)
    if reduction is None:
        return None
    dims, keeps = reduction
    if dims is None:
        return tuple(range(rank)), keeps
    dims = (dims,) if isinstance(dims, int) else dims
    if not isinstance(dims, tuple | list) or not all(isinstance(dim, int) for dim in dims):
        return None
    return tuple(dim % max(rank, 1) for dim in dims if rank) or tuple(range(rank)), keeps


def _contracted(node: Node, name: Node) -> dict[str, Any] | None:
    """A product that is summed over some dimensions, as einsum has it."""
    found = _equation(node)
    if found is None:
        return None
    (first, second, result), operands = found
    factor = operands[1] if operands[0] is name else operands[0]
    own, others = (first, second) if operands[0] is name else (second, first)
    # What is summed of the numbers alone has no gradient that einsum could tell of.
    if not _is_known(factor) or not set(own).issubset(others + result):
        return None
    if tensor_of(name).device.type == "mps":
        return None  # it knows no FP64, which the weights are made in
    sizes_of = dict(zip(own, tensor_of(name).shape, strict=True))
    if not all(
        same(size, sizes_of.setdefault(letter, size))
        for letter, size in zip(others, tensor_of(factor).shape, strict=True)
    ):
        return None  # one is repeated

    def back(emit: Emitter, gradient: Node, sizes: Sizes) -> Node:
        # Autocast, if the call is inside of one, leaves FP64 alone.
        wide = emit("double", gradient), emit("double", factor)
        product = emit(torch.einsum, f"{result},{others}->{own}", *wide)
        return emit("to", product, tensor_of(gradient).dtype)

    return {"kind": "sum", "back": back, "reads": (factor,)}


def _equation(node: Node) -> tuple[tuple[str, str, str], tuple[Node, Node]] | None:
    """A product of two tensors: the letters of both and of the result, and both."""
    if canonical_op(node) == "einsum":
        equation, *operands = node.args
        if not isinstance(equation, str) or len(operands) != 2:
            return None
        parts = equation.replace(" ", "").replace("->", ",").split(",")
        is_plain_one = (
            "->" in equation
            and all(part.isalpha() or not part for part in parts)
            and all(len(set(part)) == len(part) for part in parts)
        )
        return ((parts[0], parts[1], parts[2]), tuple(operands)) if is_plain_one else None
    call = arguments(node, lambda input, other: locals())
    if call is None:
        return None
    both = call["input"], call["other"]
    ranks = tensor_of(both[0]).dim(), tensor_of(both[1]).dim()
    letters = _LETTERS.get(ranks) if canonical_op(node) != "linear" or ranks == (1, 1) else None
    return None if letters is None else (letters, both)


_LETTERS = {
    (1, 1): ("i", "i", ""),
    (2, 1): ("ij", "j", "i"),
    (1, 2): ("i", "ij", "j"),
    (2, 2): ("ij", "jk", "ik"),
    (3, 3): ("bij", "bjk", "bik"),
}


def _chosen(node: Node, name: Node) -> dict[str, Any] | None:
    call: dict[str, Any] | None
    if node.op == "call_method":  # losses.where(mask, 0)
        call = arguments(node, lambda input, condition, other: locals())
    else:
        call = arguments(node, lambda condition, input=None, other=None: locals())
    if call is None or name not in (call["input"], call["other"]):
        return None
    mask, is_first = call["condition"], call["input"] is name

    def back(emit: Emitter, gradient: Node, sizes: Sizes) -> Node:
        dropped = emit("logical_not", mask) if is_first else mask
        return emit("masked_fill", gradient, dropped, 0)

    other = call["other"] if is_first else call["input"]
    return {"kind": "move", "back": back, "reads": (mask,), "has_others": not _is_zero(other)}


def _filled(node: Node, name: Node) -> dict[str, Any] | None:
    call = arguments(node, lambda input, mask, value: locals())
    if call is None or call["input"] is not name:
        return None
    mask, has_others = call["mask"], not _is_zero(call["value"])
    back = lambda emit, gradient, sizes: emit("masked_fill", gradient, mask, 0)  # noqa: E731
    return {"kind": "move", "back": back, "reads": (mask,), "has_others": has_others}


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value == 0


def _set(node: Node, name: Node) -> dict[str, Any] | None:
    """``losses[~mask] = 0``, ``total[2] = loss``"""
    call = arguments(node, lambda input, index, value: locals())
    if call is None or name not in (call["input"], call["value"]):
        return None
    index = call["index"]

    def back(emit: Emitter, gradient: Node, sizes: Sizes) -> Node:
        if call["value"] is name:
            gradient = emit(operator.getitem, gradient, index)
            for _ in range(tensor_of(name).dim() - tensor_of(gradient).dim()):
                gradient = emit("unsqueeze", gradient, 0)
            return gradient
        gradient = emit("clone", gradient, memory_format=torch.contiguous_format)
        emit(operator.setitem, gradient, index, 0)
        return gradient

    reads = tuple(leaf for leaf in tree_leaves(index) if isinstance(leaf, Node))
    return {"kind": "move", "back": back, "reads": reads, "has_others": True}


def _put(node: Node, name: Node) -> dict[str, Any] | None:
    """What is added to the places of another tensor that an index says."""
    call = arguments(node, lambda input, dim, index, source=None, *, src=None: locals())
    if call is None:
        return None
    dim, index = call["dim"], call["index"]
    if call["input"] is name:
        return {"kind": "sum", "back": unchanged, "has_others": True}
    if canonical_op(node) == "index_add":
        get = "index_select"
    elif same_shape(index, name):
        get = "gather"
    else:
        return None
    back = lambda emit, gradient, sizes: emit(get, gradient, dim, index)  # noqa: E731
    return {"kind": "sum", "back": back, "reads": (index,), "has_others": True}


def _put_together(node: Node, name: Node) -> dict[str, Any] | None:
    call = arguments(node, lambda tensors, dim=0, *, axis=0: locals())
    if call is None or not isinstance(call["tensors"], tuple | list):
        return None
    parts, dim = list(call["tensors"]), call["dim"] or call["axis"]
    number = parts.index(name)
    if canonical_op(node) == "stack":
        back = lambda emit, gradient, sizes: emit("select", gradient, dim, number)  # noqa: E731
        return {"kind": "sum", "back": back, "has_others": True}
    if any(tensor_of(part).dim() != tensor_of(node).dim() for part in parts):
        return None
    lengths = [tensor_of(part).size(dim) for part in parts]
    if not all(isinstance(length, int) for length in lengths):
        return None
    start = sum(lengths[:number])
    return {
        "kind": "sum",
        "back": lambda emit, gradient, sizes: emit("narrow", gradient, dim, start, lengths[number]),
        "has_others": True,
    }


def _reshaped(node: Node, name: Node) -> dict[str, Any] | None:
    if not _is_first(node, name):
        return None
    back = lambda emit, gradient, sizes: emit("reshape", gradient, sizes())  # noqa: E731
    return {"kind": "move", "back": back, "reads": _sources(node, name)}


def _moved(node: Node, name: Node) -> dict[str, Any] | None:
    """Each number of the result is one of the source: what is done to places tells which."""
    if not _is_first(node, name):
        return None

    def back(emit: Emitter, gradient: Node, sizes: Sizes) -> Node:
        source = emit("new_zeros", gradient, sizes())
        flat = emit("reshape", source, -1)
        counted = emit("cumsum", emit(torch.ones_like, flat, dtype=torch.int64), 0)
        places = emit("view_as", emit("sub", counted, 1), source)
        places = emit("reshape", emit_again(emit, node, {name: places}), -1)
        flat = emit("index_add", flat, 0, places, emit("reshape", gradient, -1))
        return emit("view_as", flat, source)

    return {"kind": "move", "back": back, "reads": _sources(node, name)}


def _sources(node: Node, name: Node) -> tuple[Node, ...]:
    return tuple(source for source in read_by(node) if source is not name)


def emit_again(emit: Emitter, node: Node, values: dict[Node, Node]) -> Node:
    """Do what ``node`` does, to other values than it reads."""

    def replaced(part: Node) -> Node:
        return emit_again(emit, part, values) if is_pieces(part) else values.get(part, part)

    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), replaced)
    return emit(node.target, *args, **kwargs)


_MOVING = (
    *("getitem", "select", "narrow", "index_select", "permute"),
    *("gather", "take_along_dim", "expand"),
)
# What else they read is there before.
SHAPED_BY_INPUT = (
    *(*_MOVING, "reshape", "sum", "mean", "mul", "div"),
    *("linear", "matmul", "product", "einsum"),
)
STEPS: dict[str | None, Callable[[Node, Node], dict[str, Any] | None]] = {
    "mul": _scaled,
    "div": _scaled,
    "neg": _negated,
    "cast": _cast,
    "add": _added,
    "sub": _added,
    "sum": _summed,
    "mean": _summed,
    "linear": _contracted,
    "matmul": _contracted,
    "product": _contracted,
    "einsum": _contracted,
    "where": _chosen,
    "masked_fill": _filled,
    "setitem": _set,
    "index_add": _put,
    "scatter_add": _put,
    "stack": _put_together,
    "cat": _put_together,
    "reshape": _reshaped,
    **dict.fromkeys(_MOVING, _moved),
}
