"""Finds every loss over logits in a pre-grad graph: what to rewrite, or a refusal with its reason.

It follows the logits of each large linear layer forward, to everybody who reads them. If the op can
compute what all of these read, the logits are not needed. Otherwise all is left as it was.
"""

from collections import Counter
from collections.abc import Iterator

import torch
from torch.fx import Graph

from .. import config
from ..graph import Refusal, Refused, at, canonical_op, describe, in_inference, tensor_of
from ..logits import (
    Consumer,
    ConsumerKind,
    Flow,
    follow_heads,
    large_heads,
)
from .call_planning import plan_calls
from .compared import compared
from .returned_plan import (
    check_returned,
    is_whole,
    is_worth_deferring,
)
from .returned_views import views_among
from .types import Rewrite
from .unreached import unreached

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def find(graph: Graph, of_loss_alone: bool = True) -> list[Rewrite | Refusal]:
    """Everything in ``graph`` that computes a loss over logits, in the order of the heads.

    Unless ``of_loss_alone``, everything that reads logits and that the op can compute.
    """
    flows = follow_heads(large_heads(graph))
    claims = Counter(node for flow in flows for node in flow.claimed)
    found: list[Rewrite | Refusal] = []
    for flow in flows:
        losses = flow.losses if of_loss_alone else flow.consumers
        is_mixed = any(claims[node] > 1 for node in flow.claimed)
        try:
            if losses:
                _check_nobody_else(flow, is_mixed)
                check_derivatives(graph)
                found.append(_rewrite(flow))
            elif _only_leave(flow):
                found += _deferred(flow, is_mixed)
        except Refused as refused:
            if flow.returned and not is_whole(graph):
                continue  # who calls this part of a graph tells what becomes of its logits
            named = [
                consumer for consumer in flow.losses if consumer.kind is ConsumerKind.LOSS
            ] or flow.losses[:1]
            found += (Refusal(consumer.node, str(refused)) for consumer in named)
    return [*found, *unreached(graph, flows)]


def unread_heads(graph: Graph) -> Iterator[Flow]:
    """What becomes of the large linear layers in ``graph`` that no loss reads."""
    yield from (flow for flow in follow_heads(large_heads(graph)) if not flow.losses)


def _check_nobody_else(flow: Flow, is_mixed: bool) -> None:
    """Refused if something needs the logits that the op cannot compute."""
    for user, why in flow.unsupported.items():
        raise Refused(why or f"{describe(user)}{at(user)} reads the logits too")
    comparison = compared(flow.consumers)
    if comparison is not None:
        raise Refused(
            f"{describe(comparison)}{at(comparison)} asks whether two logits of a row are the same"
        )
    if is_mixed:
        raise Refused("the logits are mixed with those of another head")
    inference = in_inference(flow.head.node.graph)
    if flow.head.node in inference:
        for consumer in flow.consumers:
            if consumer.node not in inference:  # which is an error, or as good as one
                raise Refused(
                    "the head is inside torch.inference_mode in the compiled function, and "
                    f"{describe(consumer.node)}{at(consumer.node)} is not"
                )
    dtype = tensor_of(flow.head.node).dtype
    if dtype not in _DTYPES:
        raise Refused(f"{dtype} logits have no fused form")
    if flow.returned and config.returned_logits == "keep":
        raise Refused(
            "the compiled function returns the logits, or keeps them for code outside the graph, "
            "and config.returned_logits is 'keep'. Return the loss alone, or set it to 'lazy'"
        )


def check_derivatives(graph: Graph) -> None:
    """Refused if ``graph`` takes a derivative that the op does not have, or hides one."""
    for node in graph.nodes:
        if canonical_op(node) == "detach_":
            raise Refused(f"{describe(node)}{at(node)} hides what had a gradient before")
        if canonical_op(node) == "make_dual":
            raise Refused(f"{describe(node)}{at(node)} differentiates in forward mode")
        if node.target is torch.autograd.grad and (
            node.kwargs.get("create_graph") or any(node.args[4:5])
        ):
            raise Refused(f"{describe(node)}{at(node)} makes gradients to be differentiated again")


def _rewrite(flow: Flow) -> Rewrite:
    nodes = tuple(node for node in flow.head.node.graph.nodes if node in flow.nodes)
    returned = tuple(check_returned(logits) for logits in flow.returned)
    views = views_among(returned) if config.returned_logits == "lazy" else {}
    consumers, lazily = flow.consumers, returned
    if config.returned_logits == "detach":
        computed = [Consumer(logits.node, logits, ConsumerKind.RETURNED) for logits in returned]
        consumers, lazily = [*consumers, *computed], ()
    calls = plan_calls(consumers, returns_logits=bool(returned)) if consumers else ()
    return Rewrite(calls, lazily, views, nodes, flow.metadata_uses)


def _only_leave(flow: Flow) -> bool:
    """Whether these are a language model's logits, which leave the graph."""
    graph = flow.head.node.graph
    return (
        bool(flow.returned)
        and not flow.unsupported
        and config.returned_logits == "lazy"
        and is_whole(graph)
        and is_worth_deferring(flow)
    )


def _deferred(flow: Flow, is_mixed: bool) -> Iterator[Rewrite]:
    """A head of whose logits no loss is taken in the graph: they are returned lazily, if they can
    be. If not, nothing is lost, and there is nothing to tell."""
    try:
        _check_nobody_else(flow, is_mixed)
        check_derivatives(flow.head.node.graph)
        yield _rewrite(flow)
    except Refused:
        return
