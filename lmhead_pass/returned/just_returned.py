"""Lazy logits as a compiled function returns them, and views of them.

They have no history yet: hidden states that the function computes get theirs when it has returned.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..compat import lazy_tensors as compat
from . import reading
from .cells import Call, Cell
from .history import Derive, Gate, Head
from .lazy_logits import LazyLogits, touch
from .recipe import Recipe
from .steps import DETACHING
from .views import calls_of

# Where hidden states keep the logits that are made of them, until all their views are made.
_WAITING = "_lmhead_pass_logits"


def returned_logits(recipe: Recipe, view: str, names: int) -> LazyLogits:
    """The logits of a compiled function that has just run, or a ``view`` of them (``views``).

    It is called for so many ``names`` of theirs, with the very same hidden states.
    """
    known = recipe.hidden.__dict__.pop(_WAITING, None)
    logits, left = known or (_from_recipe(recipe), names)
    if left > 1:
        recipe.hidden.__dict__[_WAITING] = logits, left - 1
    return _view(logits, view) if view else logits


def _from_recipe(recipe: Recipe) -> LazyLogits:
    # What is made of the logits and detached keeps nothing of the model's graph.
    made = recipe.without_history()
    cell = Cell(made, recipe.like(), recipe.hidden.device)
    reading.watch(cell)
    if not recipe.requires_grad:
        return LazyLogits(cell)
    return _untouched_of(cell, lambda: _with_head(recipe, made, cell))


def _view(logits: LazyLogits, text: str) -> LazyLogits:
    cells = _cells_of_view(logits._cell, text)
    if cells[-1].is_detached or logits._untouched is None:
        return LazyLogits(cells[-1])

    def with_history() -> Tensor:
        touch(logits)
        view: Tensor = logits
        for cell in cells:
            view = Derive.apply(partial(LazyLogits, cell), cell.source, view)  # type: ignore[no-untyped-call]
        return view

    return _untouched_of(cells[-1], with_history)


def _untouched_of(cell: Cell, with_history: Callable[[], Tensor]) -> LazyLogits:
    with torch.enable_grad(), compat.without_torch_function():
        gated = Gate.apply(LazyLogits(cell), torch.empty(0, requires_grad=True))  # type: ignore[no-untyped-call]
        gated._alias = LazyLogits(cell)
        # Autograd detaches the results of a compiled function that are no views.
        alias: LazyLogits = torch.ops.aten.alias(gated)
        gated._alias = None
    alias._untouched = with_history
    cell.owner = lambda: None
    return alias


def _cells_of_view(source: Cell, text: str) -> list[Cell]:
    """What a view of the logits of ``source`` goes through, itself the last."""
    cells = [source]
    autocast = compat.autocast_state(source.device.type)
    for function, others, item in calls_of(text, source.like):
        before = cells[-1]
        call = Call(function, (before, *others), {}, item, autocast, needs_no_values=True)
        like = call.run({before: before.like})
        is_detached = function in DETACHING
        cells.append(Cell(call, like, source.device, is_detached=is_detached))
    return cells[1:]


def _with_head(recipe: Recipe, made: Recipe, cell: Cell) -> Tensor:
    """Lazy logits with the history of what they are computed from. ``made`` is without one."""
    pairs = zip(recipe.tensors, recipe.wanted, strict=True)
    inputs = [tensor if is_wanted else tensor.detach() for tensor, is_wanted in pairs]
    is_cut_off = recipe.lacks_history(made)
    if is_cut_off or not any(tensor.requires_grad for tensor in inputs):  # frozen since
        inputs.append(torch.empty(0, requires_grad=True))
    # A view may have been read before.
    is_late = cell.is_late if cell.source is not None else cell.versions != made.versions
    make = partial(LazyLogits, cell)
    logits: Tensor = Head.apply(make, recipe, cell, is_late, is_cut_off, *inputs)  # type: ignore[no-untyped-call]
    return logits
