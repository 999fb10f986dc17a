"""Follows the shape of logits from the head on: where the vocabulary is, and which rows remain.

Everything that keeps the vocabulary whole acts on rows alone, so it can be done to the hidden
states, before the head, with the same result.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from ..compat.graphs import is_known_true
from ..graph import Refused, arguments, canonical_op, describe, product, same, tensor_of, value_of
from .row_steps import Index, Permute, Piece, Reshape, RowStep
from .types import AliasRegion, Logits, Stage
from .value_steps import Cast
from .values import keep_words


def is_row_step(node: Node) -> bool:
    return canonical_op(node) in _FOLLOWERS


def follow_rows(logits: Logits, node: Node) -> Logits:
    """What ``node`` holds, whose first argument is ``logits``; Refused if that is no logits."""
    return _FOLLOWERS[canonical_op(node)](logits, node)


def follow_pieces(logits: Logits, node: Node) -> list[Logits]:
    """What each of the tensors holds that ``node`` cuts ``logits`` into."""
    value = value_of(node)
    call = arguments(node, _unbind if canonical_op(node) == "unbind" else _pieces)
    if call is None or not isinstance(value, tuple | list) or not isinstance(call["dim"], int):
        raise Refused(f"{describe(node)} is called with arguments that are not understood")
    dims = tensor_of(logits.node).dim()
    dim = call["dim"] % dims
    if dim == logits.vocab_dim:
        raise Refused(f"{describe(node)} cuts the logits along the vocabulary")
    row = dim - (dim > logits.vocab_dim)
    method = str(canonical_op(node))
    drops = method == "unbind"
    sizes = () if drops else (call["sizes"],)
    vocab_dim = logits.vocab_dim - (drops and dim < logits.vocab_dim)
    return [
        _add(logits, vocab_dim, Piece(method, sizes, row, number), takes_all=False)
        for number in range(len(value))
    ]


def _unbind(input: Any, dim: Any = 0) -> dict[str, Any]:
    return locals()


def _pieces(
    input: Any,
    sizes: Any = None,
    dim: Any = 0,
    *,
    chunks: Any = None,
    split_size: Any = None,
    split_size_or_sections: Any = None,
    indices_or_sections: Any = None,
) -> dict[str, Any]:
    named = [
        given
        for given in (sizes, chunks, split_size, split_size_or_sections, indices_or_sections)
        if given is not None
    ]
    if len(named) != 1:
        raise TypeError
    return {"input": input, "sizes": named[0], "dim": dim}


def _rows(shape: Any, vocab_dim: int) -> list[Any]:
    return [size for dim, size in enumerate(shape) if dim != vocab_dim]


def _add(logits: Logits, vocab_dim: int, step: RowStep | None, takes_all: bool = True) -> Logits:
    """``logits`` after ``step``, which keeps all rows if ``takes_all``."""
    if step is None or (isinstance(step, Index) and all(map(_is_full, step.index))):
        return replace(logits, vocab_dim=vocab_dim)
    alias_region = logits.alias_region if takes_all else AliasRegion(logits.alias_region)
    return replace(
        logits, vocab_dim=vocab_dim, steps=(*logits.steps, step), alias_region=alias_region
    )


def _is_full(part: Any) -> bool:
    return isinstance(part, slice) and part == slice(None)


def _cast(logits: Logits, node: Node) -> Logits:
    before, after = tensor_of(logits.node), tensor_of(node)
    if before.shape != after.shape:
        raise Refused(f"{describe(node)} changes the shape of the logits")
    if after.dtype == before.dtype:
        return logits
    if after.dtype.itemsize < 2:
        raise Refused(f"{describe(node)} rounds logits to {after.dtype}")
    return logits.then(Cast(after.dtype))


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


def _as_index(before: list[Any], after: list[Any]) -> Index | None:
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
    return Index((*index, *[None] * len(left)))


def _as_sizes(sizes: list[Any], node: Node) -> Reshape:
    """A reshape to numbers, or to nodes where sizes are dynamic."""
    given = {str(value_of(arg)): arg for arg in _flat(node.args[1:]) if isinstance(arg, Node)}
    named = [size if isinstance(size, int) else given.get(str(size)) for size in sizes]
    if named.count(None) > 1:
        raise Refused(f"{describe(node)} has several dynamic sizes that are not in the graph")
    return Reshape(tuple(-1 if size is None else size for size in named))


def _flat(args: Any) -> list[Any]:
    if isinstance(args, tuple | list):
        return [item for arg in args for item in _flat(arg)]
    return [args]


def _permute(logits: Logits, node: Node) -> Logits:
    dims = tensor_of(logits.node).dim()
    # Sizes that tell the dimensions apart show where each one goes.
    probe = torch.empty(tuple(range(2, 2 + dims)), device="meta")
    moved: torch.Tensor = _call(node, probe)
    order = [size - 2 for size in moved.shape]
    rows = [dim - (dim > logits.vocab_dim) for dim in order if dim != logits.vocab_dim]
    step = None if rows == sorted(rows) else Permute(tuple(rows))
    return _add(logits, order.index(logits.vocab_dim), step)


def _call(node: Node, value: torch.Tensor) -> Any:
    """Apply ``node`` to ``value`` in place of its first argument."""
    target: Callable[..., Any] = node.target
    if node.op == "call_method":
        target = getattr(torch.Tensor, node.target)
    return target(value, *node.args[1:], **node.kwargs)


def _getitem(logits: Logits, node: Node) -> Logits:
    call = arguments(node, lambda input, index: locals())
    if call is None:
        raise Refused("the logits are indexed in a way that is not understood")
    index = call["index"] if isinstance(call["index"], tuple) else (call["index"],)
    return _indexed(logits, _whole_index(index, tensor_of(logits.node).dim()))


def _select(logits: Logits, node: Node) -> Logits:
    return _along(logits, node, arguments(node, lambda input, dim, index: locals()))


def _narrow(logits: Logits, node: Node) -> Logits:
    call = arguments(node, lambda input, dim, start, length: locals())
    if call is None or type(call["start"]) is not int or type(call["length"]) is not int:
        raise Refused(f"{describe(node)} is called with arguments that are not understood")
    start, stop = call["start"], call["start"] + call["length"]
    part = slice(start, None if start < 0 == stop else stop)
    return _along(logits, node, {"dim": call["dim"], "index": part})


def _along(logits: Logits, node: Node, call: dict[str, Any] | None) -> Logits:
    if call is None or not isinstance(call["dim"], int):
        raise Refused(f"{describe(node)} is called with arguments that are not understood")
    dims = tensor_of(logits.node).dim()
    index = [slice(None)] * dims
    index[call["dim"]] = call["index"]
    return _indexed(logits, _whole_index(tuple(index), dims))


def _whole_index(index: tuple[Any, ...], dims: int) -> tuple[Any, ...]:
    """``index`` with something for each of ``dims`` dimensions, and no ellipsis."""
    for part in index:
        if not (part is None or part is ... or type(part) in (int, slice) or _is_tensor(part)):
            raise Refused("the logits are indexed in a way that is not understood")
    full = [slice(None)] * (dims - sum(map(_dims_taken, index)))
    place = next((place for place, part in enumerate(index) if part is ...), len(index))
    return (*index[:place], *full, *index[place + 1 :])


def _dims_taken(part: Any) -> int:
    """How many dimensions of the tensor a part of an index takes."""
    if part is None or part is ...:
        return 0
    return tensor_of(part).dim() if _is_tensor(part) and tensor_of(part).dtype == torch.bool else 1


def _is_tensor(part: Any) -> bool:
    if not isinstance(part, Node) or not isinstance(value_of(part), torch.Tensor):
        return False
    value = tensor_of(part)
    if value.dtype != torch.bool and (value.dtype != torch.int64 or value.dim() != 1):
        raise Refused(
            f"the logits are indexed with a {value.dim()}-d tensor of {value.dtype}; numbers, "
            "slices, masks and a vector of integers are understood"
        )
    return True


def _indexed(logits: Logits, index: tuple[Any, ...]) -> Logits:
    shape = tensor_of(logits.node).shape
    if sum(_is_tensor(part) for part in index) > 1:
        raise Refused("the logits are indexed with several tensors")
    rows: list[Any] = []
    words, vocab_dim, dim = slice(None), 0, 0  # vocab_dim is that of the result
    for part in index:
        if part is not None and dim <= logits.vocab_dim < dim + _dims_taken(part):
            words, vocab_dim = part, sum(not isinstance(kept, int) for kept in rows)
        else:
            rows.append(part)
        dim += _dims_taken(part)
    kept = all(part is None or _is_full(part) for part in rows)
    cut = _cut_along(logits, words, shape[logits.vocab_dim])
    return _add(cut, vocab_dim, Index(tuple(rows)) if rows else None, takes_all=kept)


def _cut_along(logits: Logits, words: Any, vocab: Any) -> Logits:
    """``logits`` with only those words of the vocabulary that the slice ``words`` takes."""
    if _takes_all(words, vocab):
        return logits
    if not isinstance(words, slice) or not isinstance(vocab, int) or words.step not in (None, 1):
        raise Refused("the logits are indexed along the vocabulary")
    if not all(part is None or isinstance(part, int) for part in (words.start, words.stop)):
        raise Refused("the logits are cut along the vocabulary to a dynamic size")
    if logits.stage is not Stage.LOGITS:
        raise Refused("some words are cut out behind the softmax")
    start, stop, _ = words.indices(vocab)
    kept = keep_words(logits, start, stop)
    return replace(kept, alias_region=AliasRegion(logits.alias_region))


def _takes_all(words: Any, vocab: Any) -> bool:
    if not isinstance(words, slice) or words.step not in (None, 1) or words.start not in (None, 0):
        return False
    return words.stop is None or (
        isinstance(words.stop, int) and is_known_true(words.stop >= vocab)
    )


def _expand(logits: Logits, node: Node) -> Logits:
    before, after = tensor_of(logits.node).shape, tensor_of(node).shape
    if len(before) != len(after) or not all(map(same, before, after)):
        raise Refused(f"{describe(node)} repeats the logits")
    return logits


_FOLLOWERS: dict[str | None, Callable[[Logits, Node], Logits]] = {
    "cast": _cast,
    "reshape": _reshape,
    "permute": _permute,
    "getitem": _getitem,
    "select": _select,
    "narrow": _narrow,
    "index_select": _select,
    "expand": _expand,
}
