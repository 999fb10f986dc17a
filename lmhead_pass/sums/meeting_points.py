"""Finds the single numbers through which all gradients of some other numbers pass."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from ..compat.graphs import tree_leaves
from ..graph import is_plain, memory_of, mutation, value_of

_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


def meeting_points(numbers: Iterable[Node]) -> Iterator[Node]:
    """Each single number through which all gradients of ``numbers`` pass, in graph order."""
    numbers = set(numbers)
    graph = min(numbers).graph
    passing = _passing(graph)
    carriers: set[Node] = set()
    """Nodes through which a gradient of the numbers may pass."""
    written: set[int] = set()
    """The memory that carriers write to."""
    for node in mutation.nodes_between(min(numbers).prev, graph.output_node()):
        is_user = not carriers.isdisjoint(node.all_input_nodes)
        if node in numbers:
            if is_user:
                return
            carriers.add(node)
        elif node in passing and (is_user or not written.isdisjoint(memory_of(node))):
            carriers.add(node)
            if is_user and mutation.may_write(node):
                written |= mutation.memory_written(node)
                names = [name for name in _before(node) if memory_of(name) & written]
                if any(name.op in ("placeholder", "get_attr") for name in names):
                    return  # it is read outside of the graph
                carriers.update(names)
            value = value_of(node)
            is_number = is_plain(value) and value.dim() == 0 and value.is_floating_point()
            if is_number and numbers <= carriers:
                others = (user for name in carriers - {node} for user in name.users)
                if all(user <= node for user in others if user in passing):
                    yield node


def _before(node: Node) -> Iterator[Node]:
    return mutation.nodes_between(node.graph._root, node)


def _passing(graph: Graph) -> set[Node]:
    """The nodes that may pass a gradient on to what they read: not those that are detached."""
    passing: set[Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or (
            _may_have_gradient(value_of(node))
            and (mutation.may_write(node) or not passing.isdisjoint(node.users))
        ):
            passing.add(node)
    return passing


def _may_have_gradient(value: Any) -> bool:
    """True as well inside a torch.func transform, and for values of unknown kinds."""
    return any(
        not isinstance(leaf, _NUMBERS) and (not is_plain(leaf) or leaf.requires_grad)
        for leaf in tree_leaves(value)
    )
