"""Which nodes hold the same values: made by the same operation, of the same values.

A loop over pieces of a sequence transposes or casts the head's weight once in each piece. These are
several nodes, and one weight.
"""

from collections.abc import Hashable
from dataclasses import fields, is_dataclass
from typing import Any

from torch.fx import Graph, Node

from ..compat.graphs import (
    ENTER_AUTOCAST,
    ENTER_INFERENCE,
    EXIT_AUTOCAST,
    EXIT_INFERENCE,
    SET_GRAD_ENABLED,
    is_torch_op,
    tree_leaves,
)
from . import mutation
from .randomness import draws
from .tensors import memory_of, value_of, wraps_none


class SameValues:
    """Of one graph, as it is when this is made."""

    def __init__(self, graph: Graph):
        self._made: dict[Node, Hashable] = {}
        """Equal for nodes that were made alike."""
        self._writers: list[tuple[Node, set[int]]] = []
        numbers: dict[Hashable, int] = {}
        recorded, blocks = True, dict[Node, Hashable]()
        for node in graph.nodes:
            if node.target is SET_GRAD_ENABLED:
                recorded = node.args[0]
            elif node.target in (ENTER_AUTOCAST, ENTER_INFERENCE):
                blocks[node] = (node.target, self.of(node.args, node))
            elif node.target in (EXIT_AUTOCAST, EXIT_INFERENCE):
                del blocks[node.args[0]]
            made: Hashable = node
            if node.op == "get_attr":
                made = node.target
            elif _can_be_compared(node):
                arguments = self.of((node.args, node.kwargs), node)
                made = (node.target, arguments, recorded, tuple(blocks.values()))
            # A number is as good as what it stands for, however long that is.
            self._made[node] = numbers.setdefault(made, len(numbers))
            if written := mutation.memory_written(node):
                self._writers.append((node, written))

    def of(self, what: Any, reader: Node) -> Hashable:
        """Equal for what holds the same values at ``reader``, or another at another one.

        ``what`` is a node, or anything with nodes in it: a container or a dataclass.
        """
        match what:
            case Node():
                memory = memory_of(what)
                writers = (writer for writer, of in self._writers if not memory.isdisjoint(of))
                return self._made[what], frozenset(one for one in writers if one < reader)
            case tuple() | list():
                return tuple(self.of(part, reader) for part in what)
            case dict():
                return tuple((name, self.of(part, reader)) for name, part in what.items())
            case slice():
                return slice, self.of((what.start, what.stop, what.step), reader)
        if is_dataclass(what):
            parts = (getattr(what, field.name) for field in fields(what) if field.compare)
            return type(what), tuple(self.of(part, reader) for part in parts)
        # 1 is not True, and not 1.0.
        return type(what), what if isinstance(what, Hashable) else id(what)


def _can_be_compared(node: Node) -> bool:
    """Whether ``node`` computes tensors of its arguments and the modes that are on, and no more."""
    leaves = tree_leaves(value_of(node))
    return (
        node.op in ("call_function", "call_method")
        and bool(leaves)
        and all(map(wraps_none, leaves))
        and not is_torch_op(node.target)  # other people's may draw, and not say so
        and not mutation.may_write(node)
        and not draws(node)
    )
