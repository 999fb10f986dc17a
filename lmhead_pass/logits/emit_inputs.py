"""Inserts what a call of the op takes of a head: hidden states, weight and bias, as its logits want
them."""

import math
import operator

import torch
from torch.fx import Graph, Node

from ..compat.graphs import tree_leaves
from ..graph import Emitter, size_of, tensor_of
from .types import Logits, MetadataUse, RowStep


def input_nodes(logits: Logits) -> set[Node]:
    """What the logits are computed from, as the functions below do."""
    operands = [argument for step in logits.steps for argument in tree_leaves(step.args)]
    biases = [bias.node for bias in logits.values.biases]
    inputs = (logits.head.hidden, logits.head.weight, *biases, *operands)
    return {node for node in inputs if isinstance(node, Node)}


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
    if step.method == "permute":
        return emit("permute", tensor, *step.args, len(step.args))
    if step.method == "reshape":
        return emit("reshape", tensor, *step.args, size_of(emit, tensor, -1))
    if step.method in ("mul", "div"):
        return emit(step.method, tensor, *step.args)
    return on_numbers(emit, tensor, step)


def on_numbers(emit: Emitter, tensor: Node, step: RowStep) -> Node:
    """Do ``step`` to ``[*rows]``, a number for each row."""
    if step.method == "getitem":
        return emit(operator.getitem, tensor, step.args)
    if step.method == "piece":
        method, sizes, dim, number = step.args
        return emit(operator.getitem, emit(method, tensor, *sizes, dim), number)
    return emit(step.method, tensor, *step.args)


def emit_weight(emit: Emitter, logits: Logits) -> Node:
    """``[V, H]``: the part of the head's weight that counts."""
    weight = logits.head.weight
    if logits.head.weight_is_transposed:
        weight = emit("t", weight)
    if tensor_of(weight).dim() > 2:
        weight = emit("flatten", weight, 1)
    return _part(emit, weight, logits.vocab_slice)


def emit_bias(emit: Emitter, logits: Logits) -> Node | None:
    """``[V]``: what is added to the product, before it is scaled; None if nothing is."""
    values = logits.values
    total: Node | None = None
    for bias in values.biases:
        term = bias.node
        if tensor_of(term).dim() != 1:
            term = emit("reshape", term, -1)
        term = _part(emit, term, bias.vocab_slice)
        factor = bias.factor / values.scale
        if bias.fill is not None:
            wide = torch.finfo(_wide(logits))
            fill = bias.fill * factor
            fill = fill if wide.min <= fill <= wide.max else math.copysign(math.inf, fill)
            zeros = emit("new_zeros", term, tensor_of(term).shape, dtype=_wide(logits))
            term = emit("masked_fill", zeros, term, fill)
        elif factor != 1:
            term = emit("mul", emit("to", term, _wide(logits)), factor)
        total = term if total is None else emit("add", emit("to", total, _wide(logits)), term)
    if values.inner:
        inner = values.inner / values.scale
        if total is not None:
            return emit("add", emit("to", total, _wide(logits)), inner)
        first, last = logits.vocab_slice or (
            0,
            tensor_of(logits.head.node).size(logits.head.vocab_dim),
        )
        return emit("new_full", logits.head.weight, (last - first,), inner, dtype=_wide(logits))
    return total


def _wide(logits: Logits) -> torch.dtype:
    return torch.promote_types(tensor_of(logits.head.node).dtype, torch.float32)


def _part(emit: Emitter, tensor: Node, words: tuple[int, int] | None) -> Node:
    if words is None or words == (0, tensor_of(tensor).size(0)):
        return tensor
    return emit(operator.getitem, tensor, slice(*words))


def emit_metadata_use(graph: Graph, node: Node, use: MetadataUse) -> Node:
    """The value of ``node``, from what is known without the logits."""
    emit, value = Emitter(graph, node), tensor_of(use.logits.node)
    if use.kind == "to":
        return emit("to", use.operand, value.dtype)
    if use.kind == "expand":
        sizes = [-1] * value.dim()
        sizes[use.logits.vocab_dim] = value.size(use.logits.vocab_dim)
        return emit("expand", use.operand, sizes)
    dim = use.operand % value.dim()
    if dim == use.logits.vocab_dim:
        return emit("size", emit_weight(emit, use.logits), 0)
    rows = emit_hidden(emit, use.logits, use.logits.steps)
    return emit("size", rows, dim - (dim > use.logits.vocab_dim))
