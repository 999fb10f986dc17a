"""What is done to the rows of logits, as it is to be done to the hidden states instead.

A step acts on ``[*rows]``. On hidden states ``[*rows, H]`` it leaves the last dimension alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch.fx import Node

from ..compat.graphs import tree_leaves

_Step = TypeVar("_Step", bound="_RowStep")


@dataclass(frozen=True)
class _RowStep:
    @property
    def nodes(self) -> list[Node]:
        """What the step reads besides the rows: indices, sizes, factors."""
        leaves = tree_leaves([getattr(self, field.name) for field in fields(self)])
        return [leaf for leaf in leaves if isinstance(leaf, Node)]

    def with_nodes(self: _Step, change: Callable[[Node], Node]) -> _Step:
        """The same step, which reads ``change(node)`` for each of ``nodes``."""
        changed = {
            field.name: torch.fx.map_arg(getattr(self, field.name), change)
            for field in fields(self)
        }
        return replace(self, **changed)


@dataclass(frozen=True)
class Reshape(_RowStep):
    """The rows get another shape, and keep their order."""

    sizes: tuple[Any, ...]
    """A number or a node for each dimension of the rows, or -1."""


@dataclass(frozen=True)
class Permute(_RowStep):
    order: tuple[int, ...]
    """Which dimension of the rows comes first, second, ..."""


@dataclass(frozen=True)
class Index(_RowStep):
    index: tuple[Any, ...]
    """As between the brackets of ``rows[...]``: something for each dimension of the rows."""


@dataclass(frozen=True)
class Piece(_RowStep):
    """One of the tensors that the rows are cut into."""

    method: str
    """``chunk``, ``split``, ``unbind``, ...: gives a tuple."""
    sizes: tuple[Any, ...]
    """What ``method`` takes before the dimension."""
    dim: int
    number: int
    """Which of the pieces is taken."""


@dataclass(frozen=True)
class ScaleRows(_RowStep):
    """The rows are multiplied by a tensor, or divided by it. It scales hidden states as well."""

    factor: Node
    """``[]``, or ``[..., 1]``: one number for each row."""
    divides: bool


RowStep = Reshape | Permute | Index | Piece | ScaleRows


def row_order(steps: tuple[RowStep, ...]) -> tuple[RowStep, ...]:
    """``steps`` up to the last one that changes which rows there are, or which come first."""
    while steps and isinstance(steps[-1], Reshape):
        steps = steps[:-1]
    return steps


def take_different_rows(first: tuple[RowStep, ...], second: tuple[RowStep, ...]) -> bool:
    """Whether no row can be among those of both, whatever the sizes are."""
    differ = next(((a, b) for a, b in zip(first, second, strict=False) if a != b), None)
    match differ:
        case Index(a), Index(b) if all(isinstance(part, int | slice) for part in (*a, *b)):
            pairs = zip((*a, *b), (*b, *a), strict=True)
            return len(a) == len(b) and any(_ends_before(*pair) for pair in pairs)
        case Piece() as a, Piece() as b:
            return replace(a, number=b.number) == b
        case _:
            return False


def _ends_before(part: int | slice, other: int | slice) -> bool:
    """Whether ``part`` of a dimension ends before ``other`` starts. Both count from one end."""
    _, stop = _bounds(part)
    start, _ = _bounds(other)
    both = isinstance(stop, int) and isinstance(start, int) and (stop < 0) == (start < 0)
    return both and stop <= start


def _bounds(part: int | slice) -> tuple[Any, Any]:
    if isinstance(part, slice):
        return 0 if part.start is None else part.start, part.stop
    return part, part + 1 if part != -1 else None
