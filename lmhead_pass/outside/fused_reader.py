"""Computes what is taken of lazy logits and has no vocabulary, by the op.

The way from the hidden states to the result is a graph like those that Dynamo makes, and the pass
rewrites it like any other. The result is kept for each way of use, and run as it is: the op's calls
and little else.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from .. import config
from ..compat import lazy_tensors as compat
from ..compat.compiling import forgotten_by_reset, without_saved_tensors_hooks
from ..compat.graphs import EXAMPLE_VALUE, namespace_of
from ..compat.settings import settings_of
from ..returned import Call, Cell, Recipe, likes_of, user_stack
from ..rewrite import MemoryBudgetTooSmall, rewrite_graph
from .recording import Recorder

log = logging.getLogger("lmhead_pass")


@dataclass(frozen=True, eq=False)
class _Rewritten:
    """A rewritten graph."""

    run: Callable[..., Sequence[Tensor]]
    """Takes the tensors of all recipes, and the others that the calls were given."""
    like: Tensor
    """Has the size and dtype of the first result, and is on the meta device."""


@dataclass(frozen=True)
class Reader:
    """What computes calls on lazy logits without these."""

    run: Callable[..., Sequence[Tensor]]
    """Takes the tensors of all recipes, and returns the result of each call."""
    like: Tensor
    """Has the size and dtype of the first result, and is on the meta device."""
    way: object
    """The same for the same way of use, and no other."""
    is_given_tensors: bool
    """Whether the calls were given tensors beside the logits."""

    def run_first(self, *tensors: Tensor) -> Tensor:
        """The first result."""
        return self.run(*tensors)[0]


_MOST = 64
_readers: OrderedDict[Any, _Rewritten | None] = OrderedDict()
"""The ways of use so far, the latest last. Old ones are let go: sizes and numbers may change. All
go where Dynamo forgets what it has compiled."""


def reader_of(*calls: Call) -> Reader | None:
    """What computes ``calls`` from the tensors of their recipes; None if the op cannot.

    Those of which a gradient is wanted may be leaves. Several calls are of the same logits, which
    are taken once; a gradient goes back from the first alone.
    """
    if reader_of not in (known := forgotten_by_reset()):
        known[reader_of] = []
        _readers.clear()
    way = _Way(calls[0].roots)
    key = (*map(way.describe, calls), *_world(calls[0]))
    if key not in _readers:
        _readers[key] = _rewritten(calls, way.others)
        if len(_readers) > _MOST:
            _readers.popitem(last=False)
    _readers.move_to_end(key)
    rewritten = _readers[key]
    if rewritten is None:
        return None
    run, others = rewritten.run, way.others
    return Reader(lambda *given: run(*given, *others), rewritten.like, rewritten, bool(others))


class _Way:
    """A way of use: what was called on the logits, and the other tensors that it was given."""

    def __init__(self, roots: Sequence[Cell]) -> None:
        self.others: list[Tensor] = []
        self._roots = roots
        self._numbers: dict[Cell, int] = {}

    def describe(self, call: Call) -> Any:
        """Something hashable that is the same for the same way."""
        return (
            call.function,
            call.item,
            call.autocast,
            repr(compat.map_arguments(call.args, call.kwargs, lambda leaf: None)),
            *map(self._describe, call.leaves),
        )

    def _describe(self, leaf: Any) -> Any:
        if isinstance(leaf, Cell):
            if leaf in self._numbers:
                return self._numbers[leaf]
            self._numbers[leaf] = len(self._numbers)
            if isinstance(leaf.source, Recipe):
                return "logits", self._roots.index(leaf)
            assert isinstance(leaf.source, Call)
            return leaf.is_detached, self.describe(leaf.source)
        if isinstance(leaf, Tensor):
            self.others.append(leaf)
            return _looks(leaf)
        # Numbers that are equal may differ all the same: 0.0 and -0.0, 1 and True.
        return type(leaf), leaf if isinstance(leaf, int) else repr(leaf)


def _looks(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _world(call: Call) -> tuple[Any, ...]:
    """What else a rewritten graph depends on."""
    recipes = (
        (
            tuple(_looks(tensor) for tensor in recipe.tensors),
            wanted,
            *(recipe.weight_is_transposed, recipe.steps, recipe.vocab_dim, recipe.strides),
        )
        for recipe, wanted in call.recipes
    )
    return (*recipes, torch.is_grad_enabled(), repr(sorted(settings_of(config).items())))


def _rewritten(calls: Sequence[Call], others: list[Tensor]) -> _Rewritten | None:
    call = calls[0]
    device = call.recipes[0][0].hidden.device
    like = likes_of(call.function, call.args, call.kwargs, device)
    if not isinstance(like, Tensor):
        return None
    mode = compat.new_fake_mode()
    try:
        # Hooks around it count what is saved (a checkpoint's), and this is done once.
        with compat.outside_of_modes(), without_saved_tensors_hooks():
            heads = [
                [
                    mode.from_tensor(t.detach()).requires_grad_(is_wanted)
                    for t, is_wanted in zip(recipe.tensors, wanted, strict=True)
                ]
                for recipe, wanted in call.recipes
            ]
            fakes = [mode.from_tensor(tensor.detach()) for tensor in others]
            module = _record(calls, dict(zip(call.roots, heads, strict=True)), fakes, mode)
            if not rewrite_graph(module.graph, of_loss_alone=False):
                return None
            if len(calls) > 1 and not _takes_logits_once(module.graph, call.roots[0]):
                return None
    except MemoryBudgetTooSmall:
        raise
    except Exception as error:
        if config.strict:
            raise
        log.info(
            "left alone: what is taken of returned logits, which fails in lmhead_pass: %s", error
        )
        return None
    module.recompile()
    return _Rewritten(module.forward, like)


def _takes_logits_once(graph: Graph, logits: Cell) -> bool:
    """Whether ``graph`` takes them in chunks, and for all results at the same time."""
    values = [node.meta.get(EXAMPLE_VALUE) for node in graph.nodes]
    sizes = [value.numel() for value in values if isinstance(value, Tensor)]
    calls = [node for node in graph.nodes if namespace_of(node.target) == "lmhead_pass"]
    return max(sizes) < logits.like.numel() and len(calls) == 1


def _record(
    calls: Sequence[Call], heads: dict[Cell, list[Tensor]], fakes: list[Tensor], mode: Any
) -> GraphModule:
    """The graph of ``calls``, from the tensors of the roots' recipes and the other ones."""
    recorder = Recorder(user_stack())
    for number, fake in enumerate([fake for head in (*heads.values(), fakes) for fake in head]):
        recorder.input(f"input_{number}", fake)
    others = iter(fakes)
    known: dict[Cell, Tensor] = {}

    def run(one: Call) -> Tensor:
        args, kwargs = compat.map_arguments(one.args, one.kwargs, value_of)
        with compat.autocast_as(one.autocast):
            result = one.function(*args, **kwargs)
            value: Tensor = result if one.item is None else result[one.item]
            return value

    def value_of(leaf: Any) -> Any:
        if isinstance(leaf, Cell):
            if leaf not in known:
                assert isinstance(leaf.source, Call)
                value = run(leaf.source)
                known[leaf] = value.detach() if leaf.is_detached and value.requires_grad else value
            return known[leaf]
        return next(others) if isinstance(leaf, Tensor) else leaf

    with mode, recorder:
        for root, head in heads.items():
            assert isinstance(root.source, Recipe)
            known[root] = root.source.apply(*head)
        first, *more = map(run, calls)
        results = [first, *(result.detach() for result in more)]
    return recorder.module(results)
