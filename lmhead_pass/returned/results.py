"""What is taken of unread logits and has no vocabulary, computed by the op."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cells import Call
from .foresight import foresee
from .history import Consume, is_piece
from .one_of_several import Result, Tensors, is_one_of_several
from .readers import reader_of


def compute(call: Call, read: Sequence[Tensor], is_recorded: bool) -> Any:
    """The result of ``call``; NotImplemented if the op cannot compute it.

    ``read`` are the tensors that stand for its cells, ``is_recorded`` if autograd records what is
    made of them.
    """
    if is_recorded and is_piece(call) and call.is_given_little:
        call = call.with_copies()  # The backward runs it again.
    reader = reader_of(call)
    if reader is None:
        return NotImplemented
    is_differentiated = is_recorded and reader.like.is_floating_point()
    is_number, waits = reader.like.dim() == 0, False
    if is_differentiated and not is_piece(call):
        waits = is_one_of_several(call, reader.way) and is_number
    has_gradients = is_differentiated and is_number and not waits
    value, joint = foresee(call, reader, is_differentiated, has_gradients)
    if value is not None and not is_differentiated:
        return value
    tensors = tensors_of(call)
    given = [tensor for part in tensors.values() for tensor in part]
    run = joint or reader.run_first
    if not is_differentiated:
        with torch.no_grad():
            return run(*given).detach()
    if value is None and (waits or (joint and not is_number)):
        with torch.no_grad():
            value = run(*given)
    if value is not None:
        call = call.with_copies()
        run = reader_of(call).run_first
    for cell in call.cells:
        cell.is_needed_by(call)
    # A gradient ends at logits that are detached from what they are made of.
    for part, (_, wanted) in zip(tensors.values(), call.recipes, strict=True):
        for tensor, is_wanted in zip(part, wanted, strict=True):
            tensor.requires_grad_(is_wanted)
    result = Result(call, tensors, lambda: run(*given), None, is_recomputed=value is not None)
    return Consume.apply(result, value, *read)  # type: ignore[no-untyped-call]


def tensors_of(call: Call) -> Tensors:
    """What each of the roots of ``call`` is computed from, detached; RuntimeError if that has
    changed."""
    tensors = {}
    for root, (recipe, _) in zip(call.roots, call.recipes, strict=True):
        # A loss in a training loop: no step is to wait for the device.
        recipe.check_unchanged(at_once=root.is_late)
        tensors[root] = tuple(tensor.detach() for tensor in recipe.tensors)
    return tensors
