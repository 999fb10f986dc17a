"""Inserts what a call of the op takes of a head: hidden states, weight, bias.

What the model does to rows of the logits is done to the hidden states here. What it adds to each
word is added to the bias, and what it cuts off the vocabulary is cut off the weight. The logits
of masked words are constants.
"""

import math
import operator
from typing import Any

import torch
from torch.fx import Graph, Node
from typing_extensions import assert_never

from ..graph import Emitter, size_of, tensor_of
from ..logits import (
    AddNumber,
    AddTensor,
    Algebraic,
    Bias,
    Cast,
    ExpandLike,
    Fill,
    Index,
    KeepWords,
    Logits,
    Look,
    MetadataUse,
    Permute,
    Piece,
    Reshape,
    RowStep,
    Scale,
    ScaleRows,
    Sigmoid,
    Tanh,
    ValueStep,
)


def emit_hidden(emit: Emitter, logits: Logits, steps: tuple[RowStep, ...]) -> Node:
    """``[*rows, H]``: the hidden states of the head's rows after ``steps``."""
    hidden, dim = logits.head.hidden, logits.head.hidden_dim
    if dim != -1:
        hidden = emit("movedim", hidden, dim, -1)
    for step in steps:
        hidden = on_rows(emit, hidden, step)
    return hidden


def on_rows(emit: Emitter, tensor: Node, step: RowStep) -> Node:
    """Do to ``[*rows, H]`` what ``step`` does to ``[*rows]``."""
    match step:
        case Permute(order):
            return emit("permute", tensor, *order, len(order))
        case Reshape(sizes):
            return emit("reshape", tensor, *sizes, size_of(emit, tensor, -1))
        case _:
            return on_numbers(emit, tensor, step)


def on_numbers(emit: Emitter, tensor: Node, step: RowStep) -> Node:
    """Do ``step`` to ``[*rows]``, a number for each row."""
    match step:
        case Permute(order):
            return emit("permute", tensor, *order)
        case Reshape(sizes):
            return emit("reshape", tensor, *sizes)
        case Index(index):
            return emit(operator.getitem, tensor, index)
        case Piece(method, sizes, dim, number):
            return emit(operator.getitem, emit(method, tensor, *sizes, dim), number)
        case ScaleRows(factor, divides):
            return emit("div" if divides else "mul", tensor, factor)
        case _:
            assert_never(step)


def emit_weight(emit: Emitter, logits: Logits) -> Node:
    """``[V, H]``: the part of the head's weight that counts."""
    weight = logits.head.weight
    if logits.head.weight_is_transposed:
        weight = emit("t", weight)
    if tensor_of(weight).dim() > 2:
        weight = emit("flatten", weight, 1)
    return _part(emit, weight, logits.values.vocab_slice)


def emit_bias(emit: Emitter, logits: Logits) -> Node | None:
    """``[V]``: what is added to the product, before it is scaled; None if nothing is."""
    values, wide = logits.values, _wide(logits)
    total: Node | None = None
    for bias in values.biases:
        term = _emit_term(emit, bias, bias.factor / values.scale, wide)
        total = term if total is None else emit("add", emit("to", total, wide), term)
    if not values.inner:
        return total
    inner = values.inner / values.scale
    if total is not None:
        return emit("add", emit("to", total, wide), inner)
    first, last = values.vocab_slice or (0, logits.head.vocab_size)
    return emit("new_full", logits.head.weight, (last - first,), inner, dtype=wide)


def _emit_term(emit: Emitter, bias: Bias, factor: float, wide: torch.dtype) -> Node:
    """``[V]``: ``bias`` times ``factor``."""
    term = _part(emit, _flat(emit, bias.node), bias.vocab_slice)
    return term if factor == 1 else emit("mul", emit("to", term, wide), factor)


def emit_fill(emit: Emitter, logits: Logits) -> Node | None:
    """``[V]``: the logits of masked words, and NaN for the others; None if no words are masked.

    It is what becomes of NaN on the way that the logits took.
    """
    values, head = logits.values, logits.head
    if not values.masking:
        return None
    size = size_of(emit, head.weight, 1 if head.weight_is_transposed else 0)
    fill = emit("new_full", head.weight, (size,), math.nan, dtype=_wide(logits))
    for step in values.masking:
        fill = _emit_step(emit, fill, step)
    return fill


def _emit_step(emit: Emitter, fill: Node, step: ValueStep) -> Node:
    """``step`` done to ``[V]``."""
    match step:
        case Cast():
            return fill
        case Scale(number, divides):
            return emit("div" if divides else "mul", fill, number)
        case AddNumber(number):
            return emit("add", fill, number)
        case AddTensor(tensor, sign):
            return emit("add" if sign > 0 else "sub", fill, _flat(emit, tensor))
        case Tanh():
            return emit("tanh", fill)
        case Sigmoid():
            return emit("sigmoid", fill)
        case Algebraic():
            raise AssertionError("masked logits have no such cap")
        case KeepWords(start, stop):
            return emit(operator.getitem, fill, slice(start, stop))
        case Fill(words, value, is_kept):
            if isinstance(words, Node) and tensor_of(words).dtype == torch.bool:
                value = _flat(emit, value) if isinstance(value, Node) else value
                operands = (fill, value) if is_kept else (value, fill)
                return emit(torch.where, _flat(emit, words), *operands)
            return emit("index_fill", fill, 0, _emit_words(emit, fill, words), value)
        case _:
            assert_never(step)


def _emit_words(emit: Emitter, fill: Node, words: Node | tuple[int, ...] | range) -> Node:
    """``[K]`` int64"""
    device = tensor_of(fill).device
    match words:
        case Node():
            return words
        case range():
            return emit(torch.arange, words.start, words.stop, words.step, device=device)
        case _:
            return emit(torch.tensor, words, device=device)


def _flat(emit: Emitter, tensor: Node) -> Node:
    return emit("reshape", tensor, -1) if tensor_of(tensor).dim() > 1 else tensor


def _wide(logits: Logits) -> torch.dtype:
    return torch.promote_types(tensor_of(logits.head.node).dtype, torch.float32)


def _part(emit: Emitter, tensor: Node, vocab_slice: tuple[Any, Any] | None) -> Node:
    if vocab_slice is None or vocab_slice == (0, tensor_of(tensor).size(0)):
        return tensor
    return emit(operator.getitem, tensor, slice(*vocab_slice))


def emit_metadata_use(graph: Graph, node: Node, use: MetadataUse) -> Node:
    """The value of ``node``, from what is known without the logits."""
    emit, logits = Emitter(graph, node), use.logits
    match use:
        case Look(seen):
            stand_in = _emit_stand_in(emit, seen, logits)
            return emit_again(emit, node, seen, stand_in)
        case ExpandLike(_, tensor):
            value = tensor_of(logits.node)
            sizes = [-1] * value.dim()
            sizes[logits.vocab_dim] = value.size(logits.vocab_dim)
            return emit("expand", tensor, sizes)
        case _:
            assert_never(use)


def emit_again(emit: Emitter, node: Node, seen: Node, stand_in: Node) -> Node:
    """The same as ``node``, which reads ``stand_in`` instead of ``seen``."""
    args, kwargs = torch.fx.map_arg(
        (node.args, node.kwargs), lambda read: stand_in if read is seen else read
    )
    return emit(node.target, *args, **kwargs)


def _emit_stand_in(emit: Emitter, seen: Node, logits: Logits) -> Node:
    """A tensor with shape, dtype and device of ``seen``, and with the memory of one element."""
    value = tensor_of(seen)
    sizes = list(value.shape)
    if not all(isinstance(size, int) for size in sizes):  # then ``seen`` holds ``logits``
        rows = emit_hidden(emit, logits, logits.steps)
        sizes = [size_of(emit, rows, dim) for dim in range(value.dim() - 1)]
        sizes.insert(logits.vocab_dim, size_of(emit, emit_weight(emit, logits), 0))
    element = emit("new_empty", logits.head.weight, (), dtype=value.dtype)
    return emit("expand", element, sizes)
