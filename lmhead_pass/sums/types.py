"""A number that is a sum of others, each times a weight that is known before them."""

from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import Node


@dataclass(frozen=True)
class Step:
    """A step from numbers, or from what is made of them, to a sum: linear in them, or a square."""

    node: Node
    """What makes the step."""
    source: Node
    """What has made the numbers that it takes, and ..."""
    name: Node
    """... by which name it reads them: another node, if ``source`` has written to that."""
    kind: str
    """``scale``: each number times what is known. ``move``: each is one of the numbers, or none.
    ``square``: of each. ``sum``: otherwise linear."""
    back: Callable[..., Node]
    """Inserts what becomes of a gradient on the way back."""
    reads: tuple[Node, ...] = ()
    """What that takes."""
    has_others: bool = False
    """Whether there is anything else in the result."""


@dataclass(frozen=True)
class LinearReduction:
    """How a single number is a sum of others, each times a weight that does not depend on these."""

    steps: tuple[Step, ...]
    """In graph order."""

    @property
    def nodes(self) -> tuple[Node, ...]:
        """What is behind the numbers; the last one is the sum."""
        return tuple(dict.fromkeys(step.node for step in self.steps))

    @property
    def sum(self) -> Node:
        return self.steps[-1].node

    @property
    def is_scaled(self) -> bool:
        """Whether there are factors on the way."""
        return any(step.kind == "scale" for step in self.steps)

    @property
    def reads(self) -> set[Node]:
        """What the weights are made of."""
        return {node for step in self.steps for node in step.reads}

    @property
    def squared(self) -> set[Node]:
        """What squares are taken of, and what that is made of."""
        nodes: set[Node] = set()
        for step in reversed(self.steps):
            if step.kind == "square" or step.node in nodes:
                nodes.add(step.source)
        return nodes
