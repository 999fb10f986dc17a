"""Which nodes a gradient may pass through: what is detached, or goes into no result, gets none."""

from typing import Any

import torch
from torch.fx import Graph, Node

from ..compat.graphs import tree_leaves
from . import mutation
from .tensors import gradient_modes, is_input, is_plain, memory_of, value_of

_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


def passing(graph: Graph) -> set[Node]:
    """The nodes that may pass a gradient on to what they read."""
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        if (
            node.op == "output"
            or _differentiates(node)
            or (
                _may_have_gradient(value_of(node))
                and (mutation.may_write(node) or not found.isdisjoint(node.users))
            )
        ):
            found.add(node)
    return found


def given_a_gradient(graph: Graph) -> set[int]:
    """The storages of tensors without a gradient that something with one is written into.

    Dynamo runs the write on the fake tensor that it has left with earlier nodes, too: these say
    then that they require a gradient.
    """
    if not any(map(mutation.writes, graph.nodes)):
        return set()
    had: set[Node] = set()
    found: set[int] = set()
    for node, is_recorded in gradient_modes(graph):
        sources = had.intersection(node.all_input_nodes)
        if is_input(node):
            has = _may_have_gradient(value_of(node))
        else:
            has = is_recorded and not _detaches(node) and bool(sources)
        if mutation.writes(node) and is_recorded and sources:
            targets = [one for one in node.all_input_nodes if one not in had]
            written = mutation.memory_written(node)
            found |= {s for one in targets for s in memory_of(one) if s in written}
            had.update(one for one in targets if not written.isdisjoint(memory_of(one)))
        if has and _may_have_gradient(value_of(node)):
            had.add(node)
    return found


def _detaches(node: Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.partition(".")[0] == "detach"


def _differentiates(node: Node) -> bool:
    """Whether ``node`` asks for gradients inside the graph, or may do so: it gives nothing back."""
    if node.target is torch.autograd.grad:
        return True
    return node.op in ("call_function", "call_method") and value_of(node) is None


def _may_have_gradient(value: Any) -> bool:
    """True as well inside a torch.func transform, and for values of unknown kinds."""
    return any(
        not isinstance(leaf, _NUMBERS) and (not is_plain(leaf) or leaf.requires_grad)
        for leaf in tree_leaves(value)
    )
