"""Inserts nodes into a graph, and moves those that are there."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx import Graph, Node

from ..compat.graphs import EXAMPLE_VALUE, SET_GRAD_ENABLED, UNBACKED_BINDINGS, fake_mode_of
from .tensors import gradients_are_recorded, tensor_of, value_of


class Emitter:
    """Inserts calls before ``place``, and gives each the fake value and the origin of a node."""

    def __init__(self, graph: Graph, place: Node):
        self.graph = graph
        self.place = place
        self.nodes: list[Node] = []
        self.records = False
        """Whether what is inserted has the gradients of what it reads."""
        self._inputs = [value_of(node) for node in graph.find_nodes(op="placeholder")]

    def __call__(self, target: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        kind = "call_method" if isinstance(target, str) else "call_function"
        with self.graph.inserting_before(self.place):
            node = self.graph.create_node(kind, target, args, kwargs)
        node.meta.update(self.place.meta)
        node.meta.pop(UNBACKED_BINDINGS, None)  # those sizes are the place's own
        values, named = torch.fx.map_arg((args, kwargs), value_of)
        function = getattr(torch.Tensor, target) if isinstance(target, str) else target
        # An index or a number may become a tensor, and that has to be a fake one.
        with fake_mode_of((values, named, self._inputs)), torch.set_grad_enabled(self.records):
            node.meta[EXAMPLE_VALUE] = function(*values, **named)
        self.nodes.append(node)
        return node

    def copied(self, node: Node, values: dict[Node, Any]) -> Node:
        """Insert a copy of a ``node`` that make_fx has traced, which reads ``values`` instead."""
        with self.graph.inserting_before(self.place):
            copy = self.graph.node_copy(node, values.__getitem__)
        copy.meta = {**self.place.meta, EXAMPLE_VALUE: node.meta["val"]}
        copy.meta.pop(UNBACKED_BINDINGS, None)
        if UNBACKED_BINDINGS in node.meta:
            copy.meta[UNBACKED_BINDINGS] = node.meta[UNBACKED_BINDINGS]
        self.nodes.append(copy)
        return copy


def size_of(emit: Emitter, tensor: Node, dim: int) -> Any:
    """Return a size of ``tensor``: a number, or a new node if the size is dynamic."""
    size = tensor_of(tensor).size(dim)
    return size if isinstance(size, int) else emit("size", tensor, dim)


def move_before(place: Node, nodes: Iterable[Node]) -> None:
    """Move ``nodes`` before ``place``, each with the gradient mode it runs in."""
    is_recorded = gradients_are_recorded(place)
    for node, was_recorded in [(node, gradients_are_recorded(node)) for node in nodes]:
        with node.graph.inserting_before(place):
            if was_recorded != is_recorded:
                node.graph.call_function(SET_GRAD_ENABLED, (was_recorded,))
            place.prepend(node)
            if was_recorded != is_recorded:
                node.graph.call_function(SET_GRAD_ENABLED, (is_recorded,))
