"""What a rewritten function is checked for: results as near to FP64 as those of the unfused one."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from . import reference
from .backend import rewrite


def check(
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    compiled: Callable[..., Tensor] | None = None,
) -> None:
    """``function`` is rewritten, once, and is no worse than eager against FP64."""
    compiled = compiled or rewrite(function)
    exact = reference.run(function, reference.doubles(tensors))
    eager = reference.run(function, list(map(reference.leaf, tensors)))
    results = reference.run(compiled, tensors)
    assert counters["lmhead_pass"] == {"rewritten": 1}
    reference.assert_no_worse(results, eager, exact, tensors[0].dtype)
    assert [r.dtype for r in results] == [r.dtype for r in eager]


def first_of(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """``function``, without what it returns beside the loss."""

    def run(*args: Any) -> Tensor:
        result = function(*args)
        return result[0] if isinstance(result, tuple) else result

    return run


def assert_left_alone(
    function: Callable[..., Any], tensors: Sequence[Tensor], reason: str, caplog: Any
) -> None:
    """``function`` is not rewritten, the log says why, and its result is that of eager."""
    with caplog.at_level("INFO", logger="lmhead_pass"):
        result = rewrite(function)(*tensors)
    assert counters["lmhead_pass"] == {"refused": 1}
    assert re.search(reason, caplog.text), caplog.text
    torch.testing.assert_close(result, function(*tensors), equal_nan=True)


def assert_as_eager(
    function: Callable[..., Any], tensors: Sequence[Tensor], compiled: Callable[..., Any]
) -> None:
    """``compiled`` leaves nothing alone, and its loss is no worse than that of ``function``."""
    exact = reference.run(first_of(function), reference.doubles(tensors))
    eager = reference.run(first_of(function), list(map(reference.leaf, tensors)))
    results = reference.run(first_of(compiled), tensors)
    assert counters["lmhead_pass"]["refused"] == 0
    reference.assert_no_worse(results, eager, exact, torch.float32)
