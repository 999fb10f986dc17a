"""What a function returns, without its values."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..compat import lazy_tensors as compat
from .cells import Cell
from .steps import PIECES, VIEWS


def likes_of(func: Callable[..., Any], args: Any, kwargs: Any, device: torch.device) -> Any:
    """Tensors on the meta device, like those that ``func`` returns for ``args``, Cells among them.

    None if that depends on values, is on another device, or is an error, which eager will raise.
    """
    if func is Tensor.to:
        copy = kwargs.get("copy", False)
        options = {name: value for name, value in kwargs.items() if name != "copy"}
        read = compat.read_to(*args[1:], **options)
        if read is None or read[0] not in (None, device) or len(args) > 2:
            return None
        dtype = read[1] or args[0].like.dtype
        kwargs = {"dtype": dtype, "memory_format": read[3], "copy": copy}
        args = args[:1]
    try:
        with torch.no_grad():
            likes = _run(func, args, kwargs, device)
            return None if func is Tensor.__getitem__ and _is_out_of_range(*args) else likes
    except Exception:
        return None


def _is_out_of_range(cell: Any, index: Any) -> bool:
    """Whether an index on the CPU names what there is not: without values, nobody would notice."""
    items = index if isinstance(index, tuple) else (index,)
    sizes = iter(cell.like.shape)
    for place, item in enumerate(items):
        if item is None:
            continue
        if item is ...:
            taken = sum(_dims(later) for later in items[place + 1 :])
            sizes = iter(cell.like.shape[cell.like.dim() - taken :])
            continue
        size, *_ = [next(sizes) for _ in range(_dims(item))] or [0]
        numbers = torch.as_tensor(item) if isinstance(item, list) else item
        are_known = isinstance(numbers, Tensor) and numbers.is_cpu and numbers.dtype != torch.bool
        if are_known and ((numbers < -size) | (numbers >= size)).any():
            return True
    return False


def _dims(item: Any) -> int:
    """How many dimensions of a tensor an item of an index takes."""
    if item is None or item is ...:
        return 0
    is_mask = isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8)
    return item.dim() if is_mask else 1


def _run(func: Callable[..., Any], args: Any, kwargs: Any, device: torch.device) -> Any:
    if func in VIEWS | PIECES or not torch.is_autocast_enabled(device.type):
        given, named = compat.map_arguments(args, kwargs, _like)
        return func(*given, **named)
    # Autocast looks at the device, and there is none for the meta device.
    with compat.new_fake_mode():
        given, named = compat.map_arguments(args, kwargs, lambda leaf: _as(leaf, device))
        result = func(*given, **named)
    return compat.tree_map(lambda leaf: _as(leaf, torch.device("meta")), result)


def _like(leaf: Any) -> Any:
    if isinstance(leaf, Cell):
        return leaf.like
    return leaf.to("meta") if isinstance(leaf, Tensor) else leaf


def _as(leaf: Any, device: torch.device) -> Any:
    if isinstance(leaf, Cell):
        leaf = leaf.like
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype, device=device)
