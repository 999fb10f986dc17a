"""The gradients of several results of the same logits, in one pass over them.

Each result of rows (log-probabilities of tokens, entropies), and each of several losses, would take
the logits once more in the backward, and two products. Once all their gradients are known, what
they come to is the gradient of one number, the sum of the results times their gradients, and the op
takes three products for it.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..compat import lazy_tensors as compat
from ..compat.compiling import is_saved_for_once
from .cells import Call, Cell
from .lazy_gradient import Gradients, Sources
from .one_of_several import Result
from .readers import reader_of
from .recipe import Recipe


class Joinable(Sources):
    """The gradient of a result, which may be computed with those of others."""

    def __init__(
        self,
        compute: Callable[[], Gradients],
        result: Result,
        gradient: Tensor,
        recipes: Sequence[Recipe],
    ) -> None:
        """``gradient`` is that of the result."""
        super().__init__(compute, recipes)
        self.result, self.gradient = result, gradient

    @property
    def may_be_joined(self) -> bool:
        """Whether the result can be computed again, and nobody wants this gradient again."""
        return (
            is_saved_for_once(self.gradient)
            and all(root.value is None for root in self.result.call.roots)
            and self.result.is_unchanged
        )


def take_all(sources: Sequence[Sources]) -> Iterator[Gradients]:
    """What ``sources``, of the same logits, come to: the terms of a sum.

    RuntimeError, after the last, if they computed logits again of a head that has changed unseen.
    """
    some = [one for one in sources if isinstance(one, Joinable) and one.may_be_joined]
    pays = len(some) > 1 or any(one.result.is_recomputed for one in some)
    joined = _joined(some) if pays else None
    if joined is not None:
        yield joined
        for one in some:
            one.is_used = True
    for source in sources:
        if not source.is_used:
            yield source.take()
    for recipe in {id(one): one for source in sources for one in source.recipes}.values():
        recipe.check_unchanged(at_once=False)


def _joined(results: Sequence[Joinable]) -> Gradients | None:
    gradients = tuple(one.gradient for one in results)
    cells = tuple(
        Cell(one.result.call, torch.empty_like(one.gradient, device="meta"), one.gradient.device)
        for one in results
    )
    (root,) = results[0].result.call.ways_back
    _, _, dtype = compat.autocast_state(root.device.type)
    without_autocast = (root.device.type, False, dtype)
    total = Call(_weighted_sum, (cells, gradients), {}, autocast=without_autocast)
    with torch.enable_grad():
        reader = reader_of(total)
    if reader is None:
        return None
    tensors = {cell: part for one in results for cell, part in one.result.tensors.items()}
    with torch.enable_grad():
        value = reader.run_first(*(tensor for cell in total.roots for tensor in tensors[cell]))
    asked = [tensor for tensor in tensors[root] if tensor.requires_grad]
    given = iter(torch.autograd.grad(value, asked, materialize_grads=True))
    return tuple(next(given) if tensor.requires_grad else None for tensor in tensors[root])


def _weighted_sum(results: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    sums = [(result * weight).sum() for result, weight in zip(results, weights, strict=True)]
    return sum(sums[1:], sums[0])
