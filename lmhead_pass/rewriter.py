"""Replaces what was matched by one call of the op."""

import itertools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from . import config, report
from .match import Match, Refusal, Returned, RowStep
from .matcher import find
from .tensors import tensor_of, value_of


def rewrite_graph(graph: Graph) -> None:
    """Rewrite every match in ``graph``, and report on it.

    A failure inside leaves the graph as it was; it is reported, or raised if ``config.strict``.
    """
    known = set(graph.nodes)
    try:
        found = find(graph)
        matches = [item for item in found if isinstance(item, Match)]
        inserted = [_insert(graph, match) for match in matches]
        # Several losses may be of the same logits.
        leaving = {item.logits.node: item for match in matches for item in match.returned}
        returned = {node: _return(graph, item) for node, item in leaving.items()}
    except Exception as error:
        for node in reversed([node for node in graph.nodes if node not in known]):
            graph.erase_node(node)
        if config.strict:
            raise
        report.failure(error)
        return
    for item in found:
        if isinstance(item, Refusal):
            report.refused(item)
    for match, nodes in zip(matches, inserted, strict=True):
        report.rewritten(match, nodes)
        match.loss.node.replace_all_uses_with(nodes[-1])
        graph.erase_node(match.loss.node)
    for before, after in returned.items():
        graph.output_node().replace_input_with(before, after)
    # Paths may share nodes.
    replaced = {node for match in matches for node in match.path}
    replaced.update(node for item in leaving.values() for node in item.path)
    for node in reversed([node for node in graph.nodes if node in replaced]):
        graph.erase_node(node)


def _insert(graph: Graph, match: Match) -> list[Node]:
    """Insert what replaces ``match`` before its loss: nodes, the last with the loss's value."""
    head, loss = match.head, match.loss
    before = tensor_of(loss.node)
    emit = _Emitter(graph, loss.node)

    def input_of_op(node: Node | None) -> Node | None:
        # Without a gradient on the loss (no_grad around it, a detach on the way) none may flow.
        if node is None or before.requires_grad or not tensor_of(node).requires_grad:
            return node
        return emit("detach", node)

    hidden, weight, bias = map(input_of_op, (head.hidden, head.weight, head.bias))
    for step in _needed(match.steps):
        hidden = _on_hidden(emit, hidden, step)
    if tensor_of(hidden).dim() == 1:
        hidden = emit("unsqueeze", hidden, 0)
    elif tensor_of(hidden).dim() > 2:
        hidden = emit("flatten", hidden, 0, -2)
    if head.weight_is_transposed:
        weight = emit("t", weight)
    target = loss.target
    if tensor_of(target).dim() != 1:
        target = emit("reshape", target, -1)

    result = emit(
        torch.ops.lmhead_pass.linear_cross_entropy.default,
        *(hidden, weight, bias, target, loss.class_weight, None),
        *(loss.reduction, loss.ignore_index, loss.label_smoothing, 1.0, None),
        *(match.compute_dtype, match.rows_per_chunk),
    )
    if loss.reduction == "none" and target is not loss.target:
        result = emit("view_as", result, loss.target)
    if tensor_of(result).dtype != before.dtype:
        result = emit("to", result, before.dtype)
    result.meta["example_value"] = before
    return emit.nodes


def _return(graph: Graph, returned: Returned) -> Node:
    """Insert what leaves the graph in place of ``returned``."""
    if config.returned_logits == "detach":
        return _return_detached(graph, returned)
    head, logits = returned.head, returned.logits
    before = tensor_of(logits.node)
    emit = _Emitter(graph, logits.node)
    hidden = head.hidden
    for step in logits.steps:
        hidden = _on_hidden(emit, hidden, step)
    dtypes = [tensor_of(node).dtype for node in returned.path]
    with graph.inserting_before(logits.node):
        node = graph.call_function(
            torch.ops.lmhead_pass.return_lazily.default,
            (
                *(hidden, head.weight, head.weight_is_transposed, head.bias),
                [str(dtype).removeprefix("torch.") for dtype, _ in itertools.groupby(dtypes)],
                *(logits.vocab_dim, before.requires_grad),
            ),
        )
    node.meta.update(logits.node.meta)
    return node


def _return_detached(graph: Graph, returned: Returned) -> Node:
    """A copy of what made the logits, each node beside its original, without a gradient."""
    copies: dict[Node, Node] = {}
    head = returned.head
    for node in (head.hidden, head.weight, head.bias):
        if node is not None and node not in copies:
            copies[node] = _Emitter(graph, head.node)("detach", node)
    for node in returned.path:
        with graph.inserting_after(node):
            copies[node] = graph.node_copy(node, lambda argument: copies.get(argument, argument))
        copies[node].meta["example_value"] = tensor_of(node).detach()
    return copies[returned.path[-1]]


def _needed(steps: tuple[RowStep, ...]) -> tuple[RowStep, ...]:
    # The op takes a list of rows, in whatever shape they were before.
    while steps and steps[-1].method == "reshape":
        steps = steps[:-1]
    return steps


def _on_hidden(emit: "_Emitter", hidden: Node, step: RowStep) -> Node:
    """Do to ``[*rows, H]`` what ``step`` does to ``[*rows]``."""
    if step.method == "getitem":
        return emit(operator.getitem, hidden, step.args)
    if step.method == "permute":
        return emit("permute", hidden, *step.args, len(step.args))
    size = tensor_of(hidden).size(-1)
    if not isinstance(size, int):
        size = emit("size", hidden, -1)
    return emit("reshape", hidden, *step.args, size)


class _Emitter:
    """Inserts calls before ``place``, with the fake values and the origin that others look for."""

    def __init__(self, graph: Graph, place: Node):
        self.graph = graph
        self.place = place
        self.nodes: list[Node] = []

    def __call__(self, target: str | Callable[..., Any], *args: Any) -> Node:
        kind = "call_method" if isinstance(target, str) else "call_function"
        with self.graph.inserting_before(self.place):
            node = self.graph.create_node(kind, target, args)
        node.meta.update(self.place.meta)
        values = torch.fx.map_arg(args, value_of)
        function = getattr(torch.Tensor, target) if isinstance(target, str) else target
        with torch.no_grad():
            node.meta["example_value"] = function(*values)
        self.nodes.append(node)
        return node
