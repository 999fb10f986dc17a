"""Ways of use: which calls were made on lazy logits, and what beside these they were given."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import config
from ..compat import lazy_tensors as compat
from ..compat.settings import settings_of
from ..returned import Call, Cell, Recipe


class Way:
    """How ``calls``, of the same logits, are made.

    What has one form and other numbers (batches of another size) may be computed by the same graph.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self.given: list[Any] = []
        """The tensors and numbers that the calls were given beside the logits."""
        self._numbers: list[Any] = []
        self._roots = calls[0].roots
        self._cells: dict[Cell, int] = {}
        recipes = [recipe for recipe, _ in calls[0].recipes]
        self.of_recipes = [tensor for recipe in recipes for tensor in recipe.tensors]
        """Hidden states and heads."""
        hidden_sizes = [_look(recipe.hidden, self._numbers) for recipe in recipes]
        self.form = (*map(self._describe_call, calls), *hidden_sizes, *_world(calls[0]))
        """Something hashable: all but the numbers."""
        # Numbers that are equal may differ all the same: 0.0 and -0.0.
        self.numbers = tuple(map(repr, self._numbers))
        """Sizes and strides of hidden states and of what was given, and the numbers given."""

    @property
    def is_given_tensors(self) -> bool:
        """Whether the calls were given tensors beside the logits."""
        return any(isinstance(one, Tensor) for one in self.given)

    def _describe_call(self, call: Call) -> Any:
        return (
            call.function,
            call.item,
            call.autocast,
            repr(compat.map_arguments(call.args, call.kwargs, lambda leaf: None)),
            *map(self._describe, call.leaves),
        )

    def _describe(self, leaf: Any) -> Any:
        if isinstance(leaf, Cell):
            if leaf in self._cells:
                return self._cells[leaf]
            self._cells[leaf] = len(self._cells)
            if isinstance(leaf.source, Recipe):
                return "logits", self._roots.index(leaf)
            assert isinstance(leaf.source, Call)
            return leaf.is_detached, self._describe_call(leaf.source)
        if not is_given(leaf):
            return type(leaf), repr(leaf)
        self.given.append(leaf)
        if isinstance(leaf, Tensor):
            return _look(leaf, self._numbers)
        self._numbers.append(leaf)
        return type(leaf)


def is_given(leaf: Any) -> bool:
    """Whether ``leaf`` of a call's arguments is in ``Way.given``."""
    return isinstance(leaf, Tensor | int | float) and not isinstance(leaf, bool)


def _look(tensor: Tensor, numbers: list[Any]) -> tuple[Any, ...]:
    """How ``tensor`` looks, but for its ``numbers``."""
    numbers += tensor.shape
    numbers += tensor.stride()
    return tensor.dim(), tensor.dtype, tensor.device


def _world(call: Call) -> tuple[Any, ...]:
    """What else a rewritten graph depends on: heads, settings and modes."""
    recipes = (
        (
            *((one.shape, one.stride(), one.dtype, one.device) for one in recipe.tensors[1:]),
            *(wanted, recipe.weight_is_transposed, recipe.steps, recipe.vocab_dim, recipe.strides),
        )
        for recipe, wanted in call.recipes
    )
    return (*recipes, torch.is_grad_enabled(), repr(sorted(settings_of(config).items())))
