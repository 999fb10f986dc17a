"""What is to be run in chunks: a region of a graph, and the calls of the op for it."""

from dataclasses import dataclass

import torch
from torch.fx import Node

from ..logits import Head
from ..op import RowPart
from .layout import Dim, Space
from .values import ConstantLeaf, Exit, Expression, Outer


@dataclass(frozen=True)
class RowCall:
    """What one call of the op computes."""

    heads: tuple[Head, ...]
    space: Space
    """Its rows."""
    by_row: tuple[Expression, ...]
    """Leaves, whose ``space`` has all of these rows, or more."""
    constants: tuple[ConstantLeaf, ...]
    part: RowPart
    exits: tuple[tuple[Exit, ...], ...]
    """What each output of the part is read as."""
    with_gradient: tuple[bool, ...]
    """Whether a gradient may reach the logits of each head, each input by row, each constant."""
    rows_per_chunk: int


@dataclass(frozen=True)
class Region:
    """A part of a graph that treats rows of logits apart, and ends in numbers without a
    vocabulary."""

    node: Node
    """What it is named after."""
    heads: tuple[Head, ...]
    root: Space
    """The rows of the heads."""
    dims: tuple[tuple[Dim, ...], ...]
    """Of each head's logits."""
    nodes: tuple[Node, ...]
    """What is run in chunks, in graph order, the heads too."""
    absorbed: tuple[Node, ...]
    """What made inputs for these nodes alone."""
    calls: tuple[RowCall, ...]
    results: dict[Node, Exit | Outer]
    """What stands for those of ``nodes`` that are read elsewhere."""
    sizes: dict[Node, Node]
    """What stands for nodes that read a size of the logits."""
    place: Node
    """The calls come before this node."""
    moved: tuple[Node, ...]
    """These nodes come behind the calls, in this order."""

    @property
    def tokens(self) -> int | torch.SymInt:
        size: int | torch.SymInt = 1
        for label in self.root.labels:
            size = size * label.size
        return size
