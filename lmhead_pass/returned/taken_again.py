"""Numbers that were taken of unread logits, taken again where logits are compared with them.

The op computes the logit of a word, or the largest of a row, by other products than those of a
reader of all logits, and the last digits differ. In a rank, ``(logits >= logits.gather(-1,
words)).sum(-1)``, they decide: half of the words would not be as large as themselves.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..compat import lazy_tensors as compat
from .cells import Call, Cell
from .steps import COMPARING, LOGITS_THEMSELVES


class Taken:
    """A number, for as long as somebody holds its memory, and how it was taken."""

    def __init__(self, call: Call, number: Tensor) -> None:
        (root,) = call.roots
        self._memory = compat.weak_memory(number.untyped_storage())
        self._like = torch.empty_strided(
            number.size(), number.stride(), dtype=number.dtype, device="meta"
        )
        self._given = call.tensors
        self._versions = self._versions_with(number)
        # The logits hold this, and are not to hold themselves.
        self._cells = [weakref.ref(cell) for cell in call.cells]
        self._root = root.bare()
        self._call = call.of_others({root: self._root})

    @property
    def is_gone(self) -> bool:
        """Whether nobody holds the number any more."""
        return bool(self._memory.expired())

    def is_seen_in(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is the number or a view of it, and neither it nor what it was taken
        by was written to."""
        return compat.memory_of(tensor) == self._memory.cdata and self._versions == (
            self._versions_with(tensor)
        )

    def again(self, root: Cell, tensor: Tensor) -> Cell | None:
        """What ``tensor`` is a view of, taken of ``root`` as others read it now, and as that view;
        None if ``root`` was written to since."""
        cells = [cell for ref in self._cells if (cell := ref())]
        if len(cells) == len(self._cells) and all(cell.is_as_computed for cell in cells):
            known = dict(zip(self._call.cells, cells, strict=True))
        elif root.is_as_computed:
            known = {self._root: root}
        else:
            return None
        device = root.device
        number = Cell(self._call.of_others(known), self._like, device, is_detached=True)
        place = tensor.size(), tensor.stride(), tensor.storage_offset()
        like = torch.empty_strided(*place[:2], dtype=tensor.dtype, device="meta")
        autocast = compat.autocast_state(device.type)
        view = Call(_view, (number, self._like, *place), {}, autocast=autocast)
        return Cell(view, like, device, is_detached=True)

    def _versions_with(self, number: Tensor) -> list[int]:
        return [compat.version_of(tensor) for tensor in (number, *self._given)]


def _view(
    number: Tensor, like: Tensor, size: torch.Size, stride: tuple[int, ...], offset: int
) -> Tensor:
    same = torch.empty_like(like, device=number.device).copy_(number)
    return same.as_strided(size, stride, offset)


def remember(call: Call, number: Tensor) -> None:
    """``number`` was computed by ``call``, of unread logits."""
    if call.function not in LOGITS_THEMSELVES or len(call.roots) != 1:
        return
    (root,) = call.roots
    root.taken = [one for one in root.taken if not one.is_gone]
    root.taken.append(Taken(call, number))


def taken_again(
    func: Callable[..., Any],
    args: Any,
    kwargs: Any,
    cells: list[Cell],
    lazily: Callable[[Cell], Tensor],
) -> tuple[Any, Any]:
    """The arguments of ``func``, with tensors for numbers that were taken of the same logits as
    ``cells``, ``lazily`` computed, if it compares."""
    if func not in COMPARING or compat.is_inside_of_modes():
        return args, kwargs
    known = [(root, taken) for cell in cells for root in cell.roots for taken in root.taken]

    def swap(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.layout != torch.strided:
            return leaf
        for root, taken in known:
            if taken.is_seen_in(leaf):
                again = taken.again(root, leaf)
                return leaf if again is None else lazily(again)
        return leaf

    return compat.map_arguments(args, kwargs, swap) if known else (args, kwargs)
