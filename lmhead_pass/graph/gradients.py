"""Which nodes a gradient may pass through: what is detached, or goes into no result, gets none."""

from typing import Any

import torch
from torch.fx import Graph, Node

from ..compat.graphs import tree_leaves
from . import mutation
from .tensors import is_plain, value_of

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
