"""The torch library ``lmhead_pass``, with types: how the package's ops are registered."""

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("lmhead_pass", "DEF")  # type: ignore[no-untyped-call]


def define(schema: str, kernel: Callable[..., Any], key: str = "CompositeExplicitAutograd") -> None:
    """Define the op of ``schema`` ("name(arguments) -> results") with its kernel."""
    _library.define(schema)  # type: ignore[no-untyped-call]
    add_kernel(schema[: schema.index("(")], kernel, key)


def add_kernel(name: str, kernel: Callable[..., Any], key: str) -> None:
    """Register ``kernel`` for the dispatch key ``key`` of a defined op."""
    _library.impl(name, kernel, key)  # type: ignore[no-untyped-call]


def add_fake_kernel(name: str, kernel: Callable[..., Any]) -> None:
    """Register what gives the shapes and dtypes of a defined op's results."""
    torch.library.register_fake(f"lmhead_pass::{name}", kernel, lib=_library)
