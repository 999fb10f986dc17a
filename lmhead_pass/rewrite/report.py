"""Tells what the pass did: log lines, counters, and artifacts for tlparse."""

import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch.fx import Graph, Node

from .. import config
from ..compat.compiling import attempt, keep_artifact
from ..graph import Refusal, describe, hint, place_of, tensor_of
from ..log import REPORT_TO, TROUBLESHOOTING, count, log, tell
from ..logits import Logits
from ..plan import Match
from ..rowwise import Region


@dataclass(frozen=True)
class EmittedCall:
    """What is rewritten."""

    match: Match
    call: Match
    """What the op is called for: the match, or a sum that it goes into, perhaps with others."""
    nodes: list[Node]
    """The nodes of its call of the op."""

    @property
    def node(self) -> Node:
        """What it is named after."""
        return self.match.node


@dataclass(frozen=True)
class EmittedRegion:
    """A part of a graph that is run in chunks."""

    region: Region
    numbers: list[list[Node]]
    """For each call of the op the nodes of its results that have a gradient."""

    @property
    def node(self) -> Node:
        """What it is named after."""
        return self.region.node


def summary(item: EmittedCall | EmittedRegion | Refusal | Logits) -> str:
    """One sentence on what became of a loss, or of logits that leave without one, and why."""
    if isinstance(item, Refusal):
        return f"left alone: {_where(item.loss)}: {item.reason}"
    if isinstance(item, Logits):
        hidden, weight = tensor_of(item.head.hidden), tensor_of(item.head.weight)
        return (
            f"deferred: {_where(item.head.node)}: hidden {_type(hidden.shape, hidden.dtype)}, "
            f"weight {_type(weight.shape, weight.dtype)}; logits are returned lazily, computed if "
            "they are read; losses that are taken of them are rewritten then"
        )
    if isinstance(item, EmittedRegion):
        return _chunked(item.region)
    return _summary(item.match, item.call)


def _chunked(region: Region) -> str:
    """Of a region that is run in chunks."""
    heads, others = [], list(region.results)[1:]
    for head in region.heads:
        hidden, weight = tensor_of(head.hidden), tensor_of(head.weight)
        shape = weight.shape[::-1] if head.weight_is_transposed else weight.shape
        heads.append(
            f"hidden {_type(hidden.shape, hidden.dtype)}, weight {_type(shape, weight.dtype)}"
        )
    count = sum(len(call.part.steps) for call in region.calls)
    also = "".join(f", with {describe(node)}" for node in others)
    rows = min(call.rows_per_chunk for call in region.calls)
    return (
        f"rewritten: {_where(region.node)}{also}: {'; '.join(heads)}; chunked: {count} "
        f"operation{'s' * (count != 1)} on each row; {rows} rows per chunk; "
        f"{_avoided_by(region, rows)}"
    )


def _avoided_by(region: Region, rows: int) -> str:
    """What does not exist of the logits of a region: all but a chunk."""
    per_token = sum(
        hint(head.vocab_size) * tensor_of(head.node).dtype.itemsize for head in region.heads
    )
    name = _name(tensor_of(region.heads[0].node).dtype)
    if not isinstance(region.tokens, int):
        return f"{per_token / 1e3:,.1f} kB of {name} logits avoided for each token beyond a chunk"
    avoided = per_token * (region.tokens - rows)
    if avoided <= 0:
        return f"no logits avoided: all {region.tokens} rows are one chunk"
    return f"{avoided / 1e6:,.1f} MB of {name} logits avoided"


def log_line(item: EmittedCall | EmittedRegion | Refusal | Logits) -> str:
    """The summary, with the page that helps if a loss is left alone."""
    page = f" [{TROUBLESHOOTING}#left-alone]" if isinstance(item, Refusal) else ""
    return summary(item) + page


def _where(node: Node) -> str:
    return f"{describe(node)} at {place_of(node) or 'unknown place'}"


def _summary(match: Match, call: Match) -> str:
    head = match.logits.head
    hidden, weight = tensor_of(head.hidden), tensor_of(head.weight)
    # Not from a transposed view: where the weight is written to later, autograd refuses one.
    shape = weight.shape[::-1] if head.weight_is_transposed else weight.shape
    also = "".join(f", with {describe(consumer.node)}" for consumer in match.consumers[1:])
    return (
        f"rewritten: {_where(match.node)}{also}: hidden {_type(hidden.shape, hidden.dtype)}, "
        f"weight {_type(shape, weight.dtype)}, reduction {_reduction(match, call)}; "
        f"{call.chunks.rows} rows per chunk{_blocks(call)}; {_avoided(match, call)}"
        f"{_returned(match)}"
    )


def _blocks(call: Match) -> str:
    words = call.chunks.words
    return "" if words is None else f", the weight's gradient {words} words at a time"


def _reduction(match: Match, call: Match) -> str:
    """What the losses come to, and how the call that they are part of makes it."""
    consumer = match.consumers[0]
    reduction = "sum" if consumer.is_summed else consumer.reduction
    if call.reduction == "sum" and reduction == "none":
        reduction = "a weighted sum"
    if hint(call.tokens) != hint(match.tokens):
        reduction += ", in one call with others"
    if call.reduction == "none" and match.differentiable:
        reduction += ", logits computed again in the backward"
    return reduction


def rewritten(call: EmittedCall | EmittedRegion) -> None:
    """Report what is about to replace a match, or a part of the graph."""
    if not _is_news(summary(call)):
        return
    tell(summary(call))
    if isinstance(call, EmittedRegion):
        before = _lines(call.region.nodes)
        after = "\n".join(str(one.part) for one in call.region.calls)
    else:
        match = call.match
        nodes = (match.logits.head.node, *(consumer.node for consumer in match.consumers))
        before, after = _lines(nodes), _lines(call.nodes)
    log.debug("before:\n%s\nafter:\n%s", before, after)
    keep_artifact("lmhead_pass_before", before)
    keep_artifact("lmhead_pass_after", after)


def deferred(logits: Logits) -> None:
    """Report logits that leave a graph without a loss."""
    if _is_news(summary(logits)):
        tell(summary(logits))


def refused(refusal: Refusal) -> None:
    """Report a loss that is left alone."""
    if _is_news(summary(refusal)):
        tell(log_line(refusal))


def nothing_found(graph: Graph) -> None:
    """Report a compiled function without a loss over logits."""
    places = (place for node in reversed(graph.nodes) if (place := place_of(node)) is not None)
    place = next(places, None)
    text = (
        f"nothing to rewrite in the graph that ends {f'at {place}' if place else 'nowhere known'}: "
        "no loss over logits reached it, and no head's logits leave it. If that is not what you "
        "expect, lmhead_pass.explain(model, *inputs) says what keeps head and loss apart "
        f"[{TROUBLESHOOTING}#nothing-is-logged]"
    )
    if _is_news(text):
        log.info("%s", text)


def left_to_eager(node: Node, why: str) -> None:
    """Report a function that is run as it is, not compiled."""
    text = f"left to eager: the function with {_where(node)}: {why}"
    if _is_news(text):
        log.info("%s", text)


def failure(error: Exception) -> None:
    """Report that the pass failed and left a graph as it was; raise it if ``config.strict``."""
    if config.strict:
        raise RuntimeError(
            "lmhead_pass failed on a graph, which lmhead_pass.config.strict has it raise; "
            f"otherwise the graph is left as it was. {type(error).__name__}: {error}"
        ) from error
    count("failed")
    log.warning(
        "lmhead_pass failed on a graph and left it as it was. The result is right; memory is not "
        "saved. Please report this at %s, with what `python -m lmhead_pass env` prints:\n%s",
        *(REPORT_TO, "".join(traceback.format_exception(error))),
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


def _avoided(match: Match, call: Match) -> str:
    """What does not exist of the logits: all but the match's share of a chunk of the call."""
    dtype = _name(match.compute_dtype)
    if not isinstance(call.tokens, int):
        per_token = hint(match.vocab_size) * match.compute_dtype.itemsize
        return f"{per_token / 1e3:,.1f} kB of {dtype} logits avoided for each token beyond a chunk"
    avoided = match.logits_bytes * (1 - call.chunk_bytes / max(1, call.logits_bytes))
    if avoided <= 0:
        return f"no logits avoided: all {call.tokens} rows are one chunk"
    return f"{avoided / 1e6:,.1f} MB of {dtype} logits avoided"
