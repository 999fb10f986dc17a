"""What a tensor takes that computes its values when they are read."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .lookup import NO_LAZY_LOGITS, find

tree_leaves = find("torch.utils._pytree.tree_leaves", NO_LAZY_LOGITS)
"""Everything in nested containers."""
tree_map = find("torch.utils._pytree.tree_map", NO_LAZY_LOGITS)
"""Nested containers with a function of each thing in them."""

make_wrapper = find("torch.Tensor._make_wrapper_subclass", NO_LAZY_LOGITS)
"""Makes a tensor of a subclass that has a size, dtype and device and no memory."""
forbid_address = find("torch._C._set_throw_on_mutable_data_ptr", NO_LAZY_LOGITS)
"""Lets a tensor raise an error if its address is asked for."""
without_torch_function = find("torch._C.DisableTorchFunctionSubclass", NO_LAZY_LOGITS)
"""A block in which calls do not go to ``__torch_function__`` of a tensor subclass."""
no_torch_function = find("torch._C._disabled_torch_function_impl", NO_LAZY_LOGITS)
"""A ``__torch_function__`` that does nothing of its own."""
is_fake = find("torch._subclasses.fake_tensor.is_fake", NO_LAZY_LOGITS)
"""Whether a tensor, or what it wraps, is a fake one."""

weak_memory = find("torch.multiprocessing.reductions.StorageWeakRef", NO_LAZY_LOGITS)
"""A weak reference to a storage: it tells whether anybody holds that, and its ``memory_of``."""

_map = find("torch.fx.node.map_aggregate", NO_LAZY_LOGITS)
_swap = find("torch._C._swap_tensor_impl", NO_LAZY_LOGITS)
find("torch.Tensor._version", NO_LAZY_LOGITS)
_parse_to = find("torch._C._nn._parse_to", "to() computes logits that are not read yet")
new_fake_mode = find("torch._subclasses.fake_tensor.FakeTensorMode", NO_LAZY_LOGITS)
"""A mode with fake tensors of its own."""
_no_modes = find("torch.utils._python_dispatch._disable_current_modes", NO_LAZY_LOGITS)
_modes = find("torch._C._len_torch_dispatch_stack", NO_LAZY_LOGITS)
_transform = find("torch._C._functorch.peek_interpreter_stack", NO_LAZY_LOGITS)
_no_transforms = find(
    "torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack", NO_LAZY_LOGITS
)


def map_arguments(
    args: Any, kwargs: Any, function: Callable[[Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call with a function of each thing in them.

    In a tenth of the time of ``tree_map``; lists and dictionaries in the result cannot be changed.
    """
    return _map(tuple(args), function), {key: _map(kwargs[key], function) for key in kwargs}


def leaves_of(arguments: Any) -> list[Any]:
    """Everything in arguments of a call."""
    leaves: list[Any] = []
    _map(arguments, leaves.append)
    return leaves


def is_inside_of_modes() -> bool:
    """Whether a dispatch mode or a torch.func transform (grad, vmap, ...) is around this."""
    return _transform() is not None or _modes() > 0


def outside_of_modes() -> contextlib.AbstractContextManager[None]:
    """A block that no mode and no torch.func transform around it sees."""
    return _without_modes() if is_inside_of_modes() else contextlib.nullcontext()


@contextlib.contextmanager
def _without_modes() -> Iterator[None]:
    with _no_modes(), _no_transforms():
        yield


def without_memory(
    like: Tensor, device: torch.device, storage: torch.UntypedStorage | None = None
) -> Tensor:
    """A tensor of the form of ``like`` on ``device``, in this ``storage``, that has no values."""
    with outside_of_modes():
        made = torch.empty(0, dtype=like.dtype, device=device)
        if storage is None:
            storage = made.untyped_storage()
        made.set_(storage, like.storage_offset(), like.size(), like.stride())
        storage.resize_(0)
        return made


def version_of(tensor: Tensor) -> int:
    """How often ``tensor`` was written to in place; 0 where nobody counts."""
    return 0 if tensor.is_inference() else tensor._version


def read_to(*args: Any, **kwargs: Any) -> tuple[Any, ...] | None:
    """The device, dtype, non_blocking and memory_format that ``Tensor.to`` is given.

    None if they cannot be read.
    """
    return None if _parse_to is None else _parse_to(*args, **kwargs)


keeps_graph = find("torch._C._autograd._get_current_graph_task_keep_graph", NO_LAZY_LOGITS)
"""Whether the backward under way is to leave the graph for another one (``retain_graph``)."""


def autocast_state(device: str) -> tuple[Any, ...]:
    """What autocast does on a kind of device: for ``autocast_as``."""
    return device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def autocast_as(state: tuple[Any, ...]) -> contextlib.AbstractContextManager[Any]:
    """A block in the ``autocast_state`` that was."""
    device, enabled, dtype = state
    if autocast_state(device) == state:
        return contextlib.nullcontext()
    return torch.autocast(device, dtype, enabled)


def memory_of(tensor: Tensor) -> int:
    """A number that all tensors in the same memory share."""
    address: int = tensor.untyped_storage()._cdata
    return address


def give_history(tensor: Tensor, other: Tensor) -> None:
    """Let ``tensor``, wherever it is held, be what ``other`` is, and the other way round.

    As ``torch.utils.swap_tensors``, also where somebody has a weak reference to one.
    """
    _swap(tensor, other)
    tensor.__dict__, other.__dict__ = other.__dict__, tensor.__dict__


def holds_tensors(value: Any) -> bool:
    """Whether ``value`` is a tensor, or a tuple or list of some."""
    items = value if isinstance(value, tuple | list) else (value,)
    return bool(items) and all(isinstance(item, Tensor) for item in items)
