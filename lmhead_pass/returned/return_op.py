"""The node that makes lazy logits in a compiled graph.

    return_lazily(
        hidden, weight, weight_is_transposed, bias, steps, vocab_dim, strides, requires_grad,
        hidden_requires_grad
    )

takes the fields of a ``Recipe``, except for the fingerprint, which it computes. It has no kernel:
when a graph is traced, all these tensors become outputs of the graph, and AOTAutograd's runtime
makes lazy logits of them after each run. Hidden states that require a gradient have to be a result
of the graph themselves, too: autograd gives the very tensor that the lazy logits hold its history
then.
"""

from typing import Any

import torch
from torch import Tensor

from ..compat.lazy_tensors import is_fake, make_wrapper, no_torch_function
from ..compat.library import define
from .lazy_logits import LazyLogits
from .recipe import Recipe, fingerprint

_TENSORS = ("hidden", "weight", "bias", "fingerprint")
_OPTIONS = (
    *("weight_is_transposed", "steps", "vocab_dim", "strides", "requires_grad"),
    "hidden_requires_grad",
)


class _TracedLogits(Tensor):
    """Stands for lazy logits while a graph is traced. At run time it unflattens to lazy logits.

    It requires no gradient: else the compiled backward would be given a zero for each logit.
    """

    recipe: Recipe

    @staticmethod
    def __new__(cls, recipe: Recipe) -> "_TracedLogits":
        like = recipe.like()
        self: _TracedLogits = make_wrapper(
            cls, like.size(), strides=like.stride(), dtype=like.dtype, device=recipe.hidden.device
        )
        self.recipe = recipe
        for name in _TENSORS:  # where __tensor_flatten__ says they are
            setattr(self, name, getattr(recipe, name))
        return self

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        tensors = [name for name in _TENSORS if getattr(self, name) is not None]
        return tensors, tuple(getattr(self.recipe, name) for name in _OPTIONS)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], options: Any, outer_size: Any, outer_stride: Any
    ) -> Tensor:
        tensors: dict[str, Any] = {name: inner.get(name) for name in _TENSORS}
        return _logits(Recipe(**tensors, **dict(zip(_OPTIONS, options, strict=True))))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype})"

    __torch_function__ = no_torch_function

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return _TracedLogits(args[0].recipe)
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
    hidden_requires_grad: bool,
) -> Tensor:
    tensors = [part for part in (hidden, weight, bias) if part is not None]
    recipe = Recipe(
        hidden=hidden,
        weight=weight,
        weight_is_transposed=weight_is_transposed,
        bias=bias,
        fingerprint=fingerprint([tensor.detach() for tensor in tensors]),
        steps=tuple(steps),
        vocab_dim=vocab_dim,
        strides=tuple(strides),
        requires_grad=requires_grad,
        hidden_requires_grad=hidden_requires_grad,
    )
    return _logits(recipe)


def _logits(recipe: Recipe) -> Tensor:
    return _TracedLogits(recipe) if is_fake(recipe.hidden) else LazyLogits.from_recipe(recipe)


define(
    "return_lazily(Tensor hidden, Tensor weight, bool weight_is_transposed, Tensor? bias, "
    "str[] steps, int vocab_dim, int[] strides, bool requires_grad, bool hidden_requires_grad) "
    "-> Tensor",
    _return_lazily,
    "CompositeImplicitAutograd",
)
