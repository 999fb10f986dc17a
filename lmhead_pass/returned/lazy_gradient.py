"""A gradient of unread logits, which has the size of the logits only if somebody looks at it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ..compat import lazy_tensors as compat
from ..compat.compiling import never_compiled
from .metadata import METADATA
from .recipe import Recipe

_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
_COPIES = (
    *(torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.clone.default),
)

Gradients = tuple[Tensor | None, ...]


class Sources:
    """What a gradient comes to for hidden states, weight and bias, computed once.

    Not before all terms are in one place: each weight's gradient would wait there for the others.
    """

    def __init__(self, compute: Callable[[], Gradients], recipes: Sequence[Recipe] = ()) -> None:
        """``recipes`` are of the logits that it computes again."""
        self._compute = compute
        self.recipes = recipes
        self.is_used = False

    def take(self) -> Gradients:
        self.is_used = True
        return self._compute()


@dataclass(frozen=True)
class Term:
    """One summand of a gradient of logits."""

    dense: Callable[[], Tensor]
    """Computes it."""
    sources: Sources | None = None
    """What it comes to for hidden states, weight and bias; None if that takes it itself."""
    share: Fraction = Fraction(1)
    """How much of ``sources`` comes this way: the logits may have been used in several."""
    of: object = None
    """``Cell.identity`` of the logits whose gradient it is. For others ``sources`` say nothing."""


class LazyGradient(Tensor):
    """The sum of its terms. Autograd adds several, and hands them on; all else computes it.

    Who has seen its values may have written to them, or keep a name of their memory: from then on
    these values are what it is.
    """

    terms: Sequence[Term]
    _seen: Tensor | None

    @staticmethod
    def __new__(cls, like: Tensor, device: torch.device, terms: Sequence[Term]) -> "LazyGradient":
        """``like`` has the size, strides and dtype of the logits."""
        self: LazyGradient = compat.make_wrapper(
            cls, like.size(), strides=like.stride(), dtype=like.dtype, device=device
        )
        compat.forbid_address(self)
        self.terms, self._seen = terms, None
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.look())

    def look(self) -> Tensor:
        """The gradient itself, in memory that is its own."""
        if self._seen is None:
            with compat.outside_of_modes(), torch.inference_mode(False), torch.no_grad():
                first, *others = (term.dense() for term in self.terms)
                self._seen = values = sum(others, first) if others else first.clone()
            self.terms = [Term(lambda: values)]
        return self._seen

    @classmethod
    @never_compiled
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in METADATA:
            with compat.without_torch_function():
                return func(*args, **(kwargs or {}))
        # Who sees it in Python may ask for its address, or for that of a view.
        return _with_values(func, args, kwargs or {})

    @classmethod
    @never_compiled
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        first, *others = args
        if func in _ADDITIONS and not kwargs and _are_alike(first, *others):
            terms = [term for part in (first, *others) for term in terms_of(part)]
            if func is torch.ops.aten.add.Tensor:
                return cls(first, first.device, terms)
            if isinstance(first, cls) and first._seen is None:
                first.terms = terms
                return first
        if func in _COPIES and not others and first._seen is None:
            return cls(first, first.device, first.terms)
        return _with_values(func, args, kwargs or {})


def _with_values(func: Any, args: Any, kwargs: Any) -> Any:
    """Call ``func`` with the values of lazy gradients; what it returns as it was given stays so."""
    owners = {}

    def values_of(leaf: Any) -> Any:
        if not isinstance(leaf, LazyGradient):
            return leaf
        owners[id(leaf.look())] = leaf
        return leaf.look()

    args, kwargs = compat.tree_map(values_of, (args, kwargs))
    with compat.without_torch_function():
        result = func(*args, **kwargs)
    return compat.tree_map(lambda leaf: owners.get(id(leaf), leaf), result)


def _are_alike(*parts: Any) -> bool:
    """Whether all are tensors of the same size and dtype."""
    looks = {(p.size(), p.dtype) if isinstance(p, Tensor) else None for p in parts}
    return len(looks) == 1 and None not in looks


def terms_of(gradient: Tensor) -> list[Term]:
    """The terms of a gradient that may be a plain tensor."""
    if isinstance(gradient, LazyGradient):
        return list(gradient.terms)
    return [Term(lambda: gradient)]


def through(term: Term, change: Callable[[Tensor], Tensor], ways: int, of: object) -> Term:
    """The term for logits ``of`` that others were made of: ``change`` does that to the gradient.

    They are one of so many ``ways`` back; without any, their gradient says nothing of sources.
    """
    if not ways:
        return Term(lambda: change(term.dense()), of=of)
    share = term.share / ways
    return replace(term, dense=lambda: change(term.dense()), share=share, of=of)


def known_by(terms: Sequence[Term], identity: object) -> list[Term]:
    """``terms`` as a gradient of the logits with this ``identity``, whoever has brought them."""
    return [term if term.of is identity else Term(term.dense) for term in terms]


def taken(terms: Sequence[Term]) -> tuple[list[Sources], list[Term]]:
    """Those sources that all of ``terms`` have in full, and the terms that are left."""
    shares: dict[Sources, Fraction] = {}
    for term in terms:
        if term.sources is not None:
            shares[term.sources] = shares.get(term.sources, Fraction(0)) + term.share
    whole = [source for source, share in shares.items() if share == 1 and not source.is_used]
    return whole, [term for term in terms if term.sources not in whole]
