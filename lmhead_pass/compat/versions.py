"""Differences between versions of torch that a version number tells."""

import warnings

import torch

from .lookup import find_any

_OLDEST, _NEWEST = "2.11", "2.15"


def _release(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:2]]


_THIS = _release(torch.__version__)

# A part that DDPOptimizer cuts off is run once on fake tensors, and then gives what is inside of a
# subclass instead. Torch 2.15 fails on that (2.14 was not tried).
DDP_PARTS_RETURN_SUBCLASSES = _release("2.14") > _THIS
# What ``x.T`` and ``x.mT`` are in a graph: a getattr or, in torch 2.15, one of these.
TRANSPOSING_ATTRIBUTES = find_any(
    ("torch.ops.aten.numpy_T", "torch.ops.aten.mT"), "logits times the T of a weight are left alone"
)


def warn_of_unknown_version() -> None:
    """Warn if torch is newer than what this package was tested with. It is used all the same."""
    if _release(torch.__version__) > _release(_NEWEST):
        warnings.warn(
            f"lmhead_pass was tested with torch {_OLDEST} to {_NEWEST}; this is "
            f"{torch.__version__}. What it does not recognise in a graph it leaves as it was. "
            "A newer lmhead_pass may know this torch.",
            stacklevel=3,  # where lmhead_pass is imported
        )
