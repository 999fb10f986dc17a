"""Follows logits from the head to the loss: which dimension is the vocabulary, which rows remain.

Everything between head and loss that keeps the vocabulary whole acts on rows alone, so it can be
done to the hidden states, before the head, with the same result.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .match import Logits, Refused, RowStep
from .spelling import arguments, describe, operation
from .tensors import product, same, tensor_of, value_of


def is_step(node: Node) -> bool:
    return operation(node) in _FOLLOWERS


def follow(logits: Logits, node: Node) -> Logits:
    """What ``node`` holds, which takes ``logits`` as its first argument; Refused if not logits."""
    before, after = tensor_of(logits.node), tensor_of(node)
    if before.device != after.device:
        raise Refused(f"{describe(node)} moves the logits from {before.device} to {after.device}")
    if not after.is_floating_point() or (after.dtype == torch.float64) != (
        before.dtype == torch.float64
    ):
        raise Refused(f"{describe(node)} turns {before.dtype} logits into {after.dtype}")
    return replace(_FOLLOWERS[operation(node)](logits, node), node=node)


def _rows(shape: Any, vocab_dim: int) -> list[Any]:
    return [size for dim, size in enumerate(shape) if dim != vocab_dim]


def _add(logits: Logits, vocab_dim: int, step: RowStep | None) -> Logits:
    if step is None or all(arg == slice(None) for arg in step.args):
        return replace(logits, vocab_dim=vocab_dim)
    return replace(logits, vocab_dim=vocab_dim, steps=(*logits.steps, step))


def _cast(logits: Logits, node: Node) -> Logits:
    if tensor_of(logits.node).shape != tensor_of(node).shape:
        raise Refused(f"{describe(node)} changes the shape of the logits")
    return logits


def _reshape(logits: Logits, node: Node) -> Logits:
    before, after = tensor_of(logits.node).shape, tensor_of(node).shape
    if tensor_of(node).dtype != tensor_of(logits.node).dtype:
        raise Refused(f"{describe(node)} reads the logits' bytes as another dtype")
    vocab, behind = before[logits.vocab_dim], product(before[logits.vocab_dim + 1 :])
    for dim in reversed(range(len(after))):
        if same(after[dim], vocab) and same(product(after[dim + 1 :]), behind):
            rows, reshaped = _rows(before, logits.vocab_dim), _rows(after, dim)
            return _add(logits, dim, _as_index(rows, reshaped) or _as_sizes(reshaped, node))
    raise Refused(
        f"{describe(node)} to {list(after)} does not keep the vocabulary's dimension as it is"
    )


def _as_index(before: list[Any], after: list[Any]) -> RowStep | None:
    """A reshape that only adds and drops dimensions of size 1, as an index; else None."""
    index: list[Any] = []
    left = list(after)
    for size in before:
        if same(size, 1):
            index.append(0)
            continue
        while left and same(left[0], 1):
            index.append(None)
            left.pop(0)
        if not left or not same(left.pop(0), size):
            return None
        index.append(slice(None))
    if not all(same(size, 1) for size in left):
        return None
    return RowStep("getitem", (*index, *[None] * len(left)))


def _as_sizes(sizes: list[Any], node: Node) -> RowStep:
    """A reshape to numbers, or to nodes where sizes are dynamic."""
    given = {str(value_of(arg)): arg for arg in _flat(node.args[1:]) if isinstance(arg, Node)}
    named = [size if isinstance(size, int) else given.get(str(size)) for size in sizes]
    if named.count(None) > 1:
        raise Refused(f"{describe(node)} has several dynamic sizes that are not in the graph")
    return RowStep("reshape", tuple(-1 if size is None else size for size in named))


def _flat(args: Any) -> list[Any]:
    if isinstance(args, tuple | list):
        return [item for arg in args for item in _flat(arg)]
    return [args]


def _permute(logits: Logits, node: Node) -> Logits:
    dims = tensor_of(logits.node).dim()
    # Sizes that tell the dimensions apart show where each one goes.
    probe = torch.empty(tuple(range(2, 2 + dims)), device="meta")
    moved = _call(node, probe)
    order = [size - 2 for size in moved.shape]
    rows = [dim - (dim > logits.vocab_dim) for dim in order if dim != logits.vocab_dim]
    step = None if rows == sorted(rows) else RowStep("permute", tuple(rows))
    return _add(logits, order.index(logits.vocab_dim), step)


def _call(node: Node, value: torch.Tensor) -> torch.Tensor:
    """Apply ``node`` to ``value`` in place of its first argument."""
    target: Callable[..., Any] = node.target
    if node.op == "call_method":
        target = getattr(torch.Tensor, node.target)
    return target(value, *node.args[1:], **node.kwargs)


def _getitem(logits: Logits, node: Node) -> Logits:
    call = arguments(node, lambda input, index: locals())
    shape = tensor_of(logits.node).shape
    if call is None:
        raise Refused("the logits are indexed in a way that is not understood")
    index = call["index"] if isinstance(call["index"], tuple) else (call["index"],)
    if not all(part is None or part is ... or type(part) in (int, slice) for part in index):
        raise Refused("the logits are indexed with tensors; only numbers and slices are understood")
    full = slice(None)
    missing = len(shape) - sum(part is not None and part is not ... for part in index)
    if ... in index:
        place = index.index(...)
        index = (*index[:place], *[full] * missing, *index[place + 1 :])
    else:
        index = (*index, *[full] * missing)

    rows: list[Any] = []
    vocab_dim = dim = 0  # in the result; in the logits
    for part in index:
        if part is not None and dim == logits.vocab_dim:
            if not _takes_all(part, shape[dim]):
                raise Refused(
                    "the logits are cut along the vocabulary, so the softmax is over other words "
                    "than the head gives"
                )
            vocab_dim = sum(not isinstance(kept, int) for kept in rows)
        else:
            rows.append(part)
        dim += part is not None
    return _add(logits, vocab_dim, RowStep("getitem", tuple(rows)) if rows else None)


def _takes_all(part: Any, size: Any) -> bool:
    if not isinstance(part, slice) or part.step not in (None, 1) or part.start not in (None, 0):
        return False
    return part.stop is None or (
        isinstance(part.stop, int) and statically_known_true(part.stop >= size)
    )


def _log_softmax(logits: Logits, node: Node) -> Logits:
    call = arguments(
        node, lambda input, dim=None, third=None, *, _stacklevel=3, dtype=None: locals()
    )
    dims = tensor_of(logits.node).dim()
    if call is None or not isinstance(call["dim"], int):
        raise Refused("log_softmax is called without a dimension, or not understood")
    if call["dim"] % max(dims, 1) != logits.vocab_dim:
        raise Refused(
            f"log_softmax runs over dimension {call['dim']}, which is not the vocabulary's"
        )
    return replace(logits, are_log_probabilities=True)


_FOLLOWERS: dict[str | None, Callable[[Logits, Node], Logits]] = {
    "cast": _cast,
    "reshape": _reshape,
    "permute": _permute,
    "getitem": _getitem,
    "log_softmax": _log_softmax,
}
