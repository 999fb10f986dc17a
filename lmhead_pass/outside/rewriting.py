"""Has calls on lazy logits rewritten: records them as a graph, and gives that to the pass."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from torch import SymFloat, SymInt, Tensor
from torch.fx import Graph, GraphModule

from .. import config
from ..compat import lazy_tensors as compat
from ..compat.compiling import without_saved_tensors_hooks
from ..compat.graphs import EXAMPLE_VALUE, namespace_of
from ..compat.symbols import Symbols
from ..graph.tensors import hint
from ..returned import Call, Cell, Recipe, likes_of, user_stack
from ..rewrite import MemoryBudgetTooSmall, rewrite_graph
from .recording import NumberOfSymbols, Recorder
from .ways import Way, is_given

log = logging.getLogger("lmhead_pass")


@dataclass(frozen=True, eq=False)
class Rewritten:
    """A rewritten graph, for the numbers of one way of use and perhaps for others."""

    run: Callable[..., Sequence[Tensor]]
    """Takes the tensors of all recipes, and what of ``Way.given`` are ``inputs``."""
    like: Tensor
    """Has the dtype of the first result and as many dimensions, and is on the meta device."""
    inputs: Sequence[bool]
    numbers: Sequence[str]
    """Those of the way that it was made for."""
    may_change: Sequence[bool]
    """Which of them may be others."""
    condition: Callable[[Sequence[Any]], bool]
    """Whether tensors of recipes and inputs are such that they may."""

    def inputs_of(self, way: Way) -> list[Any]:
        """What of that ``way`` is given to ``run``."""
        return [one for one, is_input in zip(way.given, self.inputs, strict=True) if is_input]

    def is_right_for(self, way: Way) -> bool:
        """Whether this is the graph of ``way``, which has the same form."""
        numbers = zip(self.numbers, way.numbers, self.may_change, strict=True)
        if any(a != b and not may_change for a, b, may_change in numbers):
            return False
        return self.condition([*way.of_recipes, *self.inputs_of(way)])


def rewritten(calls: Sequence[Call], way: Way, may_change: Sequence[bool]) -> Rewritten | None:
    """The graph of ``calls``, rewritten; None if the pass does not.

    Those of the way's numbers that ``may_change`` are symbols in it.
    """
    call = calls[0]
    device = call.recipes[0][0].hidden.device
    like = likes_of(call.function, call.args, call.kwargs, device)
    if not isinstance(like, Tensor):
        return None
    symbols = Symbols()
    try:
        # Hooks around it count what is saved (a checkpoint's), and this is done once.
        with compat.outside_of_modes(), without_saved_tensors_hooks():
            heads, given, inputs = _fakes(call, way, symbols, iter(may_change))
            roots = dict(zip(call.roots, heads, strict=True))
            module = _record(calls, roots, given, inputs, symbols)
            # What is refused of symbols may still be rewritten for constants.
            tells = not any(may_change)
            if not rewrite_graph(
                module.graph, of_loss_alone=False, tells_refusals=tells, in_one_call=len(calls) == 1
            ):
                return None
            if len(calls) > 1 and not _takes_logits_once(module.graph, call.roots[0]):
                return None
            if _has_symbols(module.graph):
                return None
            condition = symbols.condition() if any(may_change) else (lambda inputs: True)
    except MemoryBudgetTooSmall:
        raise
    except NumberOfSymbols:
        return None
    except Exception as error:
        if config.strict:
            raise
        log.info(
            "left alone: what is taken of returned logits, which fails in lmhead_pass: %s", error
        )
        return None
    module.recompile()
    for node in module.graph.nodes:
        node.meta.clear()  # Nobody looks at these any more, and they keep a lot.
    return Rewritten(module.forward, like, inputs, way.numbers, may_change, condition)


def _fakes(
    call: Call, way: Way, symbols: Symbols, may_change: Iterator[bool]
) -> tuple[list[list[Tensor]], list[Any], list[bool]]:
    """What stands for the tensors of each recipe, and for ``Way.given``; which of these are inputs.

    ``may_change`` are in the order of ``Way.numbers``.
    """

    def fake(tensor: Tensor) -> Tensor:
        sizes_and_strides = list(islice(may_change, 2 * tensor.dim()))
        return symbols.tensor(tensor, sizes_and_strides[: tensor.dim()])

    heads = []
    for recipe, wanted in call.recipes:
        parameters = (symbols.tensor(one, ()) for one in recipe.tensors[1:])
        pairs = zip((fake(recipe.hidden), *parameters), wanted, strict=True)
        heads.append([one.requires_grad_(is_wanted) for one, is_wanted in pairs])
    given, inputs = list[Any](), list[bool]()
    for one in way.given:
        if isinstance(one, Tensor):
            given.append(fake(one))
            inputs.append(True)
        else:
            inputs.append(next(may_change))
            given.append(symbols.number(one) if inputs[-1] else one)
    return heads, given, inputs


def _has_symbols(graph: Graph) -> bool:
    """Whether a node is given a symbol itself, which code has no name for."""
    leaves = compat.leaves_of([(node.args, node.kwargs) for node in graph.nodes])
    return any(isinstance(leaf, SymFloat | SymInt) for leaf in leaves)


def _takes_logits_once(graph: Graph, logits: Cell) -> bool:
    """Whether ``graph`` takes them in chunks, and for all results at the same time."""
    values = [node.meta.get(EXAMPLE_VALUE) for node in graph.nodes]
    sizes = [hint(value.numel()) for value in values if isinstance(value, Tensor)]
    calls = [node for node in graph.nodes if namespace_of(node.target) == "lmhead_pass"]
    return max(sizes) < logits.like.numel() and len(calls) == 1


def _record(
    calls: Sequence[Call],
    heads: dict[Cell, list[Tensor]],
    given: Sequence[Any],
    inputs: Sequence[bool],
    symbols: Symbols,
) -> GraphModule:
    """The graph of ``calls``, from the tensors of the roots' recipes and the ``inputs`` among what
    else is ``given``."""
    recorder = Recorder(user_stack())
    taken = [one for one, is_input in zip(given, inputs, strict=True) if is_input]
    for number, one in enumerate([*(one for head in heads.values() for one in head), *taken]):
        recorder.input(f"input_{number}", one)
    others = iter(given)
    known: dict[Cell, Tensor] = {}

    def run(one: Call) -> Tensor:
        args, kwargs = compat.map_arguments(one.args, one.kwargs, value_of)
        leaves = compat.leaves_of((args, kwargs))
        symbols.take_as_equal(leaf for leaf in leaves if isinstance(leaf, Tensor))
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
        return next(others) if is_given(leaf) else leaf

    with symbols.block(), recorder:
        for root, head in heads.items():
            assert isinstance(root.source, Recipe)
            # How they lie in memory makes no difference to what is taken of them.
            known[root] = replace(root.source, strides=()).apply(*head)
        first, *more = map(run, calls)
        results = [first, *(result.detach() for result in more)]
    return recorder.module(results)
