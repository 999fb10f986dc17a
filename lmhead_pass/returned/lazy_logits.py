"""Logits that a compiled function returns and that nobody has read yet.

Where a model returns its logits, :class:`LazyLogits` leave it instead: a tensor with the logits'
shape, dtype, device and gradient that holds the hidden states and the head's own parameters. What
has the vocabulary and is made of them (views, casts, a log_softmax) is written down; what has it no
longer (a cross entropy, a logsumexp) is computed by the op. All else reads the logits: they are
computed once, and kept.
"""

import contextlib
import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from ..compat import lazy_tensors as compat
from ..compat.compiling import is_compiling, is_inside_of_checkpoint, never_compiled
from . import reading, results
from .by_form import run_by_form
from .cells import Call, Cell
from .history import Derive
from .lazy_tensor import LazyTensor, lazy_in
from .likes import likes_of
from .masks import by_numbers
from .metadata import METADATA
from .plain_values import on_values, with_history
from .readers import reader_of
from .rows_alone import run_apart, run_on_rows_alone
from .steps import (
    COMPUTED,
    DETACHING,
    NEW_SHAPES,
    PIECES,
    RESIZING,
    VIEWS,
    WRITTEN_DOWN,
    is_in_place,
    is_linear,
    is_written_down,
)
from .taken_again import remember, taken_again
from .writes import SET_DATA, follow_writes, reshape, set_data, write


class LazyLogits(LazyTensor):
    """A tensor whose values are computed when they are first needed, and kept."""

    _untouched: Callable[[], Tensor] | None
    """Of logits that were just returned: makes such as have a history, which is put in at the first
    touch. When they are made, the hidden states do not have theirs yet."""
    _alias: "LazyLogits | None"
    """What is to be the next alias of it."""

    @staticmethod
    def __new__(cls, cell: Cell) -> "LazyLogits":
        like = cell.like
        self: LazyLogits = compat.make_wrapper(
            cls,
            like.size(),
            strides=like.stride(),
            storage_offset=like.storage_offset(),
            dtype=like.dtype,
            device=cell.device,
        )
        # It has no memory: code that takes its address is to fail.
        compat.forbid_address(self)
        self._cell = cell
        self._untouched = self._plain = self._alias = None
        cell.owner = weakref.ref(self)
        return self

    @classmethod
    @never_compiled
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        args, kwargs = _input_first(args, kwargs)
        logits: Any = lazy_in((args, kwargs))
        for tensor in logits:
            touch(tensor)
            follow_writes(tensor)
        if is_compiling():
            # torch.compile looks at an input: it gets the values from __tensor_flatten__.
            if func is Tensor.__repr__:
                return f"{type(args[0]).__qualname__}(...)"
            with compat.without_torch_function():
                return func(*args, **kwargs)
        if func is Tensor.register_hook and len(args) > 1:
            args = (args[0], partial(_call_hook, args[1]), *args[2:])
        if func in METADATA or func in _OF_AUTOGRAD:
            with compat.without_torch_function():
                return func(*args, **kwargs)
        if func in NEW_SHAPES or func in RESIZING:
            return reshape(func, args, kwargs)
        if func == SET_DATA and isinstance(args[0], cls):
            return set_data(*args)
        if is_in_place(func, kwargs) or kwargs.get("out") is not None:
            return write(func, args, kwargs)
        if func is Tensor.__deepcopy__:
            return _deep_copy(*args, **kwargs)
        cells = [tensor._cell for tensor in logits]
        args, kwargs = taken_again(func, args, kwargs, cells, cls)
        for attempt in (_by_form, _by_numbers, _without_reading, _on_rows_alone, _on_values_alone):
            result = attempt(func, args, kwargs, logits)
            if result is not NotImplemented:
                return result
        return on_values(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            # Autograd, which runs before this, gives the result its history.
            (logits,) = args
            if logits._alias is not None:
                return logits._alias
            is_detached = func is torch.ops.aten.detach.default
            same, more = (Tensor.detach, ()) if is_detached else (Tensor.view, (logits.shape,))
            source = logits._cell
            autocast = compat.autocast_state(source.device.type)
            call = Call(same, (source, *more), {}, autocast=autocast, needs_no_values=True)
            cell = Cell(call, source.like, source.device, is_detached=is_detached)
            cell.identity = source.identity  # autograd hands a gradient on as it is
            return cls(cell)
        return on_values(func, args, kwargs or {})

    # As inputs of another compiled function, torch.compile flattens lazy logits to their values.

    @property
    def _value(self) -> Tensor:
        if self._cell.is_unread and is_compiling():
            # Only its form is looked at, and perhaps nobody is to read it afterwards.
            return self._cell.form()
        return self._cell.read()

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        touch(self)
        return ["_value"], None

    def _stable_hash_for_caching(self) -> str:
        return type(self).__qualname__

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: None, outer_size: Any, outer_stride: Any
    ) -> "LazyLogits":
        value = like = inner["_value"]
        if value.stride() != outer_stride:  # Of a view, where torch.compile has copied its values.
            like = torch.empty_strided(outer_size, outer_stride, dtype=value.dtype, device="meta")
        return LazyLogits(Cell(None, like, value.device, value))


# What a call that is written down may be given, beside lists, tuples and dictionaries of these.
_UNCHANGING = (
    *(Cell, Tensor, Number, str, slice, type(None), type(...)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)

# They get lazy logits as they are, and autograd finds their history.
_OF_AUTOGRAD = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}


def _call_hook(hook: Callable[[Tensor], Any], gradient: Tensor | None) -> Any:
    """There is no gradient where the logits were written to since: autograd calls no hook there."""
    return None if gradient is None else hook(gradient)


def _input_first(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of a call with the first one by its place."""
    if args or "input" not in kwargs or "condition" in kwargs:  # where's first
        return args, kwargs
    return (kwargs["input"],), {name: v for name, v in kwargs.items() if name != "input"}


def touch(logits: LazyLogits) -> None:
    """Give logits that were just returned their history."""
    if logits._untouched is None:
        return
    with_history, cell = logits._untouched, logits._cell
    logits._untouched = None
    with (
        compat.outside_of_modes(),
        torch.inference_mode(False),
        torch.enable_grad(),
        compat.without_torch_function(),
    ):
        twin = with_history()
        cell.owner = lambda: None
        named = {**logits.__dict__, **twin.__dict__}
        # Not if a function of autograd's holds it already: then a gradient is refused.
        with contextlib.suppress(RuntimeError):
            compat.give_history(logits, twin)
            logits.__dict__.update(named)
    cell.owner = weakref.ref(logits)


def _by_form(func: Callable[..., Any], args: Any, kwargs: Any, logits: Sequence[LazyLogits]) -> Any:
    if compat.is_inside_of_modes():
        return NotImplemented

    def form_of(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, LazyLogits):
            return tensor
        return tensor._cell.form()

    return run_by_form(func, args, kwargs, form_of)


def _by_numbers(
    func: Callable[..., Any], args: Any, kwargs: Any, logits: Sequence[LazyLogits]
) -> Any:
    is_unread = func is Tensor.__getitem__ and args[0] is logits[0] and logits[0]._cell.is_unread
    return by_numbers(*args) if is_unread else NotImplemented


def _without_reading(
    func: Callable[..., Any], args: Any, kwargs: Any, logits: Sequence[LazyLogits]
) -> Any:
    """The result of ``func`` for unread logits; NotImplemented if it has to read them."""
    cells = [tensor._cell for tensor in logits]
    device = cells[0].device
    call = _call(func, args, kwargs, device)
    if (
        not call.roots
        # Who is given an array may find another one in it later.
        or not all(isinstance(leaf, _UNCHANGING) for leaf in call.leaves)
        # A gradient goes back one way.
        or (torch.is_grad_enabled() and len(call.ways_back) > 1)
        # Views of values that are there are no less views of the same tensor.
        or (func not in VIEWS | PIECES and any(cell.value is not None for cell in cells))
        or any(tensor.requires_grad for tensor in call.tensors)
        or torch.is_inference_mode_enabled()
        or compat.is_inside_of_modes()
    ):
        return NotImplemented
    for root in call.roots:
        root.is_used_again |= is_inside_of_checkpoint() and root.value is None
    if func not in COMPUTED or func in WRITTEN_DOWN:
        likes = likes_of(func, call.args, call.kwargs, device)
        if likes is None:
            return NotImplemented
        if is_written_down(func, likes, cells):
            if _keeps_less(func, likes, call) and not _is_recorded(logits):
                result = _on_rows_alone(func, args, kwargs, logits)
                if result is not NotImplemented:
                    return result
            return _write_down(call, logits, likes)
    if func not in COMPUTED or any(cell.value is not None for cell in cells):
        return NotImplemented
    read = [_tensor_of(cell, logits) for cell in call.cells]
    result = results.compute(call, read, _is_recorded(logits))
    if result is not NotImplemented:
        remember(call, result)
    return result


def _keeps_less(func: Callable[..., Any], likes: Any, call: Call) -> bool:
    """Whether ``likes``, in memory of its own, takes less than the hidden states that it would
    keep: the last token's probabilities, which an evaluation collects."""
    if func in VIEWS | PIECES:
        return False
    return bool(likes.nbytes < sum(recipe.hidden.nbytes for recipe, _ in call.recipes))


def _is_recorded(logits: Sequence[LazyLogits]) -> bool:
    """Whether autograd records what is made of ``logits``."""
    with compat.without_torch_function():
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in logits)


def _tensor_of(cell: Cell, logits: Sequence[LazyLogits]) -> LazyLogits:
    return next(tensor for tensor in logits if tensor._cell is cell)


def _with_cells(args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return compat.map_arguments(
        args, kwargs, lambda leaf: leaf._cell if isinstance(leaf, LazyLogits) else leaf
    )


def _call(func: Any, args: Any, kwargs: Any, device: torch.device) -> Call:
    args, kwargs = _with_cells(args, kwargs)
    args, kwargs = compat.map_arguments(args, kwargs, _plain_number)
    autocast, needs_no_values = compat.autocast_state(device.type), is_linear(func, args, kwargs)
    return Call(func, args, kwargs, autocast=autocast, needs_no_values=needs_no_values)


def _plain_number(leaf: Any) -> Any:
    """NumPy's numbers as Python's: a graph's code does not know the others."""
    is_of_numpy = isinstance(leaf, Number) and type(leaf).__module__ == "numpy"
    return leaf.item() if is_of_numpy else leaf


def _write_down(call: Call, logits: Sequence[LazyLogits], likes: Any) -> Any:
    """Lazy logits for what ``call`` makes of others; NotImplemented if it may not be kept."""
    if not call.is_given_little:
        return NotImplemented
    call = call.with_copies()
    if call.function in PIECES:
        return type(likes)(
            _made(replace(call, item=item), logits, like) for item, like in enumerate(likes)
        )
    if len(logits) == 1 and likes is logits[0]._cell.like:
        return logits[0]  # as contiguous() and to() return what they are given
    return _made(call, logits, likes)


def _made(call: Call, logits: Sequence[LazyLogits], like: Tensor) -> Tensor:
    given = [_tensor_of(source, logits) for source in call.cells]
    is_detached = call.function in DETACHING or not _is_recorded(given)
    cell = Cell(call, like, given[0]._cell.device, is_detached=is_detached)
    if is_detached:
        return LazyLogits(cell)
    if not call.needs_no_values:
        for source in call.cells:
            source.is_needed_by(call)
    made: Tensor = Derive.apply(lambda: LazyLogits(cell), call, *given)  # type: ignore[no-untyped-call]
    return made


def _on_rows_alone(
    func: Callable[..., Any], args: Any, kwargs: Any, logits: Sequence[LazyLogits]
) -> Any:
    """The result of ``func`` for a few rows of unread logits; NotImplemented if it needs all."""
    if _is_recorded(logits) or torch.is_inference_mode_enabled() or compat.is_inside_of_modes():
        return NotImplemented
    (cell, *others) = dict.fromkeys(tensor._cell for tensor in logits)
    if others:
        return NotImplemented
    given, named = _with_cells(args, kwargs)
    result = run_on_rows_alone(func, given, named, cell)
    if result is not NotImplemented or cell.value is not None or not cell.roots:
        return result
    if cell.alone is None and isinstance(call := cell.source, Call) and call.function in COMPUTED:
        # Single words of rows.
        reader = reader_of(call)
        if reader is not None:
            with torch.no_grad():
                tensors = results.tensors_of(call).values()
                cell.alone = reader.run_first(*(tensor for part in tensors for tensor in part))
    if cell.alone is None:
        return NotImplemented
    return run_apart(func, given, named, {id(cell): cell.alone})


def _on_values_alone(
    func: Callable[..., Any], args: Any, kwargs: Any, logits: Sequence[LazyLogits]
) -> Any:
    """The result of ``func``, if the logits have to stay unread and nobody can tell."""
    if not any(tensor._cell.is_to_stay_unread for tensor in logits):
        return NotImplemented
    values = {}
    for tensor in logits:
        reading.tell(func, tensor._cell)
        values[id(tensor)] = with_history(tensor, tensor._cell.look())
    return run_apart(func, args, kwargs, values)


def _deep_copy(logits: LazyLogits, memo: dict[int, Any]) -> Any:
    """The values as a plain tensor, as a leaf if the logits are one."""
    if id(logits) in memo:
        return memo[id(logits)]
    with compat.without_torch_function():
        is_leaf, requires_grad, grad = logits.is_leaf, logits.requires_grad, logits.grad
    if not is_leaf:
        return on_values(Tensor.__deepcopy__, (logits, memo), {})
    copied = memo[id(logits)] = logits._cell.read().detach().clone().requires_grad_(requires_grad)
    if isinstance(logits, torch.nn.Parameter):  # A copy of one has no gradient.
        memo[id(logits)] = torch.nn.Parameter(copied.detach(), requires_grad)
    else:
        copied.grad = copy.deepcopy(grad, memo)
    return memo[id(logits)]
