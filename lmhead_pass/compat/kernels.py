"""What the op asks of autograd and of the dispatcher."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .lookup import NO_REWRITE, NO_ROWWISE, find, report_missing

below_autograd = find("torch._C._AutoDispatchBelowAutograd", NO_REWRITE)
"""A block in which calls go to the kernels that autograd would call."""

_COMPILED_AGAIN = "compiled autograd compiles what losses do in chunks, for each number of rows"
_exclude = find("torch._C._SetExcludeDispatchKeyGuard", NO_ROWWISE)
_keys = find("torch._C.DispatchKey", NO_ROWWISE)


@contextlib.contextmanager
def recording_gradients() -> Iterator[None]:
    """A block in which autograd records what is computed, in the kernel of an op as well.

    Whoever compiles backwards or looks for anomalies in them sees the op, and nothing of this.
    """
    # Not when this is imported: it takes all of Dynamo.
    uncompiled = find("torch._dynamo.compiled_autograd._disable", _COMPILED_AGAIN)
    with (
        contextlib.nullcontext() if uncompiled is None else uncompiled(),
        torch.autograd.set_detect_anomaly(False),
        _exclude(_keys.AutogradFunctionality, False),
        _exclude(_keys.ADInplaceOrView, False),
        torch.enable_grad(),
    ):
        yield


def is_forward_mode() -> bool:
    """Whether the caller is inside of ``torch.autograd.forward_ad.dual_level``."""
    if not hasattr(forward_ad, "_current_level"):
        report_missing(
            "torch.autograd.forward_ad._current_level",
            "calls of the op that need no gradient go through autograd all the same",
        )
        return True
    return bool(forward_ad._current_level >= 0)


@functools.cache
def has_kernel(op: str, device_type: str) -> bool:
    """Whether ``op``, such as ``"aten::add.out"``, has a kernel of its own for a kind of device."""
    without = "products of BF16 and FP16 are made of copies in FP32"
    key_of = find("torch._C._dispatch_key_for_device", without)
    has = find("torch._C._dispatch_has_kernel_for_dispatch_key", without)
    return key_of is not None and has is not None and has(op, key_of(device_type))


def can_check_on_device(device: torch.device) -> bool:
    """Whether ``check_on_device`` raises an error there. ROCm leaves such checks out."""
    return device.type == "cuda" and torch.version.hip is None and _check() is not None


def check_on_device(condition: Tensor, message: str) -> None:
    """Raise an error if ``condition`` is False, without waiting for the device."""
    if (check := _check()) is not None:
        check(condition, message)


def _check() -> Any:
    return find("torch._assert_async", "a target out of bounds gives NaN on a GPU, and no error")
