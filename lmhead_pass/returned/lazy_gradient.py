"""A gradient of unread logits, which has the size of the logits only if somebody looks at it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..compat import lazy_tensors as compat
from ..compat.compiling import never_compiled
from .metadata import METADATA

_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
_COPIES = (
    *(torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.clone.default),
)

Sources = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Term:
    """One summand of a gradient of logits."""

    dense: Callable[[], Tensor]
    """Computes it."""
    sources: Callable[[], Sources] | None = None
    """Computes what it comes to for hidden states, weight and bias; None if that takes it itself.

    Not before all terms are in one place: each weight's gradient would wait there for the others.
    """


class LazyGradient(Tensor):
    """The sum of its terms. Autograd adds several, and hands them on; all else computes it."""

    terms: Sequence[Term]

    @staticmethod
    def __new__(cls, like: Tensor, device: torch.device, terms: Sequence[Term]) -> "LazyGradient":
        """``like`` has the size, strides and dtype of the logits."""
        self: LazyGradient = compat.make_wrapper(
            cls, like.size(), strides=like.stride(), dtype=like.dtype, device=device
        )
        compat.forbid_address(self)
        self.terms = terms
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.dense())

    def dense(self) -> Tensor:
        """The gradient itself."""
        with compat.outside_of_modes(), torch.inference_mode(False), torch.no_grad():
            first, *others = (term.dense() for term in self.terms)
            return sum(others, first)

    @classmethod
    @never_compiled
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in METADATA:
            # Who sees it in Python may ask for its address, or for that of a view.
            args, kwargs = compat.tree_map(
                lambda leaf: leaf.dense() if isinstance(leaf, cls) else leaf, (args, kwargs or {})
            )
        with compat.without_torch_function():
            return func(*args, **(kwargs or {}))

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
            if isinstance(first, cls):
                first.terms = cls(first, first.device, terms).terms
                return first
        if func in _COPIES and not others:
            return cls(first, first.device, first.terms)
        args, kwargs = compat.tree_map(
            lambda leaf: leaf.dense() if isinstance(leaf, cls) else leaf, (args, kwargs or {})
        )
        return func(*args, **kwargs)


def _are_alike(*parts: Any) -> bool:
    """Whether all are tensors of the same size and dtype."""
    looks = {(p.size(), p.dtype) if isinstance(p, Tensor) else None for p in parts}
    return len(looks) == 1 and None not in looks


def terms_of(gradient: Tensor) -> list[Term]:
    """The terms of a gradient that may be a plain tensor."""
    if isinstance(gradient, LazyGradient):
        return list(gradient.terms)
    return [Term(lambda: gradient)]


def through(term: Term, change: Callable[[Tensor], Tensor], has_sources: bool) -> Term:
    """The term for what the logits were made of: ``change`` does that to the gradient itself.

    One of several things that they were made of takes on the sources.
    """
    sources = term.sources
    if sources is not None and not has_sources:
        sources = lambda: ()  # noqa: E731
    return replace(term, dense=lambda: change(term.dense()), sources=sources)
