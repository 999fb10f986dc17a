"""Computes what is taken of lazy logits and has no vocabulary, by the op.

The way from the hidden states to the result is a graph like those that Dynamo makes, and the pass
rewrites it like any other (``rewriting``). The result is kept for each way of use, and run as it
is: the op's calls and little else.
"""

import operator
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..compat import symbols
from ..compat.compiling import forgotten_by_reset
from ..returned import Call
from .rewriting import Rewritten, rewritten
from .ways import Way


@dataclass(frozen=True)
class Reader:
    """What computes calls on lazy logits without these."""

    run: Callable[..., Sequence[Tensor]]
    """Takes the tensors of all recipes, and returns the result of each call."""
    like: Tensor
    """Has the dtype of the first result and as many dimensions, and is on the meta device."""
    way: object
    """The same for the same way of use with the same numbers, and no other."""
    is_given_tensors: bool
    """Whether the calls were given tensors beside the logits."""

    def run_first(self, *tensors: Tensor) -> Tensor:
        """The first result."""
        return self.run(*tensors)[0]


@dataclass
class _Form:
    """What ways of use have in common that differ in numbers alone."""

    numbers: tuple[str, ...]
    """Of the latest."""
    may_change: tuple[bool, ...]
    """Which have changed so far."""
    graphs: list[Rewritten] = field(default_factory=list)
    """For numbers that change."""
    is_fixed: bool = False
    """Whether each number takes a graph of its own."""
    is_refused: bool = False
    """Whether there is none at all."""


_MOST = 256
_readers: OrderedDict[Any, Rewritten | None] = OrderedDict()
"""For each way of use, the latest last. Old ones are let go: numbers may change in every step. All
go where Dynamo forgets what it has compiled."""
_forms: OrderedDict[Any, _Form] = OrderedDict()
# A symbol may turn out to be a constant of its graph (a dimension): the next number takes another.
_MOST_GRAPHS = 4


def reader_of(*calls: Call) -> Reader | None:
    """What computes ``calls`` from the tensors of their recipes; None if the op cannot.

    Those of which a gradient is wanted may be leaves. Several calls are of the same logits, which
    are taken once; a gradient goes back from the first alone.
    """
    if reader_of not in (known := forgotten_by_reset()):
        known[reader_of] = []
        _readers.clear()
        _forms.clear()
    way = Way(calls)
    key = way.form, way.numbers
    if key not in _readers:
        found = _found(calls, way)
        _keep(_readers, key, found and replace(found))  # the same for no other numbers
    _readers.move_to_end(key)
    one = _readers[key]
    if one is None:
        return None
    run, inputs = one.run, one.inputs_of(way)
    return Reader(lambda *given: run(*given, *inputs), one.like, one, way.is_given_tensors)


def _keep(kept: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    kept[key] = value
    if len(kept) > _MOST:
        kept.popitem(last=False)


def _found(calls: Sequence[Call], way: Way) -> Rewritten | None:
    """The graph that has computed calls of this form before, if it is right for these; else a new
    one.

    As with Dynamo, numbers that have changed are symbols from then on, and the others constants.
    """
    constants = (False,) * len(way.numbers)
    form = _forms.pop(way.form, None) or _Form(way.numbers, constants)
    have_changed = map(operator.ne, form.numbers, way.numbers)
    form.may_change = tuple(map(operator.or_, form.may_change, have_changed))
    form.numbers = way.numbers
    _keep(_forms, way.form, form)
    if form.is_refused:
        return None
    known = next((one for one in form.graphs if one.is_right_for(way)), None)
    if known is not None:
        return known
    is_changing, made = any(form.may_change), None
    if is_changing and not form.is_fixed and symbols.are_known():
        made = rewritten(calls, way, form.may_change)
        form.graphs += [made] if made else []
        form.is_fixed = made is None or len(form.graphs) == _MOST_GRAPHS
    if made is None:
        made = rewritten(calls, way, constants)
        form.is_refused = made is None and is_changing
    return made
