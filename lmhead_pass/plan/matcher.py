"""Finds every loss over logits in a pre-grad graph: what to rewrite, or a refusal with its reason.

It follows the logits of each large linear layer forward, to everybody who reads them. If the op can
compute what all of these read, the logits are not needed. Otherwise all is left as it was.
"""

from collections import Counter
from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from .. import config
from ..graph import Refusal, Refused, at, canonical_op, describe, hint, is_inference, tensor_of
from ..logits import (
    Consumer,
    ConsumerKind,
    Flow,
    class_count,
    follow_logits,
    is_head,
    is_loss,
    large_heads,
    read_head,
)
from .call_planning import plan_calls
from .returned_plan import (
    check_returned,
    check_together,
    ends_in_a_break,
    is_whole,
    is_worth_deferring,
)
from .types import Rewrite

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Consumers that make a loss. Others alone are no reason to rewrite a head.
_OF_A_LOSS = (ConsumerKind.LOSS, ConsumerKind.LOG_PROBABILITY, ConsumerKind.LOGSUMEXP)
_INPUT = (
    "the logits are an input of this graph: their head was compiled in another one, or not at all. "
    "Compile head and loss together, without a graph break between them (lmhead_pass.explain names "
    "it)"
)


def find(graph: Graph, of_loss_alone: bool = True) -> list[Rewrite | Refusal]:
    """Everything in ``graph`` that computes a loss over logits, in the order of the heads.

    Unless ``of_loss_alone``, everything that reads logits and that the op can compute.
    """
    flows = [follow_logits(head) for head in large_heads(graph)]
    claims = Counter(node for flow in flows for node in _claimed(flow))
    found: list[Rewrite | Refusal] = []
    for flow in flows:
        losses = [
            consumer
            for consumer in flow.consumers
            if consumer.kind in _OF_A_LOSS or not of_loss_alone
        ]
        try:
            if losses:
                _check_nobody_else(flow, any(claims[node] > 1 for node in _claimed(flow)))
                _check_derivatives(graph)
                found.append(_rewrite(flow))
            elif _only_leave(flow):
                found += _deferred(flow, any(claims[node] > 1 for node in _claimed(flow)))
            else:
                found += _unread_log_softmaxes(flow)
        except Refused as refused:
            if flow.returned and not is_whole(graph):
                continue  # who calls this part of a graph tells what becomes of its logits
            named = [
                consumer for consumer in losses if consumer.kind is ConsumerKind.LOSS
            ] or losses[:1]
            found += (Refusal(consumer.node, str(refused)) for consumer in named)
    served = {consumer.node for flow in flows for consumer in flow.consumers}
    unsupported = {node: why for flow in flows for node, why in flow.unsupported.items()}
    for node in graph.nodes:
        if is_loss(node) and node not in served:
            why = _why_no_flow_reached(node, unsupported)
            if is_whole(graph) or why is not _INPUT:
                found.append(Refusal(node, why))
    return found


def has_no_head(refusal: Refusal) -> bool:
    """Whether a loss is left alone because its logits come from outside of the graph."""
    return refusal.reason == _INPUT


def unread_heads(graph: Graph) -> Iterator[Flow]:
    """What becomes of the large linear layers in ``graph`` that no loss reads."""
    for head in large_heads(graph):
        flow = follow_logits(head)
        if not any(consumer.kind in _OF_A_LOSS for consumer in flow.consumers):
            yield flow


def _claimed(flow: Flow) -> set[Node]:
    return flow.nodes | {consumer.node for consumer in flow.consumers}


def _check_nobody_else(flow: Flow, is_mixed: bool) -> None:
    """Refused if something needs the logits that the op cannot compute."""
    for user, why in flow.unsupported.items():
        raise Refused(why or f"{describe(user)}{at(user)} reads the logits too")
    if is_mixed:
        raise Refused("the logits are mixed with those of another head")
    if is_inference(flow.head.node):
        for consumer in flow.consumers:
            if not is_inference(consumer.node):  # which is an error, or as good as one
                raise Refused(
                    "the head is inside torch.inference_mode in the compiled function, and "
                    f"{describe(consumer.node)}{at(consumer.node)} is not"
                )
    dtype = tensor_of(flow.head.node).dtype
    if dtype not in _DTYPES:
        raise Refused(f"the logits are {dtype}")
    if flow.returned and config.returned_logits == "keep":
        raise Refused(
            "the compiled function returns the logits, or keeps them for code outside the graph, "
            "and config.returned_logits is 'keep'. Return the loss alone, or set it to 'lazy'"
        )


def _check_derivatives(graph: Graph) -> None:
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
    if config.returned_logits == "lazy":
        check_together(returned)
    consumers, lazily = flow.consumers, returned
    if config.returned_logits == "detach":
        computed = [Consumer(logits.node, logits, ConsumerKind.RETURNED) for logits in returned]
        consumers, lazily = [*consumers, *computed], ()
    calls = plan_calls(consumers, returns_logits=bool(returned)) if consumers else ()
    return Rewrite(calls, lazily, nodes, flow.metadata_uses)


def _only_leave(flow: Flow) -> bool:
    """Whether these are a language model's logits, which leave the graph for good."""
    graph = flow.head.node.graph
    return (
        bool(flow.returned)
        and not flow.unsupported
        and config.returned_logits == "lazy"
        and is_whole(graph)
        and not ends_in_a_break(graph)
        and is_worth_deferring(flow)
    )


def _deferred(flow: Flow, is_mixed: bool) -> Iterator[Rewrite]:
    """A head of whose logits no loss is taken in the graph: they are returned lazily, if they can
    be. If not, nothing is lost, and there is nothing to tell."""
    try:
        _check_nobody_else(flow, is_mixed)
        _check_derivatives(flow.head.node.graph)
        yield _rewrite(flow)
    except Refused:
        return


def _unread_log_softmaxes(flow: Flow) -> Iterator[Refusal]:
    """A log_softmax of a head that no loss takes. It may be a loss in an unknown spelling."""
    for node in flow.nodes:
        if canonical_op(node) == "log_softmax" and flow.unsupported:
            user, why = next(iter(flow.unsupported.items()))
            yield Refusal(node, why or f"log_softmax goes to {describe(user)}{at(user)}")
            return


def _why_no_flow_reached(loss: Node, unsupported: dict[Node, str]) -> str:
    """Why no head was followed to ``loss``: the first reason on the way up from it."""
    try:
        classes = class_count(loss)
        if hint(classes) < config.min_vocab_size:
            return (
                f"{classes} classes are fewer than config.min_vocab_size ({config.min_vocab_size})"
            )
    except Refused as refused:
        return str(refused)
    if loss in unsupported:
        return unsupported[loss]
    node = loss.args[0] if loss.args else loss.kwargs["input"]
    while True:
        if unsupported.get(node):
            return unsupported[node]
        if is_head(node):
            return _why_no_head(node)
        if node in unsupported or not node.args or not isinstance(node.args[0], Node):
            break
        node = node.args[0]
    if node.op == "placeholder":
        return _INPUT
    return f"the logits come from {describe(node)}{at(node)}, which is not understood"


def _why_no_head(node: Node) -> str:
    try:
        read_head(node)
        tensor_of(node)
    except Refused as refused:
        return str(refused)
    return f"the logits come from {describe(node)}{at(node)}, which is not understood"
