"""Follows what becomes of the logits' values: scale, softcap, bias, masks of the vocabulary.

Each operation becomes steps (``value_steps``), if the normal form that the op computes has them.
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
    is_symbol,
    number_of,
    same,
    tensor_of,
)
from .row_steps import ScaleRows
from .types import Logits, Stage
from .value_steps import (
    AddNumber,
    AddTensor,
    FillMasked,
    FillTail,
    KeepWords,
    Scale,
    Sigmoid,
    Tanh,
    ValueStep,
)

# The difference to -inf cannot be seen in a softmax, unless all logits are about as low.
_HARDLY = torch.finfo(torch.float16).min
_STILL_HARDLY = -1e4


def is_value_step(node: Node) -> bool:
    return canonical_op(node) in _FOLLOWERS


def follow_values(logits: Logits, node: Node) -> Logits:
    """What ``node`` makes of ``logits``, one of its arguments; Refused if not understood."""
    if logits.stage is Stage.LOGITS:
        return _FOLLOWERS[canonical_op(node)](logits, node)
    if canonical_op(node) in ("mul", "div", "neg"):
        scale = _scale(logits, node)
        if not isinstance(scale, Scale):
            raise Refused(f"{describe(node)} scales {logits.stage.value} by a tensor")
        return replace(logits, factor=logits.factor * scale.factor)
    raise Refused(f"{describe(node)} is done to {logits.stage.value}")


def _operands(logits: Logits, node: Node) -> tuple[Any, bool]:
    """The operand of a binary operation that is not the logits, and whether it comes first."""
    call = arguments(node, lambda input, other: locals())
    if call is None:
        raise Refused(f"{describe(node)} is called with arguments that are not understood")
    if call["input"] is logits.node or is_in_place(node):
        return call["other"], False
    return call["input"], True


def _scaled(logits: Logits, node: Node) -> Logits:
    scale = _scale(logits, node)
    if isinstance(scale, Scale):
        return _then(logits, node, scale)
    return _scaled_by_node(logits, node, scale)


def _scale(logits: Logits, node: Node) -> Scale | Node:
    """The number that ``node`` multiplies by or divides by, or what the graph has for it."""
    name = canonical_op(node)
    if name == "neg":
        return Scale(-1.0)
    other, is_reversed = _operands(logits, node)
    if name == "div" and is_reversed:
        raise Refused(f"{describe(node)} divides by the logits")
    if not is_number(other) or (is_symbol(other) and not _has_a_form(logits)):
        return other
    number = number_of(other)
    if name == "div" and number == 0:
        raise Refused(f"{describe(node)} divides the logits by 0")
    scale = Scale(number, divides=name == "div")
    if scale.factor == 0 or not math.isfinite(scale.factor):
        raise Refused(f"the logits are multiplied by {scale.factor}")
    return scale


def _has_a_form(logits: Logits) -> bool:
    """Whether anything was done to the logits that a factor of the hidden states is not part of."""
    values = logits.values
    is_masked_or_capped = values.tail is not None or values.cap is not None
    return is_masked_or_capped or bool(values.biases) or values.shift != 0


def _scaled_by_node(logits: Logits, node: Node, other: Node) -> Logits:
    """A temperature that is a tensor, one or one for each row, scales the hidden states instead.

    So does a number that changes from call to call: as a number of the op it would be compiled for
    each value.
    """
    if logits.values.tail is not None:
        raise Refused(f"{describe(node)} scales masked logits by a tensor")
    if _has_a_form(logits):
        raise Refused(f"{describe(node)} scales by a tensor after a bias or softcap")
    if not is_number(other):
        _check_factor(logits, node, tensor_of(other))
    step = ScaleRows(other, divides=canonical_op(node) == "div")
    return replace(logits, steps=(*logits.steps, step))


def _check_factor(logits: Logits, node: Node, tensor: torch.Tensor) -> None:
    dims = tensor_of(logits.node).dim()
    if tensor_of(node).shape != tensor_of(logits.node).shape:
        raise Refused(f"{describe(node)} changes the shape of the logits")
    by_row = logits.vocab_dim == dims - 1 and tensor.dim() > 0 and same(tensor.size(-1), 1)
    if not (by_row or tensor.dim() == 0):
        raise Refused(f"{describe(node)} scales the words of the vocabulary apart")
    if not tensor.is_floating_point() or tensor.device != tensor_of(logits.node).device:
        raise Refused(f"{describe(node)} scales by a tensor of {tensor.dtype} on {tensor.device}")


def _add(logits: Logits, node: Node) -> Logits:
    other, _ = _operands(logits, node)
    return _then(logits, node, _addition(other, 1))


def _sub(logits: Logits, node: Node) -> Logits:
    other, is_reversed = _operands(logits, node)
    if is_reversed:
        return _then(logits, node, Scale(-1.0), _addition(other, 1))
    return _then(logits, node, _addition(other, -1))


def _addition(other: Any, sign: int) -> ValueStep:
    return AddNumber(sign * number_of(other)) if is_number(other) else AddTensor(other, sign)


def _tanh(logits: Logits, node: Node) -> Logits:
    return _then(logits, node, Tanh())


def _sigmoid(logits: Logits, node: Node) -> Logits:
    return _then(logits, node, Sigmoid())


def _masked_fill(logits: Logits, node: Node) -> Logits:
    call = arguments(node, lambda input, mask, value: locals())
    if call is None or not (call["input"] is logits.node or is_in_place(node)):
        raise Refused(f"{describe(node)} is called with arguments that are not understood")
    return _then(logits, node, FillMasked(call["mask"], _fill(node, call["value"])))


def _fill(node: Node, value: Any) -> float:
    number = number_of(value)
    if not number <= _HARDLY:
        raise Refused(
            f"{describe(node)} sets logits to {number}, not to -inf or at most {_HARDLY:.0f}: "
            "these words would count"
        )
    return number


def _then(logits: Logits, node: Node, *steps: ValueStep) -> Logits:
    """``logits`` after the ``steps`` that ``node`` makes; Refused if they have no normal form."""
    for step in steps:
        _check(logits, step, node)
        logits = logits.then(step)
    return logits


def _check(logits: Logits, step: ValueStep, node: Node) -> None:
    values = logits.values
    match step:
        case Scale(factor=factor):
            if any(fill * factor > _STILL_HARDLY for fill in values.fills):
                raise Refused(f"masked logits are multiplied by {factor}: these words would count")
        case AddTensor(tensor, _):
            if values.cap is not None:
                raise Refused(f"{describe(node)} adds a tensor to the logits after a softcap")
            value = tensor_of(tensor)
            if not _is_for_words(logits, value) or not value.is_floating_point():
                raise Refused(f"{describe(node)} adds a tensor to the logits that is not a bias")
        case Tanh() | Sigmoid():
            if values.cap is not None:
                raise Refused(f"{describe(node)} is a second softcap")
            if values.fills:
                raise Refused(f"{describe(node)} is done to masked logits")
        case FillMasked(mask, _):
            value = tensor_of(mask)
            is_mask = value.dtype == torch.bool and _is_for_words(logits, value)
            if not is_mask or values.cap is not None:
                raise Refused(
                    f"{describe(node)} masks logits by other than a mask of the vocabulary"
                )
        case _:
            pass


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


def filled_tail(logits: Logits, node: Node) -> FillTail:
    """The step that ``logits[..., start:] = fill`` is, done to all rows; else Refused."""
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
    return FillTail(start, _fill(node, call["value"]))


def fill_tail(logits: Logits, step: FillTail) -> Logits:
    """``logits`` after ``step``."""
    if same(step.start, tensor_of(logits.node).size(logits.vocab_dim)):
        return logits  # there are no such words
    tail, counted = logits.values.tail, logits.values.vocab_slice
    if tail is not None and counted is not None and step.start > counted[1] - counted[0]:
        if step.fill != tail:
            raise Refused("masked words are masked once more, with another value")
        return logits
    return _of_some_words(logits.then(step))


def keep_words(logits: Logits, start: int, stop: int) -> Logits:
    """``logits`` with only the words from ``start`` to ``stop`` of those in the tensor."""
    return _of_some_words(logits.then(KeepWords(start, stop)))


def _of_some_words(logits: Logits) -> Logits:
    kept = logits.values.vocab_slice
    if kept is not None and kept[0] >= kept[1]:
        raise Refused("no words of the vocabulary are left")
    return logits


_FOLLOWERS: dict[str | None, Callable[[Logits, Node], Logits]] = {
    "mul": _scaled,
    "div": _scaled,
    "neg": _scaled,
    "add": _add,
    "sub": _sub,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "masked_fill": _masked_fill,
}
