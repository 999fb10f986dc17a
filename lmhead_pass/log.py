"""The package's log and counters, and what is told again of a graph that comes from a cache.

From torch 2.13 on, a process that finds a compiled graph in a cache does not call the pass. So the
calls in a rewritten graph carry a note of what was told when it was compiled, and the first one
that runs in another process tells it there. What was left alone has no such call: of each graph is
told that it comes from a cache, too.
"""

import logging
import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote, unquote

from .compat.compiling import attempt, compile_id, counters

log = logging.getLogger("lmhead_pass")

REPORT_TO = "https://github.com/lmhead-pass/lmhead_pass/issues"
"""Where failures of the package are told."""

TROUBLESHOOTING = "docs/troubleshooting.md"
"""The page that says what to do about a loss that is left alone."""

# How a line begins, and what it counts as.
_EVENTS = {"rewritten": "rewritten", "left alone": "refused", "deferred": "deferred"}
_ANY_PATH = "surrogateescape"  # names of files need not be UTF-8
# Code that is generated has notes in it as they are, in Python or C++: no quotes, no backslashes.
_AS_IT_IS = " !#$&()*+,-./:;<=>?@[]^_`{|}~"

_told: set[str] = set()
"""Notes of which this process has told already."""
_telling = threading.Lock()

_seen: weakref.WeakKeyDictionary[object, list[str]] = weakref.WeakKeyDictionary()
"""For each compilation under way, what to say at its end: nothing, if the pass has seen it."""


def tell(line: str) -> None:
    """Log ``line`` and count it as what it begins with."""
    count(_EVENTS[line.partition(":")[0]])
    log.info("%s", line)


def count(event: str) -> None:
    counters()["lmhead_pass"][event] += 1


def note_of(lines: Iterable[str]) -> str:
    """A note of ``lines``, which this process has told."""
    note = quote(
        "\n".join(" ".join(line.split("\n")) for line in lines), _AS_IT_IS, errors=_ANY_PATH
    )
    _told.add(note)
    return note


def tell_from_cache(note: str) -> None:
    """Tell what ``note`` says, unless this process has. An op's kernel calls this in each run."""
    if note in _told:
        return
    with _telling:
        if note in _told:
            return
        _told.add(note)
    for line in unquote(note, errors=_ANY_PATH).split("\n"):
        tell(f"{line} (from a cache)")


def pass_is_called() -> None:
    """Note that the pass sees a graph of the compilation under way."""
    if (current := attempt()) is not None:
        _seen.setdefault(current[0], []).clear()


def cache_is_asked() -> None:
    """Note that a cache is asked for a graph: if it has one, the pass is not called."""
    if (current := attempt()) is None or current[0] in _seen:
        return
    _seen[current[0]] = unseen = [
        f"from a cache: graph {compile_id(current[0])}, at which the pass has not looked again. "
        "What is rewritten in it is told when it first runs; if nothing is, "
        "lmhead_pass.explain(model, *inputs) says why"
    ]
    weakref.finalize(current[0], _tell_unseen, unseen).atexit = False


def _tell_unseen(lines: list[str]) -> None:
    for line in lines:
        log.info("%s", line)


@dataclass(frozen=True)
class _Once:
    """Lets a handler pass over what a handler of the root logger writes to the same stream.

    With ``TORCH_LOGS`` torch adds one to this package's logger, and ``logging.basicConfig`` one to
    the root.
    """

    handler: logging.Handler

    def filter(self, record: logging.LogRecord) -> bool:
        stream = getattr(self.handler, "stream", None)
        return stream is None or not any(
            getattr(root, "stream", None) is stream and record.levelno >= root.level
            for root in logging.getLogger().handlers
        )


def _tell_once(record: logging.LogRecord) -> bool:
    """A filter of the logger: handlers may be added at any time."""
    for handler in log.handlers if log.propagate else ():
        handler.addFilter(_Once(handler))
    return True


log.addFilter(_tell_once)
