"""Functions that look at the form of logits, and not at their values: ``mask.to(logits)``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIKE_THE_FIRST = {
    *(getattr(torch, f"{name}_like") for name in ("empty", "zeros", "ones", "full")),
    *(torch.rand_like, torch.randn_like, torch.randint_like),
    *(getattr(Tensor, f"new_{name}") for name in ("empty", "zeros", "ones", "full", "tensor")),
}
_CASTS = (Tensor.to, Tensor.type_as)
_SIZES: dict[Any, Callable[..., Any]] = {
    Tensor.view_as: Tensor.view,
    Tensor.reshape_as: Tensor.reshape,
    Tensor.expand_as: Tensor.expand,
}


def run_by_form(
    func: Callable[..., Any], args: Any, kwargs: Any, form_of: Callable[[Tensor], Tensor]
) -> Any:
    """The result of ``func`` if it needs the form of lazy logits alone; else NotImplemented.

    ``form_of`` returns a tensor of their form, without values.
    """
    if func in _LIKE_THE_FIRST and args:
        return func(form_of(args[0]), *args[1:], **kwargs)
    if len(args) < 2 or not isinstance(args[1], Tensor):
        return NotImplemented
    first, other, *more = args
    if func in _CASTS:
        return first.to(*more, device=other.device, dtype=other.dtype, **kwargs)
    if func in _SIZES:
        return _SIZES[func](first, other.size())
    return NotImplemented
