"""Settings, as a torch config module: assign, ``patch(...)``, or set ``LMHEAD_PASS_<NAME>``.

    lmhead_pass.config.batch_chunk_size = 1024
    with lmhead_pass.config.patch(min_vocab_size=1000): ...
    LMHEAD_PASS_MEMORY_BUDGET=100000000 python train.py

Settings are read when a model is compiled, and belong to the thread that sets them (as torch's
own do from 2.13 on). Every one is part of the key of Inductor's caches. A bad value raises a
ValueError and a name that is not here an AttributeError; ``LMHEAD_PASS_`` before a name that is not
here is warned of.

min_vocab_size: int = 4096
    Heads with fewer words are left alone: classifiers, and heads too small to gain.

batch_chunk_size: int | None = None
    Rows of logits that exist at once. None: as many as ``memory_budget`` holds.

memory_budget: int | None = None
    Bytes that the logits which exist at once and the FP32 sum of the weight's gradient take in each
    call, at most. None: planned from the sizes of the head. Compiling raises a ValueError that says
    the least, if that is more.

returned_logits: str = "lazy"
    What a compiled function returns for the logits of a head. "lazy": a tensor that computes them
    when they are first read. "detach": the logits of a rewritten loss, computed and without a
    gradient. "keep": the logits as they were; a loss whose logits are returned is left alone.

strict: bool = False
    Whether a failure inside the pass is raised. Otherwise it is logged and the graph kept.
"""

import contextlib
import difflib
import os
import sys
import types
import typing
import warnings
from typing import Any

from .compat.settings import make_config_module

# Plain values in here, private ones too, are settings: what is none is a function.


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


def defaults() -> dict[str, Any]:
    """The value of each setting where nobody sets it."""
    return {
        "min_vocab_size": 4096,
        "batch_chunk_size": None,
        "memory_budget": None,
        "returned_logits": "lazy",
        "strict": False,
    }


def _setting(name: str) -> Any:
    """Return the value of setting ``name`` in the environment; its default if it is not there."""
    default = defaults()[name]
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


min_vocab_size: int = _setting("min_vocab_size")
batch_chunk_size: int | None = _setting("batch_chunk_size")
memory_budget: int | None = _setting("memory_budget")
returned_logits: str = _setting("returned_logits")
strict: bool = _setting("strict")

if typing.TYPE_CHECKING:  # torch's config modules have these

    class _Patch(contextlib.ContextDecorator, contextlib.AbstractContextManager[None]): ...

    def patch(
        arg1: str | dict[str, Any] | None = None, arg2: Any = None, **settings: Any
    ) -> _Patch: ...

    def get_config_copy() -> dict[str, Any]: ...


def _unknown(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    meant = f" Did you mean {near[0]}?" if near else ""
    return f"lmhead_pass.config: there is no {name}.{meant} There are {', '.join(names)}"


def _warn_of_unknown_variables(names: list[str]) -> None:
    known = [f"LMHEAD_PASS_{name.upper()}" for name in names]
    for name in sorted(os.environ):
        if name.startswith("LMHEAD_PASS_") and name not in known:
            warnings.warn(_unknown(name, known), stacklevel=3)


def _install() -> None:
    module = sys.modules[__name__]
    names = list(module.__annotations__)
    _warn_of_unknown_variables(names)
    make_config_module(module)
    base: Any = type(module)

    class CheckedConfig(base):  # type: ignore[misc]
        # Python and torch have names of their own, which begin with an underscore.
        def __setattr__(self, name: str, value: object) -> None:
            if name not in names and not name.startswith("_"):
                raise AttributeError(_unknown(name, names))
            super().__setattr__(name, _checked(name, value))

        def __getattr__(self, name: str) -> Any:
            if hasattr(base, "__getattr__") and (name in names or name.startswith("_")):
                return super().__getattr__(name)
            raise AttributeError(_unknown(name, names))

    # The module's own way to set an attribute knows settings only.
    types.ModuleType.__setattr__(module, "__class__", CheckedConfig)


_install()
