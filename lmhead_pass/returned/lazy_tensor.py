"""What all lazy tensors have: a cell for the value, and that value once somebody has had it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..compat import lazy_tensors as compat
from .cells import Cell


@dataclass(frozen=True)
class Plain:
    """The values of a lazy tensor as a plain one, with a history."""

    tensor: Tensor
    made_by: Any
    """The ``grad_fn`` of ``tensor``: another one once it is written to, by whatever name."""
    made_of: Any
    """The ``grad_fn`` of the lazy tensor: another one if that was detached since."""


class LazyTensor(Tensor):
    """A tensor whose values are computed when they are first needed (``lazy_logits``)."""

    _cell: Cell
    _plain: Plain | None
    """Once somebody has had the values: all that read them, and may keep views, share it."""


def lazy_in(arguments: Any) -> list[LazyTensor]:
    """The lazy tensors among ``arguments`` of a call."""
    return [leaf for leaf in compat.leaves_of(arguments) if isinstance(leaf, LazyTensor)]
