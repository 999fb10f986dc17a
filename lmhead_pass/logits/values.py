"""Follows what becomes of the logits' values: scale, softcap, bias, masks of the vocabulary.

However they are written, they come down to one form (``Values``), which the op computes.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from ..graph import (
    Refused,
    arguments,
    canonical_op,
    describe,
    is_in_place,
    is_number,
    number_of,
    same,
    tensor_of,
)
from .types import Bias, Logits, RowStep, with_values

# The difference to -inf cannot be seen in a softmax, unless all logits are about as low.
_HARDLY = torch.finfo(torch.float16).min
_STILL_HARDLY = -1e4


def is_value_step(node: Node) -> bool:
    return canonical_op(node) in _FOLLOWERS


def follow_values(logits: Logits, node: Node) -> Logits:
    """What ``node`` makes of ``logits``, one of its arguments; Refused if not understood."""
    if logits.stage == "logits":
        return _FOLLOWERS[canonical_op(node)](logits, node)
    if canonical_op(node) in ("mul", "div", "neg"):
        return replace(logits, factor=logits.factor * _scale_of(logits, node))
    raise Refused(f"{describe(node)} is done to {logits.stage.replace('_', '-')}")


def _scale_of(logits: Logits, node: Node) -> float:
    plain = replace(logits, values=type(logits.values)(), vocab_slice=None, history=())
    scaled = _FOLLOWERS[canonical_op(node)](plain, node)
    if scaled.steps != logits.steps:
        raise Refused(f"{describe(node)} scales {logits.stage.replace('_', '-')} by a tensor")
    return scaled.values.scale


def _operands(logits: Logits, node: Node) -> tuple[Any, bool]:
    """The operand of a binary operation that is not the logits, and whether it comes first."""
    call = arguments(node, lambda input, other: locals())
    if call is None:
        raise Refused(f"{describe(node)} is called with arguments that are not understood")
    if call["input"] is logits.node or is_in_place(node):
        return call["other"], False
    return call["input"], True


def _mul(logits: Logits, node: Node) -> Logits:
    other, _ = _operands(logits, node)
    if is_number(other):
        return _multiplied(logits, number_of(other), ("mul", number_of(other)))
    return _scaled_by_tensor(logits, node, other)


def _div(logits: Logits, node: Node) -> Logits:
    other, is_reversed = _operands(logits, node)
    if is_reversed:
        raise Refused(f"{describe(node)} divides by the logits")
    if is_number(other):
        divisor = number_of(other)
        if divisor == 0:
            raise Refused(f"{describe(node)} divides the logits by 0")
        return _multiplied(logits, 1 / divisor, ("div", divisor))
    return _scaled_by_tensor(logits, node, other)


def _neg(logits: Logits, node: Node) -> Logits:
    return _multiplied(logits, -1.0, ("mul", -1.0))


def _multiplied(logits: Logits, factor: float, step: tuple[str, float]) -> Logits:
    values = logits.values
    if factor == 0 or not math.isfinite(factor):
        raise Refused(f"the logits are multiplied by {factor}")
    if values.cap is not None:
        changes: dict[str, Any] = {"cap": values.cap * factor}
    else:
        fills = [bias.fill * bias.factor for bias in values.biases if bias.fill is not None]
        fills += [fill_behind(logits)] if _is_cut_short(logits) else []
        if any(fill * factor > _STILL_HARDLY for fill in fills):
            raise Refused(f"masked logits are multiplied by {factor}: these words would count")
        biases = tuple(replace(bias, factor=bias.factor * factor) for bias in values.biases)
        changes = {"scale": values.scale * factor, "biases": biases}
    return _done(with_values(logits, **changes, shift=values.shift * factor), *step)


def _scaled_by_tensor(logits: Logits, node: Node, other: Any) -> Logits:
    """A temperature that is a tensor, one or one for each row, scales the hidden states instead."""
    name, values, tensor = canonical_op(node), logits.values, tensor_of(other)
    dims = tensor_of(logits.node).dim()
    if tensor_of(node).shape != tensor_of(logits.node).shape:
        raise Refused(f"{describe(node)} changes the shape of the logits")
    by_row = logits.vocab_dim == dims - 1 and tensor.dim() > 0 and same(tensor.size(-1), 1)
    if not (by_row or tensor.dim() == 0):
        raise Refused(f"{describe(node)} scales the words of the vocabulary apart")
    if _is_cut_short(logits):
        raise Refused(f"{describe(node)} scales masked logits by a tensor")
    if values.biases or values.cap is not None or values.shift != 0:
        raise Refused(f"{describe(node)} scales by a tensor after a bias or softcap")
    if not tensor.is_floating_point() or tensor.device != tensor_of(logits.node).device:
        raise Refused(f"{describe(node)} scales by a tensor of {tensor.dtype} on {tensor.device}")
    return replace(logits, steps=(*logits.steps, RowStep(str(name), (other,))))


def _add(logits: Logits, node: Node) -> Logits:
    return _added(logits, node, _operands(logits, node)[0], 1)


def _sub(logits: Logits, node: Node) -> Logits:
    other, is_reversed = _operands(logits, node)
    if is_reversed:
        return _added(_neg(logits, node), node, other, 1)
    return _added(logits, node, other, -1)


def _added(logits: Logits, node: Node, other: Any, sign: int) -> Logits:
    values = logits.values
    if is_number(other):
        number = sign * number_of(other)
        return _done(with_values(logits, shift=values.shift + number), "add", number)
    if values.cap is not None:
        raise Refused(f"{describe(node)} adds a tensor to the logits after a softcap")
    if not _is_for_words(logits, tensor_of(other)) or not tensor_of(other).is_floating_point():
        raise Refused(f"{describe(node)} adds a tensor to the logits that is not a bias")
    biases = (*values.biases, Bias(other, float(sign), vocab_slice=_first_words(logits)))
    return _done(with_values(logits, biases=biases), "add_tensor", other, sign)


def _is_for_words(logits: Logits, tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` has one element for each word that the logits have, and no more."""
    shape = tensor_of(logits.node).shape
    place = logits.vocab_dim - len(shape)
    return (
        tensor.dim() <= len(shape)
        and -place <= tensor.dim()
        and same(tensor.size(place), shape[place])
        and all(
            same(size, 1) for dim, size in enumerate(tensor.shape, -tensor.dim()) if dim != place
        )
    )


def _tanh(logits: Logits, node: Node) -> Logits:
    if logits.values.cap is not None:
        raise Refused(f"{describe(node)} is a second softcap")
    if any(bias.fill is not None for bias in logits.values.biases) or _is_cut_short(logits):
        raise Refused(f"{describe(node)} is done to masked logits")
    changes = {"cap": 1.0, "inner": logits.values.shift, "shift": 0.0}
    return _done(with_values(logits, **changes), "tanh")


def _is_cut_short(logits: Logits) -> bool:
    """Whether there are words in the tensor behind those that count."""
    if logits.vocab_slice is None:
        return False
    return not same(
        tensor_of(logits.node).size(logits.vocab_dim), logits.vocab_slice[1] - logits.vocab_slice[0]
    )


def _first_words(logits: Logits) -> tuple[int, int] | None:
    """Which words of a tensor that has one for each in the logits' tensor count; None: all."""
    if logits.vocab_slice is None or not _is_cut_short(logits):
        return None
    return 0, logits.vocab_slice[1] - logits.vocab_slice[0]


def fill_behind(logits: Logits) -> float:
    """What the words behind those that count hold."""
    fill = 0.0
    for name, *operands in logits.history:
        if name == "fill":
            fill = operands[1]
        elif name == "mul":
            fill *= operands[0]
        elif name == "div":
            fill /= operands[0]
    return fill


def _sigmoid(logits: Logits, node: Node) -> Logits:
    # sigmoid(x) = tanh(x / 2) / 2 + 1 / 2
    halved = _multiplied(logits, 0.5, ("mul", 0.5))
    squashed = _multiplied(_tanh(halved, node), 0.5, ("mul", 0.5))
    values = replace(squashed.values, shift=squashed.values.shift + 0.5)
    return _done(replace(squashed, values=values, history=logits.history), "sigmoid")


def _masked_fill(logits: Logits, node: Node) -> Logits:
    call = arguments(node, lambda input, mask, value: locals())
    if call is None or not (call["input"] is logits.node or is_in_place(node)):
        raise Refused(f"{describe(node)} is called with arguments that are not understood")
    fill = _fill(node, call["value"])
    mask = tensor_of(call["mask"])
    if not _is_for_words(logits, mask) or mask.dtype != torch.bool or logits.values.cap is not None:
        raise Refused(f"{describe(node)} masks logits by other than a mask of the vocabulary")
    biases = (*logits.values.biases, Bias(call["mask"], 1.0, fill, _first_words(logits)))
    return _done(with_values(logits, biases=biases), "masked_fill", call["mask"], fill)


def _fill(node: Node, value: Any) -> float:
    number = number_of(value)
    if not number <= _HARDLY:
        raise Refused(
            f"{describe(node)} sets logits to {number}, not to -inf or at most {_HARDLY:.0f}: "
            "these words would count"
        )
    return number


def words_filled(logits: Logits, node: Node) -> tuple[int, float]:
    """For ``logits[..., start:] = fill``, done to all rows: start and fill; else Refused."""
    call = arguments(node, lambda input, index, value: locals())
    assert call is not None
    shape = tensor_of(logits.node).shape
    index = call["index"] if isinstance(call["index"], tuple) else (call["index"],)
    if any(not (part is ... or isinstance(part, slice)) for part in index):
        raise Refused(f"{describe(node)} writes to logits in place where an index says")
    full = [slice(None)] * (len(shape) - sum(part is not ... for part in index))
    place = index.index(...) if ... in index else len(index)
    parts = [*index[:place], *full, *index[place + 1 :]]
    words, vocab = parts.pop(logits.vocab_dim), shape[logits.vocab_dim]
    ints = all(end is None or isinstance(end, int) for end in (words.start, words.stop))
    if any(part != slice(None) for part in parts) or not isinstance(vocab, int) or not ints:
        raise Refused(f"{describe(node)} writes to a part of the logits in place")
    start, stop, step = words.indices(vocab)
    if step != 1 or stop != vocab:
        raise Refused(f"{describe(node)} writes in place to words that are not the last ones")
    return start, _fill(node, call["value"])


def fill_words(logits: Logits, start: int, fill: float) -> Logits:
    """``logits`` whose words from ``start`` on are ``fill``, which is next to nothing."""
    if _is_cut_short(logits) and fill != fill_behind(logits):
        raise Refused("masked words are masked once more, with another value")
    return _done(cut_words(logits, 0, start), "fill", start, fill)


def cut_words(logits: Logits, start: int, stop: int) -> Logits:
    """Let only the words from ``start`` to ``stop`` of those in the tensor count."""
    first, last = logits.vocab_slice or (0, tensor_of(logits.node).size(logits.vocab_dim))
    kept = (first + start, min(last, first + stop))
    if kept[0] >= kept[1]:
        raise Refused("no words of the vocabulary are left")
    if kept == (first, last):
        return logits
    biases = tuple(_cut(bias, start, stop) for bias in logits.values.biases)
    return replace(with_values(logits, biases=biases), vocab_slice=kept)


def _cut(bias: Bias, start: int, stop: int) -> Bias:
    first, last = bias.vocab_slice or (0, tensor_of(bias.node).numel())
    return replace(bias, vocab_slice=(first + start, min(last, first + stop)))


def _done(logits: Logits, *step: Any) -> Logits:
    return replace(logits, history=(*logits.history, step))


_FOLLOWERS: dict[str | None, Callable[[Logits, Node], Logits]] = {
    "mul": _mul,
    "div": _div,
    "neg": _neg,
    "add": _add,
    "sub": _sub,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "masked_fill": _masked_fill,
}
