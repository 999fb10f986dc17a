"""The part of a graph that is run on chunks of rows: ATen operations, as text.

A string goes through every cache and every retracing by itself, and is part of their keys.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_GETITEM = "getitem"


@dataclass(frozen=True)
class Value:
    """What a step reads: the value with this number. Logits of the heads come first, then inputs
    by row, then constants, then what the steps give."""

    number: int


@dataclass(frozen=True)
class RowCount:
    """Stands for the number of rows in a size."""


@dataclass(frozen=True)
class Step:
    """A call of an ATen operation that writes to nothing and treats rows (dimension 0) apart."""

    op: str
    """``"aten.div.Tensor"``, or ``"getitem"``: one of several results."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Output:
    """What the part returns."""

    number: int
    """Of the value ``[rows, ...]``."""
    dtype: torch.dtype
    is_differentiable: bool
    """Whether a gradient may come back to it."""


@dataclass(frozen=True)
class RowInput:
    """An input with a value for each row."""

    lead: int
    """So many dimensions, the first ones, are rows."""


@dataclass(frozen=True)
class RowPart:
    """What is done to the logits of some rows."""

    products: tuple[torch.dtype, ...]
    """For each head, the dtype of its product with the weight."""
    by_row: tuple[RowInput, ...]
    constants: int
    """How many inputs are the same for all rows."""
    steps: tuple[Step, ...]
    outputs: tuple[Output, ...]

    @property
    def inputs(self) -> int:
        return len(self.products) + len(self.by_row) + self.constants

    @functools.cached_property
    def text(self) -> str:
        return json.dumps(
            {
                "products": [_encode(dtype) for dtype in self.products],
                "by_row": [given.lead for given in self.by_row],
                "constants": self.constants,
                "steps": [
                    [step.op, _encode(step.args), _encode(step.kwargs)] for step in self.steps
                ],
                "outputs": [
                    [output.number, _encode(output.dtype), output.is_differentiable]
                    for output in self.outputs
                ],
            }
        )

    @functools.cached_property
    def calls(self) -> list[tuple[Any, tuple[Any, ...], dict[str, Any], list[int]]]:
        """Each step's function and arguments, and the values that nobody reads after it."""
        last: dict[int, int] = {}
        for number, step in enumerate(self.steps):
            for read in _numbers((step.args, step.kwargs)):
                last[read] = number
        kept = {output.number for output in self.outputs}
        free: list[list[int]] = [[] for _ in self.steps]
        for read, number in last.items():
            if read not in kept:
                free[number].append(read)
        return [
            (_function(step.op), step.args, step.kwargs, free[number])
            for number, step in enumerate(self.steps)
        ]

    def run(self, inputs: Sequence[Tensor], rows: int) -> list[Tensor]:
        """The outputs for ``rows`` rows of the inputs, in the dtypes that the steps give."""
        values: dict[int, Any] = dict(enumerate(inputs))
        for place, (function, args, kwargs, free) in enumerate(self.calls, self.inputs):
            given, named = _filled((args, kwargs), values, rows)
            values[place] = function(*given, **named)
            for number in free:
                del values[number]
            del given, named
        return [values[output.number] for output in self.outputs]


@functools.lru_cache(maxsize=256)
def parse(text: str) -> RowPart:
    """The part that has this text."""
    read = json.loads(text)
    return RowPart(
        products=tuple(map(_decode, read["products"])),
        by_row=tuple(map(RowInput, read["by_row"])),
        constants=read["constants"],
        steps=tuple(
            Step(op, tuple(_decode(args)), {name: _decode(arg) for name, arg in kwargs.items()})
            for op, args, kwargs in read["steps"]
        ),
        outputs=tuple(
            Output(number, _decode(dtype), differentiable)
            for number, dtype, differentiable in read["outputs"]
        ),
    )


def _encode(argument: Any) -> Any:
    match argument:
        case Value(number):
            return {"value": number}
        case RowCount():
            return {"rows": 1}
        case torch.dtype():
            return {"dtype": str(argument).removeprefix("torch.")}
        case list() | tuple():
            return [_encode(part) for part in argument]
        case dict():
            return {name: _encode(part) for name, part in argument.items()}
    if argument is None or type(argument) in (bool, int, float, str):
        return argument
    raise TypeError(f"{argument!r} cannot be written down")


def _decode(read: Any) -> Any:
    if isinstance(read, list):
        return [_decode(part) for part in read]
    if isinstance(read, dict):
        if "value" in read:
            return Value(read["value"])
        return RowCount() if "rows" in read else getattr(torch, read["dtype"])
    return read


def _numbers(argument: Any) -> set[int]:
    match argument:
        case Value(number):
            return {number}
        case list() | tuple():
            return set().union(*map(_numbers, argument))
        case dict():
            return set().union(*map(_numbers, argument.values()))
    return set()


def _filled(argument: Any, values: dict[int, Any], rows: int) -> Any:
    match argument:
        case Value(number):
            return values[number]
        case RowCount():
            return rows
        case list():
            return [_filled(part, values, rows) for part in argument]
        case tuple():
            return tuple(_filled(part, values, rows) for part in argument)
        case dict():
            return {name: _filled(part, values, rows) for name, part in argument.items()}
    return argument


def _function(op: str) -> Any:
    if op == _GETITEM:
        return lambda values, number: values[number]
    _, name, overload = op.split(".")
    return getattr(getattr(torch.ops.aten, name), overload)
