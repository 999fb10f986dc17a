"""Inserts nodes into a graph."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from .tensors import tensor_of, value_of


class Emitter:
    """Inserts calls before ``place``, with the fake values and the origin that others look for."""

    def __init__(self, graph: Graph, place: Node):
        self.graph = graph
        self.place = place
        self.nodes: list[Node] = []

    def __call__(self, target: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        kind = "call_method" if isinstance(target, str) else "call_function"
        with self.graph.inserting_before(self.place):
            node = self.graph.create_node(kind, target, args, kwargs)
        node.meta.update(self.place.meta)
        node.meta.pop("unbacked_bindings", None)  # those sizes are the place's own
        values, named = torch.fx.map_arg((args, kwargs), value_of)
        function = getattr(torch.Tensor, target) if isinstance(target, str) else target
        fakes = (v for v in tree_leaves((values, named)) if isinstance(v, FakeTensor))
        # An index or a number may become a tensor, and that has to be a fake one.
        mode = next((fake.fake_mode for fake in fakes), nullcontext())
        with mode, torch.no_grad():
            node.meta["example_value"] = function(*values, **named)
        self.nodes.append(node)
        return node

    def copied(self, node: Node, values: dict[Node, Any]) -> Node:
        """Insert a copy of a ``node`` that make_fx has traced, which reads ``values`` instead."""
        with self.graph.inserting_before(self.place):
            copy = self.graph.node_copy(node, values.__getitem__)
        copy.meta = {**self.place.meta, "example_value": node.meta["val"]}
        copy.meta.pop("unbacked_bindings", None)
        if "unbacked_bindings" in node.meta:
            copy.meta["unbacked_bindings"] = node.meta["unbacked_bindings"]
        self.nodes.append(copy)
        return copy


def size_of(emit: Emitter, tensor: Node, dim: int) -> Any:
    """A size as an argument: a number, or a node if it is dynamic."""
    size = tensor_of(tensor).size(dim)
    return size if isinstance(size, int) else emit("size", tensor, dim)
