"""Looks up private names of torch. Where a torch lacks one, the log tells what is off."""

import contextlib
import functools
import logging
from collections.abc import Iterable
from pkgutil import resolve_name
from typing import Any

import torch

# What may be off, as the log says it.
NO_REWRITE = "no graph is rewritten"
NO_LAZY_LOGITS = (
    "a loss is left alone if its logits are returned, unless config.returned_logits is 'detach'"
)
NO_ROWWISE = "losses that have no fused form are left alone"

log = logging.getLogger("lmhead_pass")
_missing: dict[str, list[str]] = {}


@functools.cache
def find(name: str, without: str) -> Any:
    """Return what torch calls ``name``. If it has no such name, report that and return None.

    ``without`` says what is off then.
    """
    try:
        return resolve_name(name)
    except (ImportError, AttributeError):
        report_missing(name, without)
        return None


def find_any(names: Iterable[str], without: str) -> tuple[Any, ...]:
    """Return all that torch has of ``names``. If it has none, report the last and return ()."""
    found = []
    for name in names:
        with contextlib.suppress(ImportError, AttributeError):
            found.append(resolve_name(name))
    if not found:
        report_missing(name, without)
    return tuple(found)


def report_missing(name: str, without: str) -> None:
    """Log, once, that torch has no ``name`` and that this turns something off."""
    names = _missing.setdefault(without, [])
    if name not in names:
        names.append(name)
        log.warning(
            "torch %s has no %s: %s. A newer lmhead_pass may know this torch",
            *(torch.__version__, name, without),
        )


def missing(without: str) -> str | None:
    """Name what torch was found to lack such that ``without``; None if it lacks nothing."""
    return ", ".join(_missing.get(without, [])) or None


def all_missing() -> dict[str, str]:
    """What torch was found to lack, by what is off without it."""
    return {without: ", ".join(names) for without, names in _missing.items()}
