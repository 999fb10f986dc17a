"""A call of an ATen operation, and what it may give on chunks of rows."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..graph import Refused
from .layout import Dim, Space
from .values import Expression, Expressions, Outer, Traced


class Mixes(Refused):
    """An operation mixes rows, or nobody knows that it does not."""


@dataclass(frozen=True)
class New:
    """A result in memory of its own."""

    expression: Expression
    dims: tuple[Dim, ...]
    space: Space


@dataclass(frozen=True)
class Summed:
    """A result that is computed of ``partial``, a few numbers for each row, after all chunks."""

    partial: New
    sizes: tuple[Any, ...]
    """Of the partial."""
    dtype: torch.dtype
    """Of the partial."""
    finish: Callable[[torch.Tensor], tuple[Any, tuple[Any, ...], dict[str, Any]]]
    """The ATen operation and its arguments, for a tensor that stands for the partial."""


@dataclass(frozen=True)
class Quotient:
    """One sum by another."""

    total: Summed
    by: torch.Tensor
    """A fake tensor that is known outside of chunks."""


Result = New | Traced | Summed | Quotient | torch.Tensor


class Context(Protocol):
    """What operations ask of the tracer."""

    make: Expressions

    def traced(self, tensor: Any) -> Traced | None:
        """What is known of a tensor that is computed in chunks; None if it is not."""

    def read(self, traced: Traced) -> Expression:
        """What it holds now."""

    def outer(self, tensor: torch.Tensor) -> Outer:
        """What a tensor is that is not computed in chunks."""

    def by_row(self, outer: Outer, dims: tuple[Dim, ...], space: Space) -> Expression:
        """``[n, ...]``: an input with a value for each row."""

    def constant(self, outer: Outer, sizes: tuple[int, ...]) -> Expression:
        """An input that is the same for all rows."""

    def outside(self) -> AbstractContextManager[Any]:
        """A block in which what is computed is written down as well."""


@dataclass(frozen=True)
class Call:
    """A call of an ATen operation that writes to nothing."""

    function: Any
    named: dict[str, Any]
    """The arguments by name, defaults too."""
    out: Any

    @property
    def name(self) -> str:
        return f"{self.function._schema.name.split('::')[1]}.{self.function._overloadname}"

    @property
    def op(self) -> str:
        return f"aten.{self.name}"

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [one for one in _flat(self.named.values()) if isinstance(one, torch.Tensor)]

    def with_arguments(self, make: Expressions, changed: dict[str, Any]) -> Expression:
        """The operation with some arguments of its own and others ``changed``."""
        args, kwargs = [], {}
        for argument in self.function._schema.arguments:
            value = changed.get(argument.name, self.named[argument.name])
            if argument.kwarg_only:
                is_needed = value is not None or not argument.has_default_value()
                if argument.name not in _PLACES and is_needed:
                    kwargs[argument.name] = plain(value)
            else:
                args.append(plain(value))
        return make(self.op, *args, **kwargs)


_PLACES = ("device", "layout", "pin_memory", "non_blocking", "memory_format", "generator", "out")


def _flat(values: Any) -> list[Any]:
    found = []
    for value in values:
        found += _flat(value) if isinstance(value, list | tuple) else [value]
    return found


def plain(value: Any) -> Any:
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        raise Refused(f"{value} is another number in another call")
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, torch.Tensor):
        raise Refused("a tensor is where none is understood")
    return value


def describe_call(function: Any) -> str:
    return str(function._schema.name.split("::")[1]).strip("_")
