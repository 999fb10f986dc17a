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
    mutation,
    number_of,
    same,
    tensor_of,
    value_of,
)
from .algebraic_caps import follow_root, is_root_step, is_square
from .row_steps import ScaleRows
from .types import Logits, Stage
from .value_steps import (
    AddNumber,
    AddTensor,
    Fill,
    KeepWords,
    Scale,
    Sigmoid,
    Tanh,
    ValueStep,
)


def is_value_step(node: Node) -> bool:
    return canonical_op(node) in _FOLLOWERS or is_root_step(node)


def follow_values(logits: Logits, node: Node) -> Logits:
    """What ``node`` makes of ``logits``, one of its arguments; Refused if not understood."""
    if logits.stage is Stage.LOGITS and is_square(node):
        return replace(logits, stage=Stage.SQUARE)
    if logits.stage in (Stage.SQUARE, Stage.ROOT, Stage.INVERSE_ROOT):
        return follow_root(logits, node)
    if logits.stage is Stage.LOGITS:
        if canonical_op(node) not in _FOLLOWERS:
            raise Refused("")
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
    has_constants = bool(values.masking or values.biases) or values.shift != 0
    return has_constants or values.cap is not None


def _scaled_by_node(logits: Logits, node: Node, other: Node) -> Logits:
    """A temperature that is a tensor, one or one for each row, scales the hidden states instead.

    So does a number that changes from call to call: as a number of the op it would be compiled for
    each value.
    """
    if logits.values.masking:
        raise Refused(f"{describe(node)} scales masked logits by a tensor")
    if _has_a_form(logits):
        raise Refused(f"{describe(node)} scales by a tensor after a bias or softcap")
    if tensor_of(logits.head.node).dtype == torch.float16:
        raise Refused(f"{describe(node)} scales FP16 logits, and hidden states may overflow by it")
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
    if not is_number(other):
        return AddTensor(other, sign)
    if not math.isfinite(number := number_of(other)):
        raise Refused(f"adds {number} to the logits, which is not understood")
    return AddNumber(sign * number)


def _tanh(logits: Logits, node: Node) -> Logits:
    return _then(logits, node, Tanh())


def _sigmoid(logits: Logits, node: Node) -> Logits:
    return _then(logits, node, Sigmoid())


def _filled(logits: Logits, node: Node) -> Logits:
    return logits.then(read_fill(logits, node))


def is_fill(node: Node) -> bool:
    return canonical_op(node) in _FILLS


def read_fill(logits: Logits, node: Node) -> Fill:
    """The step that ``node`` makes, which sets the logits of some words in all rows."""
    return _FILLS[str(canonical_op(node))](logits, node)


def _masked_fill(logits: Logits, node: Node) -> Fill:
    call = arguments(node, lambda input, mask, value: locals())
    if call is None or not (call["input"] is logits.node or is_in_place(node)):
        raise Refused(f"{describe(node)} is called with arguments that are not understood")
    return Fill(_mask(logits, node, call["mask"]), _value(logits, node, call["value"]))


def _where(logits: Logits, node: Node) -> Fill:
    if node.target is torch.where:
        call = arguments(node, lambda condition, input, other: locals())
    else:
        call = arguments(node, lambda input, condition, other: locals())
    if call is None or call["condition"] is logits.node:
        raise Refused(f"{describe(node)} is called with arguments that are not understood")
    is_kept = call["input"] is logits.node
    value = call["other" if is_kept else "input"]
    if tensor_of(node).shape != tensor_of(logits.node).shape:
        raise Refused(f"{describe(node)} changes the shape of the logits")
    mask = _mask(logits, node, call["condition"])
    return Fill(mask, _value(logits, node, value, by_word=True), is_kept)


def _index_fill(logits: Logits, node: Node) -> Fill:
    call = arguments(node, lambda input, dim, index, value: locals())
    dims = tensor_of(logits.node).dim()
    if call is None or not isinstance(call["dim"], int):
        raise Refused(f"{describe(node)} is called with arguments that are not understood")
    if call["dim"] % dims != logits.vocab_dim:
        raise Refused(f"{describe(node)} fills rows, not words")
    return Fill(call["index"], _value(logits, node, call["value"]))


def _fill(logits: Logits, node: Node) -> Fill:
    call = arguments(node, lambda input, value=0: locals())
    vocab = tensor_of(logits.node).size(logits.vocab_dim)
    if call is None or not isinstance(vocab, int):
        raise Refused(f"{describe(node)} is called with arguments that are not understood")
    return Fill(range(vocab), _value(logits, node, call["value"]))


def _setitem(logits: Logits, node: Node) -> Fill:
    """``logits[..., words] = value``, done to all rows."""
    call = arguments(node, lambda input, index, value: locals())
    assert call is not None
    shape = tensor_of(logits.node).shape
    index = call["index"] if isinstance(call["index"], tuple) else (call["index"],)
    # A boolean tensor of several dimensions would take as many.
    if any(part is None or _dims(part) > 1 for part in index):
        raise Refused(f"{describe(node)} writes to logits in place where an index says")
    place = next((place for place, part in enumerate(index) if part is ...), len(index))
    full = [slice(None)] * (len(shape) - sum(part is not ... for part in index))
    parts = [*index[:place], *full, *index[place + 1 :]]
    words, vocab = parts.pop(logits.vocab_dim), shape[logits.vocab_dim]
    if any(not isinstance(part, slice) or part != slice(None) for part in parts):
        raise Refused(f"{describe(node)} writes to a part of the logits in place")
    return Fill(_words(node, words, vocab), _value(logits, node, call["value"]))


def _dims(part: Any) -> int:
    return tensor_of(part).dim() if isinstance(value_of(part), torch.Tensor) else 0


def _words(node: Node, words: Any, vocab: Any) -> Node | tuple[int, ...] | range:
    """Which words an index along a dimension of size ``vocab`` takes."""
    if isinstance(value_of(words), torch.Tensor):
        if tensor_of(words).dtype in (torch.bool, torch.int64):
            return words
    elif isinstance(words, list) and all(type(word) is int for word in words):
        return tuple(words)
    elif type(words) is int and isinstance(vocab, int):
        return range(words % vocab, words % vocab + 1)
    elif isinstance(words, slice) and isinstance(vocab, int):
        ends = (words.start, words.stop, words.step)
        if all(end is None or type(end) is int for end in ends):
            return range(*words.indices(vocab))
    raise Refused(f"{describe(node)} writes in place to words that are not known")


def _mask(logits: Logits, node: Node, mask: Any) -> Node:
    value = tensor_of(mask)
    if value.dtype != torch.bool or not _is_for_words(logits, value):
        raise Refused(f"{describe(node)} masks logits by other than a mask of the vocabulary")
    return mask


def _value(logits: Logits, node: Node, value: Any, by_word: bool = False) -> float | Node:
    """What ``node`` sets logits to: a number, or a tensor of one, or ``by_word`` one for each."""
    if isinstance(value, Node) and (number := _number_everywhere(value, until=node)) is not None:
        value = number
    if is_number(value):
        number = float(number_of(value))
        if math.isnan(number):
            raise Refused(f"{describe(node)} sets logits to NaN")
        return number
    tensor = tensor_of(value)
    if tensor.requires_grad:
        raise Refused(f"{describe(node)} sets logits to a tensor with a gradient")
    if tensor.dim() > 0 and not (by_word and _is_for_words(logits, tensor)):
        raise Refused(f"{describe(node)} sets logits to other than one number for each word")
    return value


def _then(logits: Logits, node: Node, *steps: ValueStep) -> Logits:
    """``logits`` after the ``steps`` that ``node`` makes; Refused if they have no normal form."""
    for step in steps:
        _check(logits, step, node)
        logits = logits.then(step)
    return logits


def _check(logits: Logits, step: ValueStep, node: Node) -> None:
    values = logits.values
    match step:
        case AddTensor(tensor, _):
            if values.cap is not None:
                raise Refused(f"{describe(node)} adds a tensor to the logits after a softcap")
            value = tensor_of(tensor)
            if not _is_for_words(logits, value) or not value.is_floating_point():
                raise Refused(f"{describe(node)} adds a tensor to the logits that is not a bias")
            if values.masking and value.requires_grad:
                raise Refused(f"{describe(node)} adds a bias with a gradient to masked logits")
        case Tanh() | Sigmoid():
            if values.cap is not None:
                raise Refused(f"{describe(node)} is a second softcap")
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


def _number_everywhere(tensor: Node, until: Node) -> Any:
    """What all elements of ``tensor`` are at the node ``until``, if it was made so; else None."""
    if any(mutation.writers(mutation.nodes_between(tensor, until), of=[tensor])):
        return None
    match describe(tensor):
        case "zeros_like" | "new_zeros" | "zeros":
            return 0.0
        case "ones_like" | "new_ones" | "ones":
            return 1.0
        case "full_like" | "full":
            call = arguments(tensor, lambda input, fill_value, **_: locals())
        case "new_full":
            call = arguments(tensor, lambda input, size, fill_value, **_: locals())
        case _:
            return None
    return call and call["fill_value"]


def fill_words(logits: Logits, written: Logits, step: Fill) -> Logits | None:
    """``logits`` after ``step`` was done to ``written``, which has all of their rows, perhaps other
    words of the vocabulary. None if it is unclear which of the words of ``logits`` these are.
    """
    if logits.stage is not Stage.LOGITS:
        return None
    ours, theirs = (
        held.values.vocab_slice or (0, held.head.vocab_size) for held in (logits, written)
    )
    if ours == theirs:
        return logits.then(step)
    if not isinstance(step.words, range) or step.words.step != 1:
        return None
    offset = theirs[0] - ours[0]
    start = max(0, step.words.start + offset)
    stop = min(ours[1] - ours[0], step.words.stop + offset)
    return logits.then(replace(step, words=range(start, stop))) if start < stop else logits


def keep_words(logits: Logits, start: int, stop: int) -> Logits:
    """``logits`` with only the words from ``start`` to ``stop`` of those in the tensor."""
    if start >= stop:
        raise Refused("no words of the vocabulary are left")
    return logits.then(KeepWords(start, stop))


_FILLS: dict[str, Callable[[Logits, Node], Fill]] = {
    "masked_fill": _masked_fill,
    "where": _where,
    "index_fill": _index_fill,
    "fill": _fill,
    "setitem": _setitem,
}
_FOLLOWERS: dict[str | None, Callable[[Logits, Node], Logits]] = {
    "mul": _scaled,
    "div": _scaled,
    "neg": _scaled,
    "add": _add,
    "sub": _sub,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    **dict.fromkeys(_FILLS, _filled),
}
