"""Inserts what stands for logits that leave the graph, until they are read."""

import torch
from torch.fx import Graph, Node

from ..compat.compiling import is_part_of_ddp
from ..graph import Emitter, is_input, memory_of, tensor_of
from ..logits import Logits
from ..plan import is_differentiable, is_frozen_view, recipe_of
from .emit_inputs import emit_hidden


def emit_lazily(graph: Graph, logits: Logits, names: int) -> tuple[Node, list[Node]]:
    """Insert, at the end of the graph, what stands for ``logits`` until they are read.

    They leave the graph by so many ``names``, if views of them leave it, too (``emit_view``). Also
    returns what the graph is to return beside it, so that a gradient finds its way back: of hidden
    states, weight and bias those that the graph computes and that require one.
    """
    emit = Emitter(graph, graph.output_node())
    head, value = logits.head, tensor_of(logits.node)
    bias, recipe = recipe_of(logits)
    hidden = emit_hidden(emit, logits, logits.steps)
    # Products of more than two dimensions are views of matrices to Inductor.
    is_safe = tensor_of(hidden).dim() == 2 and not is_input(hidden)
    hidden = _not_seen_elsewhere(emit, hidden) if is_safe else _copied(emit, hidden)
    parameters = [head.weight] if bias is None else [head.weight, bias]
    kept = [p if is_frozen_view(p) else _not_seen_elsewhere(emit, p) for p in parameters]
    is_static = all(isinstance(size, int) for size in (*value.shape, *value.stride()))
    strides = list(value.stride()) if is_static else []
    is_wanted = [_requires_gradient(logits), *map(is_differentiable, parameters)]
    if not value.requires_grad:
        is_wanted = [False] * len(is_wanted)
    with graph.inserting_before(emit.place):
        node = graph.call_function(
            torch.ops.lmhead_pass.return_lazily.default,
            (
                *(hidden, kept[0], head.weight_is_transposed, *(kept[1:] or [None]), recipe),
                *(logits.vocab_dim, strides, value.requires_grad, is_wanted),
            ),
            {"names": names} if names > 1 else {},
        )
    node.meta.update(logits.node.meta)
    tensors = [tensor for tensor, wanted in zip((hidden, *kept), is_wanted, strict=True) if wanted]
    # A part into which DDP cuts a graph has to return what it did: there a gradient is refused.
    beside = [tensor for tensor in tensors if not (is_input(tensor) or is_part_of_ddp())]
    return node, beside


def emit_view(graph: Graph, logits: Logits, whole: Node, view: str) -> Node:
    """Insert what stands for ``logits``, a ``view`` of those that ``whole`` stands for."""
    with graph.inserting_before(graph.output_node()):
        node = graph.call_function(whole.target, whole.args, {**whole.kwargs, "view": view})
    node.meta.update(logits.node.meta)
    return node


def _requires_gradient(logits: Logits) -> bool:
    read = (logits.head.hidden, *(node for step in logits.steps for node in step.nodes))
    return any(map(is_differentiable, read))


def _not_seen_elsewhere(emit: Emitter, node: Node) -> Node:
    """``node``, copied if the graph computes it as a view or shows it elsewhere: others may write
    to it then, and autograd gives it the history of what it is a view of."""
    if is_input(node):
        return node
    memory = memory_of(node)
    is_seen = any(
        other is not node and not memory.isdisjoint(memory_of(other)) for other in node.graph.nodes
    ) or any(user.op == "output" for user in node.users)
    return _copied(emit, node) if is_seen else node


def _copied(emit: Emitter, node: Node) -> Node:
    return emit(torch.ops.lmhead_pass.own_memory.default, node)
