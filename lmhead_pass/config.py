"""Settings, as a torch config module: assign, ``patch(...)``, or set ``LMHEAD_PASS_<NAME>``.

    lmhead_pass.config.batch_chunk_size = 1024
    with lmhead_pass.config.patch(min_vocab_size=1000): ...
    LMHEAD_PASS_MEMORY_BUDGET=100000000 python train.py

Settings are read when a model is compiled, and belong to the thread that sets them (as torch's
own do from 2.13 on). Every one is part of the key of Inductor's caches.
"""

import contextlib
import os
import sys
import types
from typing import Any

from .compat.settings import make_config_module


def _checked(name: str, value: Any) -> Any:
    """Return ``value``; raise ValueError if setting ``name`` does not take it."""
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    takes, good = {
        "min_vocab_size": ("an integer of at least 1", whole),
        "batch_chunk_size": ("an integer of at least 1 (rows), or None", whole or value is None),
        "memory_budget": ("an integer of at least 1 (bytes), or None", whole or value is None),
        "returned_logits": ("'lazy', 'detach' or 'keep'", value in ("lazy", "detach", "keep")),
        "strict": ("True or False", isinstance(value, bool)),
    }.get(name, ("", True))
    if not good:
        raise ValueError(f"lmhead_pass.config.{name} takes {takes}; got {value!r}")
    return value


def _setting(name: str, default: Any) -> Any:
    """Return the value of setting ``name`` in the environment; ``default`` if it is not there."""
    text = os.environ.get(f"LMHEAD_PASS_{name.upper()}")
    if text is None:
        return default
    words: dict[str, object] = {"": None, "none": None}
    if isinstance(default, bool):
        words = {"0": False, "false": False, "1": True, "true": True}
    value = words.get(text.lower(), text)
    if isinstance(value, str) and not isinstance(default, str | bool):
        with contextlib.suppress(ValueError):  # the check says what the setting takes
            value = int(value)
    return _checked(name, value)


min_vocab_size: int = _setting("min_vocab_size", 4096)
"""Heads with fewer words are left alone: classifiers, and heads too small to gain."""

batch_chunk_size: int | None = _setting("batch_chunk_size", None)
"""Rows of logits that exist at once. None: as many as ``memory_budget`` holds."""

memory_budget: int | None = _setting("memory_budget", None)
"""Bytes that the logits which exist at once and the FP32 sum of the weight's gradient take in each
call, at most. None: planned from the sizes of the head. Compiling raises a ValueError that says the
least, if that is more."""

returned_logits: str = _setting("returned_logits", "lazy")
"""What a compiled function returns for the logits of a head.

"lazy": a tensor that computes them when they are first read. "detach": the logits of a rewritten
loss, computed and without a gradient. "keep": the logits as they were; a loss whose logits are
returned is left alone.
"""

strict: bool = _setting("strict", False)
"""Whether a failure inside the pass is raised. Otherwise it is logged and the graph kept."""


def _install() -> None:
    module = sys.modules[__name__]
    make_config_module(module)

    class CheckedConfig(type(module)):  # type: ignore[misc]
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, _checked(name, value))

    # The module's own way to set an attribute knows settings only.
    types.ModuleType.__setattr__(module, "__class__", CheckedConfig)


_install()
