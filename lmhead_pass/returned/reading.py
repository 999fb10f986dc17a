"""Readings of lazy logits: what is kept for late ones, and what the log says of them."""

import contextlib
import functools
import logging
import sys
import traceback
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compat.compiling import never_compiled
from ..compat.lazy_tensors import memory_of
from .cells import Cell
from .recipe import Recipe

log = logging.getLogger("lmhead_pass")

_OURS = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))
_unread: weakref.WeakSet[Cell] = weakref.WeakSet()
_told: set[tuple[str, str]] = set()


def watch(cell: Cell) -> None:
    """Let ``cell``, just returned, be read after an optimizer's step, too."""
    _watch_optimizers()
    _unread.add(cell)


def _before_step(optimizer: Any, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    """``torch.optim.Optimizer.step`` calls this, of whatever form, with its arguments.

    A closure among them runs the model, and the head is changed after it.
    """
    _keep_what_a_step_changes(optimizer)
    if not any(map(_may_be_closure, (*args[1:], *kwargs.values()))):
        return None

    def then_keep(leaf: Any) -> Any:
        def closure() -> Any:
            result = leaf()
            _keep_what_a_step_changes(optimizer)
            return result

        return closure if _may_be_closure(leaf) else leaf

    (itself, *others) = args
    named = {name: then_keep(leaf) for name, leaf in kwargs.items()}
    return (itself, *map(then_keep, others)), named


def _may_be_closure(argument: Any) -> bool:
    # A model can be called, and an optimizer that is given one looks into it.
    return callable(argument) and not isinstance(argument, torch.nn.Module)


def _keep_what_a_step_changes(optimizer: Any) -> None:
    """Before an optimizer changes a head, unread logits keep a copy of it, or their values."""
    cells = [cell for cell in _unread if cell.value is None]
    if not cells:
        return
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    changed = {memory_of(p) for p in parameters if p.grad is not None}
    copies: dict[int, Tensor] = {}

    def kept(tensor: Tensor) -> Tensor:
        if memory_of(tensor) not in changed:
            return tensor
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().clone()
        return copies[id(tensor)]

    for cell in cells:
        recipe = cell.source
        if not isinstance(recipe, Recipe) or changed.isdisjoint(map(memory_of, recipe.tensors)):
            continue
        if cell.like.nbytes <= recipe.weight.nbytes and id(recipe.weight) not in copies:
            with contextlib.suppress(RuntimeError):  # changed before: whoever reads it is told
                cell.read()
            continue
        bias = None if recipe.bias is None else kept(recipe.bias)
        cell.source = replace(recipe, weight=kept(recipe.weight), bias=bias)


@functools.cache
def _watch_optimizers() -> None:
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    # Where a step is compiled, it is called as it is.
    register_optimizer_step_pre_hook(never_compiled(_before_step))


# The first logits of all may be returned inside of a step, in its closure, and be late for that.
# They begin this only where torch itself is being imported, and has not got to its optimizers.
if "torch.optim.optimizer" in sys.modules:
    _watch_optimizers()


def tell(func: Callable[..., Any], cell: Cell) -> None:
    """Log, once for each line of the user's code, what reads unread logits and what it takes."""
    if not log.isEnabledFor(logging.INFO):
        return
    place = user_place()
    name = getattr(func, "__name__", str(func))
    if (place, name) not in _told:
        _told.add((place, name))
        size = cell.like.nbytes / 1e6
        log.info("read: %s at %s reads returned logits: %.1f MB are computed", name, place, size)


def user_place() -> str:
    """The line of code that called torch or this package, and that is of neither."""
    frames = _users_frames()
    return f"{frames[-1].filename}:{frames[-1].lineno} `{frames[-1].line}`" if frames else "unknown"


def user_stack() -> str:
    """The lines of code outside of torch and this package, as in the nodes of Dynamo's graphs."""
    return "".join(traceback.format_list(_users_frames()))


def _users_frames() -> list[traceback.FrameSummary]:
    return [f for f in traceback.extract_stack() if not f.filename.startswith(_OURS)]
