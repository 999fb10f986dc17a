"""The gradients of several results of the same logits, in one pass over them.

Each result of rows (log-probabilities of tokens, entropies) would take the logits once more in the
backward, and two products. Once all their gradients are known, what they come to is the gradient of
one number, the sum of the results times their gradients, and the op takes three products for it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..compat import lazy_tensors as compat
from ..compat.compiling import is_saved_for_once
from .cells import Call, Cell
from .lazy_gradient import Gradients, Sources
from .readers import reader_of
from .recipe import Recipe

Tensors = Mapping[Cell, tuple[Tensor, ...]]
"""Of each of the logits that models returned: hidden states, weight and bias."""


def versions(call: Call, tensors: Tensors) -> list[int]:
    """How often what ``call`` was given, and is computed from, has been written to."""
    return [compat.version_of(one) for part in (*tensors.values(), call.tensors) for one in part]


class OfRows(Sources):
    """The gradient of a result of rows, before anything of it is computed."""

    def __init__(
        self,
        compute: Callable[[], Gradients],
        call: Call,
        tensors: Tensors,
        before: list[int],
        gradient: Tensor,
        is_recomputed: bool,
        recipes: Sequence[Recipe],
    ) -> None:
        """``call`` was computed from ``tensors``, of which those that a gradient is wanted of are
        leaves. ``before`` are the versions then; ``gradient`` is that of the result.
        ``is_recomputed`` if the forward has left nothing for it."""
        super().__init__(compute, recipes)
        self.call, self.tensors, self.gradient = call, tensors, gradient
        self.is_recomputed = is_recomputed
        self._before = before

    @property
    def may_be_joined(self) -> bool:
        """Whether the result can be computed again, and nobody wants this gradient again."""
        return (
            is_saved_for_once(self.gradient)
            and all(root.value is None for root in self.call.roots)
            and versions(self.call, self.tensors) == self._before
        )


def take_all(sources: Sequence[Sources]) -> Iterator[Gradients]:
    """What ``sources``, of the same logits, come to: the terms of a sum.

    RuntimeError, after the last, if they computed logits again of a head that has changed unseen.
    """
    of_rows = [one for one in sources if isinstance(one, OfRows) and one.may_be_joined]
    pays = len(of_rows) > 1 or any(one.is_recomputed for one in of_rows)
    joined = _joined(of_rows) if pays else None
    if joined is not None:
        yield joined
        for one in of_rows:
            one.is_used = True
    for source in sources:
        if not source.is_used:
            yield source.take()
    for recipe in {id(one): one for source in sources for one in source.recipes}.values():
        recipe.check_unchanged(at_once=False)


def _joined(results: Sequence[OfRows]) -> Gradients | None:
    gradients = tuple(one.gradient for one in results)
    cells = tuple(
        Cell(one.call, torch.empty_like(one.gradient, device="meta"), one.gradient.device)
        for one in results
    )
    (root,) = results[0].call.ways_back
    _, _, dtype = compat.autocast_state(root.device.type)
    without_autocast = (root.device.type, False, dtype)
    total = Call(_weighted_sum, (cells, gradients), {}, autocast=without_autocast)
    with torch.enable_grad():
        reader = reader_of(total)
    if reader is None:
        return None
    tensors = {cell: part for one in results for cell, part in one.tensors.items()}
    with torch.enable_grad():
        value = reader.run_first(*(tensor for cell in total.roots for tensor in tensors[cell]))
    asked = [tensor for tensor in tensors[root] if tensor.requires_grad]
    given = iter(torch.autograd.grad(value, asked, materialize_grads=True))
    return tuple(next(given) if tensor.requires_grad else None for tensor in tensors[root])


def _weighted_sum(results: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    sums = [(result * weight).sum() for result, weight in zip(results, weights, strict=True)]
    return sum(sums[1:], sums[0])
