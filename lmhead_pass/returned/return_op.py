"""The node that makes lazy logits in a compiled graph.

    return_lazily(
        hidden, weight, weight_is_transposed, bias, steps, vocab_dim, strides, requires_grad,
        wanted, *, view, names, report
    )

takes the fields of a ``Recipe``, except for the fingerprint, which it computes; the text of a view
of the logits if it stands for one (``views``), and how many calls there are for the same logits,
all with the very same hidden states; and what a graph's first run tells where the graph comes from
a cache (``log.py``). It has no kernel: when a graph is traced, all these tensors become outputs of
the graph, and AOTAutograd's runtime makes lazy logits of them after each run. What the graph
computes of these and requires a gradient (hidden states, mostly) has to be a result of the graph
itself, too: autograd gives the very tensor that the lazy logits hold its history then.
"""

from typing import Any

import torch
from torch import Tensor

from ..compat.lazy_tensors import is_fake, make_wrapper, no_torch_function
from ..compat.library import define
from ..log import tell_from_cache
from .just_returned import returned_logits
from .recipe import Recipe, fingerprint_of

_TENSORS = ("hidden", "weight", "bias", "fingerprint")
_OPTIONS = (
    *("weight_is_transposed", "steps", "vocab_dim", "strides", "requires_grad"),
    "wanted",
)


class _TracedLogits(Tensor):
    """Stands for lazy logits while a graph is traced. At run time it unflattens to lazy logits.

    It requires no gradient: else the compiled backward would be given a zero for each logit.
    """

    recipe: Recipe
    rest: tuple[str, int, str]
    """View, names and report."""

    @staticmethod
    def __new__(cls, recipe: Recipe, view: str, names: int, report: str) -> "_TracedLogits":
        # Also for a view: nobody looks at its form here, and a trace would make sizes constants.
        like = recipe.like()
        self: _TracedLogits = make_wrapper(
            cls, like.size(), strides=like.stride(), dtype=like.dtype, device=recipe.hidden.device
        )
        self.recipe, self.rest = recipe, (view, names, report)
        for name in _TENSORS:  # where __tensor_flatten__ says they are
            setattr(self, name, getattr(recipe, name))
        return self

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        tensors = [name for name in _TENSORS if getattr(self, name) is not None]
        options = tuple(getattr(self.recipe, name) for name in _OPTIONS)
        return tensors, (*self.rest, *options)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: Any, outer_size: Any, outer_stride: Any
    ) -> Tensor:
        tensors: dict[str, Any] = {name: inner.get(name) for name in _TENSORS}
        view, names, report, *options = context
        recipe = Recipe(**tensors, **dict(zip(_OPTIONS, options, strict=True)))
        return _logits(recipe, view, names, report)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype})"

    __torch_function__ = no_torch_function

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return _TracedLogits(args[0].recipe, *args[0].rest)
        raise AssertionError(f"lazy logits are read in the graph that makes them, by {func}")


def _return_lazily(
    hidden: Tensor,
    weight: Tensor,
    weight_is_transposed: bool,
    bias: Tensor | None,
    steps: list[str],
    vocab_dim: int,
    strides: list[int],
    requires_grad: bool,
    wanted: list[bool],
    *,
    view: str = "",
    names: int = 1,
    report: str = "",
) -> Tensor:
    tensors = [part for part in (hidden, weight, bias) if part is not None]
    recipe = Recipe(
        hidden=hidden,
        weight=weight,
        weight_is_transposed=weight_is_transposed,
        bias=bias,
        fingerprint=fingerprint_of([tensor.detach() for tensor in tensors]),
        steps=tuple(steps),
        vocab_dim=vocab_dim,
        strides=tuple(strides),
        requires_grad=requires_grad,
        wanted=tuple(wanted),
    )
    return _logits(recipe, view, names, report)


def _logits(recipe: Recipe, view: str, names: int, report: str) -> Tensor:
    if is_fake(recipe.hidden):
        return _TracedLogits(recipe, view, names, report)
    if report:
        tell_from_cache(report)
    return returned_logits(recipe, view, names)


define(
    "return_lazily(Tensor hidden, Tensor weight, bool weight_is_transposed, Tensor? bias, "
    "str[] steps, int vocab_dim, int[] strides, bool requires_grad, bool[] wanted, "
    "*, str view='', int names=1, str report='') "
    "-> Tensor",
    _return_lazily,
    "CompositeImplicitAutograd",
)
