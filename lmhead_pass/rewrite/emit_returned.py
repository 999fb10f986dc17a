"""Inserts what stands for logits that leave the graph, until they are read."""

import torch
from torch.fx import Graph, Node

from ..graph import Emitter, memory_of, tensor_of, value_of
from ..logits import Logits
from ..plan import leaves_its_hidden_states, recipe_of
from .emit_inputs import emit_hidden


def emit_lazily(graph: Graph, logits: Logits) -> tuple[Node, Node | None]:
    """Insert, at the end of the graph, what stands for ``logits`` until they are read.

    Also returns what the graph is to return beside it, so that a gradient finds its way back: the
    hidden states, if they require one.
    """
    emit = Emitter(graph, graph.output_node())
    hidden = emit_hidden(emit, logits, logits.steps)
    if _is_seen_elsewhere(hidden):
        hidden = emit("clone", hidden)
    head, value = logits.head, tensor_of(logits.node)
    bias, recipe = recipe_of(logits)
    is_static = all(isinstance(size, int) for size in (*value.shape, *value.stride()))
    strides = list(value.stride()) if is_static else []
    is_wanted = value.requires_grad and _requires_gradient(logits)
    with graph.inserting_before(emit.place):
        node = graph.call_function(
            torch.ops.lmhead_pass.return_lazily.default,
            (
                *(hidden, head.weight, head.weight_is_transposed, bias, recipe),
                *(logits.vocab_dim, strides, value.requires_grad, is_wanted),
            ),
        )
    node.meta.update(logits.node.meta)
    return node, hidden if is_wanted and leaves_its_hidden_states(logits) else None


def _requires_gradient(logits: Logits) -> bool:
    read = (logits.head.hidden, *(node for step in logits.steps for node in step.nodes))
    return any(getattr(value_of(node), "requires_grad", False) for node in read)


def _is_seen_elsewhere(hidden: Node) -> bool:
    """Whether ``hidden`` is a view, an input or a result of the graph: others may write to it, and
    autograd gives it the history of what it is a view of."""
    if hidden.op in ("placeholder", "get_attr"):
        return True
    memory = memory_of(hidden)
    return any(
        node is not hidden and not memory.isdisjoint(memory_of(node)) for node in hidden.graph.nodes
    ) or any(user.op == "output" for user in hidden.users)
