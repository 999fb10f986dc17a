"""Which dimensions of a tensor are rows: of the logits of a head, and of all that is made of them.

Rows have labels, one for each dimension of the head's rows. A dimension of a tensor holds the rows
of one label, of several (after ``view(-1, V)``), or no rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..graph import Refused, hint, product, same


class Label:
    """A dimension of rows."""

    def __init__(self, size: Any) -> None:
        self.size = size
        self.parts: tuple[Label, ...] = ()
        """What it was split into by a reshape."""

    def finest(self) -> tuple["Label", ...]:
        if not self.parts:
            return (self,)
        return tuple(fine for part in self.parts for fine in part.finest())


Rows = tuple[Label, ...]
Dim = Rows | None
"""The rows of a dimension, in order; None if it has none."""


@dataclass(frozen=True)
class Move:
    """Takes some of the rows: what a slice, a number or an index does to a dimension of them."""

    kind: str
    """``"slice"``, ``"select"`` or ``"pick"``."""
    labels: Rows
    """Of the dimension."""
    numbers: tuple[Any, ...]
    """Start, stop and step; or the place; or a tensor of places (``values.Outer``)."""


@dataclass(eq=False)
class Space:
    """A set of rows: those of a head, or some of those of another set."""

    labels: Rows
    """In the order of the rows."""
    parent: "Space | None" = None
    move: Move | None = None
    """What makes these rows of the parent's."""
    result: Label | None = None
    """What the move made."""
    _children: dict[Move, "Space"] = field(default_factory=dict)

    @property
    def finest(self) -> Rows:
        return tuple(fine for label in self.labels for fine in label.finest())

    @property
    def picks(self) -> list[Any]:
        """The tensors by which rows were picked on the way to these."""
        own = self.move.numbers if self.move is not None and self.move.kind == "pick" else ()
        return [*(self.parent.picks if self.parent is not None else ()), *own]

    def after(self, move: Move, result: Label | None) -> "Space":
        """The rows that ``move`` takes: the same object for the same rows.

        They have the label ``result`` instead of the move's; None if they have none.
        """
        if move not in self._children:
            labels, moved = self.finest, move.labels
            starts = [n for n in range(len(labels)) if labels[n : n + len(moved)] == moved]
            if len(starts) != 1:
                raise Refused("some rows are taken of several dimensions in another order")
            before, behind = labels[: starts[0]], labels[starts[0] + len(moved) :]
            made = (result,) if result is not None else ()
            self._children[move] = Space((*before, *made, *behind), self, move, result)
        return self._children[move]

    def steps_from(self, ancestor: "Space") -> list[tuple[Move, Rows]]:
        """What makes these rows of those of ``ancestor``, and the rows that each move leaves.

        Refused if they are no part of them.
        """
        found: list[tuple[Move, Rows]] = []
        space: Space | None = self
        while space is not ancestor:
            if space is None or space.parent is None or space.move is None:
                raise Refused("rows of different places are put together")
            found.append((space.move, space.result.finest() if space.result else ()))
            space = space.parent
        return found[::-1]


def finest(dims: Sequence[Dim]) -> tuple[Dim, ...]:
    """``dims`` with the labels that there are now."""
    return tuple(
        None if dim is None else tuple(fine for label in dim for fine in label.finest())
        for dim in dims
    )


def labels_in(dims: Sequence[Dim]) -> Rows:
    return tuple(label for dim in finest(dims) if dim is not None for label in dim)


def reshaped(dims: Sequence[Dim], before: Sequence[Any], after: Sequence[Any]) -> tuple[Dim, ...]:
    """The dimensions of a tensor of ``dims`` and sizes ``before`` in the sizes ``after``.

    Refused if rows and other things come into one dimension.
    """
    found: list[Dim] = []
    old, new = list(zip(finest(dims), before, strict=True)), list(after)
    while old or new:
        left, right = [old.pop(0)] if old else [], [new.pop(0)] if new else []
        while not same(product(size for _, size in left), product(right)):
            is_smaller = hint(product(size for _, size in left)) < hint(product(right))
            if is_smaller and old:
                left.append(old.pop(0))
            elif not is_smaller and new:
                right.append(new.pop(0))
            else:
                raise Refused("rows are reshaped in a way that is not understood")
        found += _regrouped(left, right)
    return tuple(found)


def _regrouped(left: list[tuple[Dim, Any]], right: list[Any]) -> list[Dim]:
    rows = [label for dim, _ in left if dim is not None for label in dim]
    if not rows:
        return [None] * len(right)
    if any(dim is None and not same(size, 1) for dim, size in left):
        raise Refused("rows and words are put into one dimension")
    found: list[Dim] = []
    for size in right:
        taken: list[Label] = []
        if same(size, 1):
            found.append(None)
            continue
        while not same(product(label.size for label in taken), size):
            if not rows:
                raise Refused("rows are reshaped in a way that is not understood")
            label = rows.pop(0)
            have = product(one.size for one in taken)
            if hint(have * label.size) > hint(size):
                wanted = _quotient(size, have)
                label.parts = (Label(wanted), Label(_quotient(label.size, wanted)))
                label, rest = label.parts
                rows.insert(0, rest)
            taken.append(label)
        found.append(tuple(taken))
    if rows:
        raise Refused("rows are reshaped in a way that is not understood")
    return found


def _quotient(size: Any, divisor: Any) -> Any:
    if same(divisor, 1):
        return size
    if same(size // divisor * divisor, size):
        return size // divisor
    raise Refused("rows are reshaped in a way that is not understood")
