"""What is computed of rows, as expressions on chunks of them, and who shares memory with whom.

A tensor with some dimensions of rows is, in a chunk, ``[n, ...]``: all rows come first, in one
dimension, and the other dimensions follow in their order. Writes in place become new expressions,
for every name of the same memory.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from ..graph import Refused
from ..op import RowCount
from .layout import Dim, Space, finest


@dataclass(eq=False)
class Outer:
    """A tensor that is not computed in chunks."""

    value: torch.Tensor
    """A fake tensor, in FP32 if what it stands for is in BF16 or FP16."""
    node: Node | None = None
    """The node of the graph that it is; None if it is made by a call."""
    call: tuple[Any, tuple[Any, ...], dict[str, Any]] | None = None
    """An ATen operation and its arguments, with more of these, or ``Exit``, for tensors."""
    item: int | None = None
    """Which of the call's results it is."""
    depends: bool = False
    """Whether it depends on what is computed in chunks."""


@dataclass(eq=False)
class Exit:
    """What is computed in chunks and read elsewhere."""

    traced: "Traced"
    expression: "Expression"
    value: torch.Tensor
    """A fake tensor of its form."""
    dims: tuple[Dim, ...]


@dataclass(eq=False)
class HeadLeaf:
    """The logits of a head, but for its bias."""

    number: int


@dataclass(eq=False)
class RowLeaf:
    """A tensor with a value for each row."""

    outer: Outer
    dims: tuple[Dim, ...]
    """Its own; those that lack rows are expanded."""


@dataclass(eq=False)
class ConstantLeaf:
    """A tensor that is the same for all rows."""

    outer: Outer
    sizes: tuple[int, ...]


@dataclass(eq=False)
class Expression:
    """``[n, ...]``, computed of others. Equal ones are the same object (``Expressions``)."""

    op: Any
    """The name of an ATen operation, or a leaf."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    space: Space | None = None
    """Of a leaf with rows: which rows it has."""


class Expressions:
    """Makes expressions, each once."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Expression] = {}

    def __call__(self, op: str, *args: Any, **kwargs: Any) -> Expression:
        key = (op, hashable(args), hashable(kwargs))
        return self._known.setdefault(key, Expression(op, args, kwargs))


def hashable(argument: Any) -> Hashable:
    """Equal for arguments that are the same: 1 is not True, and not 1.0."""
    if isinstance(argument, list | tuple):
        return (type(argument), *map(hashable, argument))
    if isinstance(argument, dict):
        return tuple((name, hashable(value)) for name, value in argument.items())
    is_hashed_by_text = isinstance(argument, float | torch.SymInt | torch.SymFloat | torch.SymBool)
    return type(argument), repr(argument) if is_hashed_by_text else argument


@dataclass(frozen=True)
class View:
    """A step from one view of a cell's memory to another, on chunks."""

    kind: str
    """"reshape", "permute", "slice", "select" or "expand"."""
    before: tuple[int, ...]
    """The sizes, without the rows, of what is viewed."""
    numbers: tuple[Any, ...]
    """The sizes or the order afterwards; dimension (of the chunk), start, stop and step; dimension
    and place."""


class Cell:
    """Memory."""

    def __init__(self, expression: Expression, space: Space) -> None:
        self.expression = expression
        self.space = space
        self.is_shared = False
        """Whether another cell stands for the same memory: it must not be written to."""


@dataclass(frozen=True, eq=False)
class Traced:
    """A tensor that is computed in chunks."""

    cell: Cell
    views: tuple[View, ...]
    dims: tuple[Dim, ...]
    sizes: tuple[Any, ...]
    """Of the whole tensor."""
    space: Space

    @property
    def finest(self) -> tuple[Dim, ...]:
        return finest(self.dims)

    @property
    def rest(self) -> tuple[int, ...]:
        """The sizes of the dimensions that are no rows."""
        return rest_of(self.finest, self.sizes)

    @property
    def words(self) -> int:
        """How many numbers there are for each row."""
        count = 1
        for size in self.rest:
            count *= size
        return count


def rest_of(dims: tuple[Dim, ...], sizes: tuple[Any, ...]) -> tuple[int, ...]:
    rest = tuple(size for dim, size in zip(dims, sizes, strict=True) if dim is None)
    if not all(isinstance(size, int) for size in rest):
        raise Refused("something else than the number of rows is a dynamic size")
    return rest


def read(make: Expressions, traced: Traced) -> Expression:
    """What ``traced`` holds now."""
    return _views_of(make, traced)[-1]


def _views_of(make: Expressions, traced: Traced) -> list[Expression]:
    found = [traced.cell.expression]
    for view in traced.views:
        found.append(_APPLY[view.kind](make, found[-1], view))
    return found


def write(make: Expressions, traced: Traced, value: Expression) -> None:
    """Let ``traced``, and all other names of its memory, hold ``value``."""
    if traced.cell.is_shared:
        raise Refused("what is detached, or has a gradient of its own, is written to")
    if traced.space is not traced.cell.space:
        raise Refused("some of the rows are written to")
    held = _views_of(make, traced)
    for view, before in zip(reversed(traced.views), reversed(held[:-1]), strict=True):
        value = _undo(make, view, before, value)
    traced.cell.expression = value


def _undo(make: Expressions, view: View, before: Expression, value: Expression) -> Expression:
    match view.kind:
        case "reshape":
            return make("aten.reshape.default", value, [RowCount(), *view.before])
        case "permute":
            order = view.numbers
            inverse = [order.index(dim) for dim in range(len(order))]
            return make("aten.permute.default", value, inverse)
        case "slice":
            return make("aten.slice_scatter.default", before, value, *view.numbers)
        case "select":
            return make("aten.select_scatter.default", before, value, *view.numbers)
    raise Refused("what is expanded is written to")


_APPLY: dict[str, Callable[[Expressions, Expression, View], Expression]] = {
    "reshape": lambda make, of, view: make("aten.reshape.default", of, [RowCount(), *view.numbers]),
    "permute": lambda make, of, view: make("aten.permute.default", of, list(view.numbers)),
    "slice": lambda make, of, view: make("aten.slice.Tensor", of, *view.numbers),
    "select": lambda make, of, view: make("aten.select.int", of, *view.numbers),
    "expand": lambda make, of, view: make("aten.expand.default", of, [RowCount(), *view.numbers]),
}
