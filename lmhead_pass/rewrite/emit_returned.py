"""Inserts what stands for logits that leave the graph, until they are read."""

from dataclasses import replace
from functools import partial

import torch
from torch.fx import Graph, Node

from ..graph import Emitter, tensor_of, value_of
from ..logits import Logits
from ..plan import must_copy_hidden, recipe_of, sources_of
from .emit_inputs import emit_hidden


def emit_lazily(graph: Graph, logits: Logits) -> Node:
    """Insert, at the end of the graph, what stands for ``logits`` until they are read."""
    emit = Emitter(graph, graph.output_node())
    # Nothing of the model's graph is kept for a gradient.
    constant = replace(logits.head, hidden=emit("detach", logits.head.hidden))
    steps = tuple(step.with_nodes(partial(_constant, emit)) for step in logits.steps)
    hidden = emit_hidden(emit, replace(logits, head=constant), steps)
    if must_copy_hidden(logits):
        hidden = emit("clone", hidden)
    head, value = logits.head, tensor_of(logits.node)
    bias, recipe = recipe_of(logits)
    with graph.inserting_before(emit.place):
        node = graph.call_function(
            torch.ops.lmhead_pass.return_lazily.default,
            (
                *(hidden, head.weight, head.weight_is_transposed, bias, recipe),
                *(logits.vocab_dim, value.requires_grad, sources_of(logits)),
            ),
        )
    node.meta.update(logits.node.meta)
    return node


def _constant(emit: Emitter, node: Node) -> Node:
    value = value_of(node)
    return emit("detach", node) if isinstance(value, torch.Tensor) else node
