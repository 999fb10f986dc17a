"""Results that a program takes of the same logits one after the other, from one pass over these.

A loss, then an accuracy, then entropies: each would multiply hidden states and weight once more. A
program asks for the same in every step, so what it asked for after the first result of some logits,
and that needs nothing beside the logits, is computed with the first the next time, and waits with
the logits until it is asked for. What nobody has asked for when they go is not foreseen again.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..compat.compiling import is_inside_of_checkpoint
from .cells import Call, Cell
from .history import is_piece
from .readers import reader_of

Later = dict[object, tuple[Cell, Call] | None]
"""What is asked for later: for each way of use the call, and the cell that stands for logits there.
None if it cannot be computed with the first."""

_MOST_LATER = 4
_MOST_WAYS = 64
_later: OrderedDict[object, Later] = OrderedDict()
"""For each way to take a first result, the latest last."""


def foresee(
    call: Call, reader: Any, is_differentiated: bool, has_gradients: bool
) -> tuple[Tensor | None, Callable[..., Tensor] | None]:
    """The result of ``call``, if it was computed with another one, and what computes it with those
    asked for later. ``is_differentiated`` if a gradient is to go back from it, and
    ``has_gradients`` if that is computed with it."""
    # A checkpointed region is run again, and has to save the same then.
    if len(call.roots) > 1 or is_piece(call) or is_inside_of_checkpoint():
        return None, None
    (root,) = call.roots
    if reader.way in root.foreseen:
        return root.foreseen.pop(reader.way), None
    if root.first_way is not None:
        is_apart = has_gradients or (is_differentiated and root.has_gradients)
        if not is_apart and not reader.is_given_tensors:
            _learn(call, reader.way)
        return None, None
    root.first_way, root.has_gradients = reader.way, has_gradients
    if is_differentiated and not call.is_given_little:
        return None, None
    with torch.set_grad_enabled(root.has_gradients):
        return None, _with_later(call, reader.way)


def _learn(call: Call, way: object) -> None:
    (root,) = call.roots
    later = _later.setdefault(root.first_way, {})
    if way not in later and len(later) < _MOST_LATER:
        blank = root.bare()
        later[way] = blank, call.of_others({root: blank})
    if len(_later) > _MOST_WAYS:
        _later.popitem(last=False)


def _with_later(call: Call, way: object) -> Callable[..., Tensor] | None:
    (root,) = call.roots
    later = _later.get(way, {})
    expected = {one: known for one, known in later.items() if known is not None}
    if not expected:
        return None
    _later.move_to_end(way)
    others = [other.of_others({blank: root}) for blank, other in expected.values()]
    reader = reader_of(call, *others)
    if reader is None:
        later[next(reversed(expected))] = None
        return None

    def run(*given: Tensor) -> Tensor:
        first, *results = reader.run(*given)
        root.foreseen = dict(zip(expected, (one.detach() for one in results), strict=True))
        weakref.finalize(root, _unlearn, later, root.foreseen).atexit = False
        result: Tensor = first
        return result

    return run


def _unlearn(later: Later, not_taken: dict[object, Tensor]) -> None:
    for way in not_taken:
        later.pop(way, None)
