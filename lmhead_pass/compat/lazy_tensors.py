"""What a tensor takes that computes its values when they are read."""

import contextlib
from collections.abc import Iterator
from typing import Any

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

is_view = find("torch.Tensor._is_view", NO_LAZY_LOGITS)
"""Whether autograd knows a tensor as a view of another, which is its ``view_base``."""
view_base = find("torch.Tensor._base", NO_LAZY_LOGITS)
find("torch.Tensor._version", NO_LAZY_LOGITS)

_parse_to = find("torch._C._nn._parse_to", "to() computes logits that are not read yet")
_no_modes = find("torch.utils._python_dispatch._disable_current_modes", NO_LAZY_LOGITS)
_no_transforms = find(
    "torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack", NO_LAZY_LOGITS
)


@contextlib.contextmanager
def outside_of_modes() -> Iterator[None]:
    """A block that no mode and no torch.func transform around it sees."""
    with _no_modes(), _no_transforms():
        yield


def version_of(tensor: Tensor) -> int:
    """How often ``tensor`` was written to in place."""
    return tensor._version


def read_to(*args: Any, **kwargs: Any) -> tuple[Any, ...] | None:
    """The device, dtype, non_blocking and memory_format that ``Tensor.to`` is given.

    None if they cannot be read.
    """
    return None if _parse_to is None else _parse_to(*args, **kwargs)
