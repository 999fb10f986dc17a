"""Makes a graph of calls, as Dynamo does: it runs them on fake tensors and writes them down."""

import builtins
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import SymFloat, SymInt, Tensor
from torch.fx import Graph, GraphModule, Node
from torch.overrides import TorchFunctionMode

from ..compat import lazy_tensors as compat
from ..compat.graphs import EXAMPLE_VALUE


class NumberOfSymbols(Exception):
    """A graph cannot have the argument of a call."""


class Recorder(TorchFunctionMode):
    """Inside of it, calls on tensors that it knows, and of ``arange``, go into its graph.

    NumberOfSymbols if a call is given a number that is computed of symbols, and has no node.
    """

    def __init__(self, stack_trace: str) -> None:
        super().__init__()
        self.graph = Graph()
        self._stack_trace = stack_trace
        self._nodes: dict[int, Node] = {}
        self._values: list[Any] = []  # so that no number of another object is theirs

    def input(self, name: str, value: Tensor) -> Tensor:
        """``value``, as an input of the graph."""
        self._know(value, self.graph.placeholder(name))
        return value

    def module(self, results: Sequence[Tensor]) -> GraphModule:
        """The graph so far, which returns ``results``."""
        self.graph.output(tuple(self._nodes[id(result)] for result in results))
        return GraphModule({}, self.graph)

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        read = [leaf for leaf in compat.leaves_of((args, kwargs)) if id(leaf) in self._nodes]
        if (read or func is torch.arange) and compat.holds_tensors(result):
            args, kwargs = compat.map_arguments(
                args, kwargs, lambda leaf: self._nodes.get(id(leaf), leaf)
            )
            leaves = compat.leaves_of((args, kwargs))
            if any(isinstance(leaf, SymInt | SymFloat) for leaf in leaves):
                raise NumberOfSymbols
            kind, target, *more = _target(func)
            self._know(result, self.graph.create_node(kind, target, (*args, *more), kwargs))
        return result

    def _know(self, value: Any, node: Node) -> None:
        node.meta.update({EXAMPLE_VALUE: value, "stack_trace": self._stack_trace})
        self._nodes[id(value)] = node
        self._values.append(value)
        if isinstance(value, tuple | list):
            for number, item in enumerate(value):
                self._know(item, self.graph.call_function(operator.getitem, (node, number)))


def _target(func: Any) -> tuple[Any, ...]:
    """How Dynamo writes a call of ``func``: kind, target, and arguments after the others."""
    name = func.__name__
    if name == "__get__":
        attribute = func.__self__.__name__
        if attribute == "data":
            return "call_method", "detach"
        return "call_function", builtins.getattr, attribute
    if getattr(torch.Tensor, name, None) is not func:
        return "call_function", func
    plain = name.strip("_")
    if name.startswith("__") and hasattr(operator, plain):
        return "call_function", getattr(operator, plain)
    return "call_method", name
