"""Logits that a compiled function returns and that nobody has read yet.

A model that returns its logits beside the loss gives :class:`LazyLogits` instead: a tensor with the
logits' shape, dtype and device that holds the hidden states and the head's own parameters, and
computes the logits when their values are first needed.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..compat import lazy_tensors as compat
from ..compat.compiling import is_compiling
from .gradient_refusal import SETTING, refuse_gradient
from .recipe import Recipe

# These ask for something, or set something, that does not depend on a tensor's values.
_METADATA = {
    *(
        getattr(Tensor, name).__get__
        for name in (
            *("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes"),
            *("requires_grad", "grad_fn", "grad", "is_leaf", "retains_grad", "_version"),
            *("is_cpu", "is_cuda", "is_xpu", "is_mps", "is_meta"),
            *("is_sparse", "is_sparse_csr", "is_quantized", "is_nested", "is_mkldnn"),
        )
        if hasattr(Tensor, name)
    ),
    *(
        getattr(namespace, name)
        for namespace in (Tensor, torch)
        for name in (
            *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset"),
            *("is_contiguous", "element_size", "get_device", "is_inference"),
            *("is_floating_point", "is_complex", "is_signed", "is_conj", "is_neg"),
        )
        if hasattr(namespace, name)
    ),
    *(Tensor.__len__, Tensor.__hash__, Tensor.__dir__, Tensor.register_hook),
}

# These give a view, a cast or a detached alias, if none of their other arguments is a tensor.
_DERIVING = {
    *(getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "data")),
    *(
        getattr(namespace, name)
        for namespace in (Tensor, torch)
        for name in (
            *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand"),
            *("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t"),
            *("__getitem__", "select", "narrow"),
            *("to", "float", "half", "bfloat16", "double", "contiguous", "detach"),
        )
        if hasattr(namespace, name)
    ),
}
# To autograd unread logits are a view of another tensor. Callers are not to see that.
_ANSWERS = {
    compat.is_view: False,
    getattr(compat.view_base, "__get__", None): None,
}
_DETACHING = {Tensor.detach, torch.detach, Tensor.data.__get__}  # type: ignore[attr-defined]


class _Logits:
    """Logits that are not computed yet.

    ``history()`` is the tensor that a gradient would flow to, while a tensor needs it; else None.
    """

    def __init__(self, recipe: Recipe, history: Tensor | None) -> None:
        self.recipe = recipe
        self.history = weakref.ref(history) if history is not None else lambda: None

    def compute(self) -> Tensor:
        logits = self.recipe.compute()
        if (history := self.history()) is not None:
            refuse_gradient(logits, [history])
        return logits


class _Derived:
    """A view, a cast or a detached alias of logits that are not read yet."""

    def __init__(self, base: "_Cell", operation: Callable[[Tensor], Tensor]):
        self.base = base
        self.operation = operation
        self.grad_enabled = _gradients_are_recorded()

    def compute(self) -> Tensor:
        assert self.base.value is not None
        with torch.set_grad_enabled(self.grad_enabled):
            return self.operation(self.base.value)


class _Cell:
    """A value that is computed when it is first read, and kept from then on.

    All that was derived from it before is computed at the same time: the reader may change it next.
    """

    def __init__(self, source: _Logits | _Derived | None, value: Tensor | None = None):
        self.source = source
        self.value = value
        self.derived: list[weakref.ref[_Cell]] = []

    def derive(self, operation: Callable[[Tensor], Tensor]) -> "_Cell":
        cell = _Cell(_Derived(self, operation))
        self.derived.append(weakref.ref(cell))
        return cell

    def read(self) -> Tensor:
        if self.source is not None:
            first = self
            while isinstance(first.source, _Derived):
                first = first.source.base
            # The value may be read again elsewhere, so no mode or transform of this reader applies.
            with compat.outside_of_modes(), torch.inference_mode(False):
                first._compute()
        assert self.value is not None
        return self.value

    def _compute(self) -> None:
        if self.value is None:  # It was computed before if computing something derived then failed.
            assert self.source is not None
            self.value = self.source.compute()
        for derived in self.derived:
            if (cell := derived()) is not None:
                cell._compute()
        self.derived.clear()
        self.source = None


class LazyLogits(Tensor):
    """A tensor whose values are computed when they are first needed, and kept.

    Its size, dtype and device are known before, and so is whether it requires a gradient. Views,
    casts and ``detach()`` of unread logits are unread logits. A gradient that would flow into them
    raises a RuntimeError.
    """

    _cell: _Cell
    _like: Tensor
    _history: Tensor | None

    @staticmethod
    def __new__(
        cls,
        cell: _Cell,
        like: Tensor,
        device: torch.device,
        history: Tensor | None = None,
    ) -> "LazyLogits":
        """``like`` has the size, strides and dtype of the values, and is on the meta device.

        ``history`` is a tensor that a gradient would flow to; None if none is required.
        """
        self: LazyLogits = compat.make_wrapper(
            cls,
            like.size(),
            strides=like.stride(),
            storage_offset=like.storage_offset(),
            dtype=like.dtype,
            device=device,
        )
        # It has no memory: code that takes its address is to fail.
        compat.forbid_address(self)
        self._cell = cell
        self._like = like
        self._history = history
        if history is None:
            return self
        # Autograd detaches the results of a compiled function that are no views.
        with torch.enable_grad(), compat.without_torch_function():
            refuse_gradient(self, [history])
            return cast(LazyLogits, torch.ops.aten.alias(self))

    @classmethod
    def from_recipe(cls, recipe: Recipe, inputs: Sequence[Tensor]) -> "LazyLogits":
        """A gradient would flow to ``inputs``, which are inputs of the compiled function."""
        if not all(source.requires_grad for source in inputs):
            raise RuntimeError(
                "lmhead_pass: a compiled function returned logits without computing them, and a "
                "gradient through them could not be refused, since an input that it goes to was "
                "changed in place where no gradient is seen. Return the loss alone, or set "
                f"{SETTING}."
            )
        history = None
        if recipe.requires_grad:
            history = torch.empty(0)  # of the inputs, without their values
            refuse_gradient(history, inputs)
        return cls(_Cell(_Logits(recipe, history)), recipe.like(), recipe.hidden.device, history)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_compiling():
            return _as_input(func, args, kwargs)
        known = _without_reading(func, args, kwargs)
        return _on_values(func, args, kwargs) if known is NotImplemented else known

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            logits = args[0]  # autograd, which runs before this, gives the result its history
            alias = cls(logits._cell, logits._like, logits.device)
            alias._history = logits._history
            return alias
        return _on_values(func, args, kwargs or {})

    # As inputs of another compiled function, torch.compile flattens lazy logits to their values.

    @property
    def _value(self) -> Tensor:
        return self._cell.read()

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["_value"], None

    def _stable_hash_for_caching(self) -> str:
        return type(self).__qualname__

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: None, outer_size: Any, outer_stride: Any
    ) -> "LazyLogits":
        value = inner["_value"]
        return LazyLogits(_Cell(None, value), value, value.device)


def _as_input(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What torch.compile finds when lazy logits are an input of what it compiles.

    Here it looks at the tensor itself; it gets the values from ``__tensor_flatten__``.
    """
    if func in _ANSWERS:
        return _ANSWERS[func]
    if func is Tensor.__repr__:
        return f"{type(args[0]).__qualname__}(...)"
    with compat.without_torch_function():
        return func(*args, **kwargs)


def _on_values(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call ``func`` with the values of the lazy logits among its arguments."""
    lazy = [leaf for leaf in compat.tree_leaves((args, kwargs)) if isinstance(leaf, LazyLogits)]
    values = {id(logits): logits._cell.read() for logits in lazy}
    args, kwargs = compat.tree_map(lambda leaf: values.get(id(leaf), leaf), (args, kwargs))
    result = func(*args, **kwargs)
    # A function that writes to its argument returns it: the caller gets its own tensor back.
    owners = {id(values[id(logits)]): logits for logits in lazy}
    return compat.tree_map(lambda leaf: owners.get(id(leaf), leaf), result)


def _without_reading(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The result of ``func`` for unread logits; NotImplemented if it has to read them."""
    logits, *others = args or (None,)
    if not isinstance(logits, LazyLogits) or logits._cell.value is not None:
        return NotImplemented
    if any(isinstance(leaf, Tensor) for leaf in compat.tree_leaves((others, kwargs))):
        return NotImplemented
    if func in _ANSWERS:
        return _ANSWERS[func]
    if func in _METADATA:
        with compat.without_torch_function():
            return func(*args, **kwargs)
    if func in _DERIVING:
        return _derive(logits, func, others, kwargs)
    return NotImplemented


def _derive(
    logits: LazyLogits, func: Callable[..., Any], others: list[Any], kwargs: dict[str, Any]
) -> Any:
    """A view, cast or alias of unread ``logits``; NotImplemented if it is on another device."""
    like = logits._like
    with compat.without_torch_function():
        device = logits.device
    if func is Tensor.to:
        options = {name: value for name, value in kwargs.items() if name != "copy"}
        read = compat.read_to(*others, **options)
        if read is None or read[0] not in (None, device):
            return NotImplemented
        _, dtype, _, memory_format = read
        others = []
        kwargs = {**kwargs, "dtype": dtype or like.dtype, "memory_format": memory_format}
        kwargs.pop("device", None)
    result = func(like, *others, **kwargs)
    if result is like:
        return logits
    requires_grad = (
        logits.requires_grad
        and _gradients_are_recorded()
        and func not in _DETACHING
        and result.is_floating_point()
    )
    cell = logits._cell.derive(lambda value: func(value, *others, **kwargs))
    return LazyLogits(cell, result, device, logits._history if requires_grad else None)


def _gradients_are_recorded() -> bool:
    """Whether autograd records: in inference mode, too, ``torch.is_grad_enabled()`` may be True."""
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
