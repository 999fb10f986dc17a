"""Tells what the pass did: log lines, counters, and artifacts for tlparse."""

import logging
import traceback
from collections.abc import Iterable
from weakref import WeakKeyDictionary

import torch
from torch.fx import Node

from .. import config
from ..compat.compiling import attempt, counters, keep_artifact
from ..graph import Refusal, describe, hint, place_of, tensor_of
from ..plan import Match

log = logging.getLogger("lmhead_pass")


def summary(item: Match | Refusal) -> str:
    """One sentence on what became of a loss, and why."""
    node = item.loss if isinstance(item, Refusal) else item.node
    where = f"{describe(node)} at {place_of(node) or 'unknown place'}"
    if isinstance(item, Refusal):
        return f"left alone: {where}: {item.reason}"
    head = item.logits.head
    hidden, weight = tensor_of(head.hidden), tensor_of(head.weight)
    # Not from a transposed view: where the weight is written to later, autograd refuses one.
    shape = weight.shape[::-1] if head.weight_is_transposed else weight.shape
    also = "".join(f", with {describe(consumer.node)}" for consumer in item.consumers[1:])
    return (
        f"rewritten: {where}{also}: hidden {_type(hidden.shape, hidden.dtype)}, "
        f"weight {_type(shape, weight.dtype)}, {_how(item)}; {item.rows_per_chunk} rows per chunk; "
        f"{_avoided(item)} of {_name(item.compute_dtype)} logits avoided{_returned(item)}"
    )


def _how(match: Match) -> str:
    if match.linear_reduction is not None:
        return "reduction a weighted sum"
    return f"reduction {match.consumers[0].reduction}"


def rewritten(match: Match, inserted: Iterable[Node]) -> None:
    """Report a match about to be replaced by the nodes ``inserted``."""
    if not _is_news(summary(match)):
        return
    _count("rewritten")
    log.info("%s", summary(match))
    before = _lines((match.logits.head.node, *(consumer.node for consumer in match.consumers)))
    after = _lines(inserted)
    log.debug("before:\n%s\nafter:\n%s", before, after)
    keep_artifact("lmhead_pass_before", before)
    keep_artifact("lmhead_pass_after", after)


def refused(refusal: Refusal) -> None:
    """Report a loss that is left alone."""
    if _is_news(summary(refusal)):
        _count("refused")
        log.info("%s", summary(refusal))


def failure(error: Exception) -> None:
    """Report that the pass failed and left a graph as it was."""
    _count("failed")
    log.warning(
        "lmhead_pass failed on a graph and left it as it was. The result is right; memory is not "
        "saved. Please report this:\n%s",
        "".join(traceback.format_exception(error)),
    )


# What the attempts before the current one told, for each compilation under way.
_told: WeakKeyDictionary[object, dict[int, list[str]]] = WeakKeyDictionary()


def _is_news(text: str) -> bool:
    """Whether ``text`` was not yet told: Dynamo may start a compilation over, graph and all."""
    current = attempt()
    if current is None:
        return True
    context, number = current
    attempts = _told.setdefault(context, {})
    now = attempts.setdefault(number, [])
    now.append(text)
    earlier = max((told.count(text) for n, told in attempts.items() if n != number), default=0)
    return now.count(text) > earlier


def _count(event: str) -> None:
    counters()["lmhead_pass"][event] += 1


def _lines(nodes: Iterable[Node]) -> str:
    return "\n".join(str(node.format_node()) for node in nodes)


def _type(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{list(shape)} {_name(dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _returned(match: Match) -> str:
    if not match.returns_logits:
        return ""
    how = {"lazy": "lazily, computed if they are read", "detach": "computed, without a gradient"}
    return f"; logits are returned {how[config.returned_logits]}"


def _avoided(match: Match) -> str:
    per_token = hint(match.vocab_size) * match.compute_dtype.itemsize
    if isinstance(match.tokens, int):
        return f"{match.tokens * per_token / 1e6:,.1f} MB"
    return f"{per_token / 1e3:,.1f} kB per token"
