"""Runs ATen's calls on fake tensors, and writes down what they are on chunks of rows."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..compat.aten_trace import DispatchMode, tree_map
from ..compat.graphs import fake_mode_of, tree_leaves
from ..graph import NARROW, Refused
from .call import Call, Mixes, New, Quotient, Summed, describe_call
from .expressions import reaches_a_head, with_gradient
from .layout import Dim, Space, finest
from .operations import rowwise
from .values import (
    Cell,
    ConstantLeaf,
    Exit,
    Expression,
    Expressions,
    Outer,
    RowLeaf,
    Traced,
    hashable,
    read,
    rest_of,
    write,
)


class IsWide(Exception):
    """An input by row is as wide as the logits."""

    def __init__(self, outer: Outer, dims: tuple[Dim, ...], space: Space) -> None:
        super().__init__()
        self.outer, self.dims, self.space = outer, dims, space


class CallTracer(DispatchMode):  # type: ignore[misc]
    """What ``call.Context`` is. Floating-point numbers are FP32, or FP64 where the model's
    are."""

    def __init__(self, most_words: int) -> None:
        """A tensor of more than ``most_words`` numbers for each row stays in chunks."""
        super().__init__()
        self.make = Expressions()
        self.most_words = most_words
        self.written_over: list[Expression] = []
        """What writes left nothing of: from then on its gradient is 0."""
        self._held: dict[int, Traced] = {}
        self._outer: dict[int, Outer | Exit] = {}
        self._alive: list[Any] = []  # so that no number of another tensor is theirs
        self._leaves: dict[Any, Expression] = {}
        self._calls: dict[Any, tuple[Any, Any, Any]] = {}
        self._made: dict[Any, Outer] = {}

    # What operations ask.

    def traced(self, tensor: Any) -> Traced | None:
        return self._held.get(id(tensor))

    def read(self, traced: Traced) -> Expression:
        return read(self.make, traced)

    def outer(self, tensor: torch.Tensor) -> Outer:
        found = self.given(tensor)
        if found.depends:
            raise Mixes("what is made of all rows is put together with rows")
        return found

    def given(self, tensor: torch.Tensor) -> Outer:
        """The same, also if it depends on what is computed in chunks."""
        found = self._outer.get(id(tensor))
        if not isinstance(found, Outer):
            raise Refused("a tensor is a constant of the graph")
        return found

    def by_row(self, outer: Outer, dims: tuple[Dim, ...], space: Space) -> Expression:
        key = (outer, finest(dims), space)
        if key not in self._leaves:
            count = 1
            for size in rest_of(key[1], tuple(outer.value.shape)):
                count *= size
            if count > self.most_words:
                raise IsWide(*key)
            self._leaves[key] = Expression(RowLeaf(outer, key[1]), space=space)
        return self._leaves[key]

    def constant(self, outer: Outer, sizes: tuple[int, ...]) -> Expression:
        key = (outer, sizes)
        if key not in self._leaves:
            self._leaves[key] = Expression(ConstantLeaf(outer, sizes))
        return self._leaves[key]

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        with self:
            yield

    # What it knows of tensors.

    def _fake(self, value: torch.Tensor) -> torch.Tensor:
        dtype = torch.float32 if value.dtype in NARROW else value.dtype
        with fake_mode_of([value]), torch.no_grad():
            return torch.empty_like(value, dtype=dtype, requires_grad=False)

    def _hold(self, fake: torch.Tensor, traced: Traced) -> None:
        self._held[id(fake)] = traced
        self._alive.append(fake)

    def _know(self, fake: torch.Tensor, outer: Outer | Exit) -> None:
        self._outer[id(fake)] = outer
        self._alive.append(fake)

    # ATen operations.

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        held = [found for tensor in given if (found := self.traced(tensor)) is not None]
        if held and func is torch.ops.aten._local_scalar_dense.default:
            raise Mixes("item takes a number out of the rows")
        out = func(*args, **kwargs)
        if out is None and (held or func._schema.is_mutable):
            raise Mixes(f"{func} returns nothing, and does something that is not understood")
        if not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(out)):
            return out
        if held and any(map(_is_complex, tree_leaves(out))):
            raise Mixes(f"{func} makes complex numbers")
        if held and (func.namespace != "aten" or func._overloadname.endswith("out")):
            raise Mixes(f"{func} is not known to treat rows apart")
        if func._schema.is_mutable:
            self._write(func, args, kwargs, out, bool(held))
        elif not held:
            self._record(func, args, kwargs, out)
        else:
            try:
                self._bind(out, rowwise(self, _call(func, args, kwargs, out)))
            except Mixes:
                if any(one.words > self.most_words for one in held):
                    raise
                self._record(func, args, kwargs, out)
        return out

    def _write(self, func: Any, args: Any, kwargs: Any, out: Any, has_rows: bool) -> None:
        name = func._schema.name.split("::")[1]
        plain = getattr(
            getattr(torch.ops.aten, name.removesuffix("_"), None), func._overloadname, None
        )
        target = args[0]
        if plain is None or not name.endswith("_") or out is not target:
            raise Mixes(f"{name} writes in a way that is not understood")
        held = self.traced(target)
        if held is None:
            outer = self._outer.get(id(target))
            if has_rows or not isinstance(outer, Outer) or outer.node is not None:
                raise Mixes(f"{name} puts rows into another tensor")
            copy = self._fake(target)
            self._know(copy, outer)
            self._record(plain, (copy, *args[1:]), kwargs, target)
            return
        call = _call(plain, args, kwargs, out)
        (result,) = [rowwise(self, call)]
        if not isinstance(result, New) or result.space is not held.space:
            raise Mixes(f"{name} is not understood")
        if finest(result.dims) != held.finest:
            raise Mixes(f"{name} writes other rows than those that it reads")
        value = result.expression
        if any(tensor.dtype != target.dtype for tensor in call.tensors):
            value = self.make("aten._to_copy.default", value, dtype=target.dtype)
        before = held.cell.expression
        write(self.make, held, value)
        if before not in with_gradient([held.cell.expression]):
            self.written_over.append(before)

    def _record(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Write down a call that is made outside of chunks."""
        depends = False

        def known(leaf: Any) -> Any:
            nonlocal depends
            if not isinstance(leaf, torch.Tensor):
                return leaf
            held = self.traced(leaf)
            if held is not None:
                depends = True
                return Exit(held, self.read(held), leaf, held.finest)
            found = self._outer.get(id(leaf))
            if found is None:
                raise Refused("a tensor is a constant of the graph")
            depends |= isinstance(found, Exit) or found.depends
            return found

        given, named = tree_map(known, (tuple(args), dict(kwargs)))
        key = (func, hashable(given), hashable(named))
        # Where a node is run once more, its calls are the same.
        call = self._calls.setdefault(key, (func, given, named))
        items = enumerate(out) if isinstance(out, list | tuple) else [(None, out)]
        for item, leaf in items:
            if isinstance(leaf, torch.Tensor):
                made = Outer(leaf, None, call, item, depends)
                self._know(leaf, self._made.setdefault((key, item), made))

    def _bind(self, out: Any, result: Any) -> None:
        if isinstance(result, list):
            for leaf, one in zip(out, result, strict=True):
                self._bind(leaf, one)
            return
        match result:
            case New(expression, dims, space):
                if not out.is_floating_point() and reaches_a_head(expression):
                    expression = self.make("aten.detach.default", expression)
                traced = Traced(Cell(expression, space), (), dims, tuple(out.shape), space)
                self._hold(out, traced)
            case Traced():
                self._hold(out, result)
            case Summed():
                self._finish(result, out)
            case Quotient(total, by):
                first = torch.empty_like(out)
                self._finish(total, first)
                self._record(torch.ops.aten.div.Tensor, (first, by), {}, out)
            case torch.Tensor():
                self._know(out, self.given(result))

    def _finish(self, result: Summed, out: torch.Tensor) -> None:
        made, sizes = result.partial, result.sizes
        traced = Traced(Cell(made.expression, made.space), (), made.dims, sizes, made.space)
        if traced.words > self.most_words:
            raise Mixes("it runs over rows")
        partial = out.new_empty(sizes, dtype=result.dtype)
        self._know(partial, Exit(traced, made.expression, partial, finest(made.dims)))
        func, args, kwargs = result.finish(partial)
        self._record(func, args, kwargs, out)


def _is_complex(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_complex()


def _call(func: Any, args: Any, kwargs: Any, out: Any) -> Call:
    named = {}
    for number, argument in enumerate(func._schema.arguments):
        if argument.name in kwargs:
            named[argument.name] = kwargs[argument.name]
        elif number < len(args):
            named[argument.name] = args[number]
        elif argument.has_default_value():
            named[argument.name] = argument.default_value
        else:
            raise Mixes(f"{describe_call(func)} is called in a way that is not understood")
    return Call(func, named, out)
