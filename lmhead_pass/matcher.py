"""Finds every loss over logits in a pre-grad graph: what to rewrite, or a refusal with its reason.

From each linear layer forward, to everybody who reads what it computes (``flow.py``). If the op can
serve them all, the logits are not needed; if there is a stranger among them, they are, and all is
left as it was.
"""

from collections import Counter
from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from . import config
from .calls import plan_calls
from .flow import Flow, follow_logits
from .heads import is_head, read_head
from .leaving import check_returned, is_whole
from .losses import class_count, is_loss
from .match import Head, Reader, Refusal, Refused, Rewrite
from .source import at
from .spelling import describe, operation
from .tensors import hint, is_inference, tensor_of

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Readers that make a loss. Others alone are no reason to rewrite a head.
_OF_A_LOSS = ("loss", "log_probability", "logsumexp")
_INPUT = (
    "the logits are an input of this graph: their head was compiled in another one, or not at all. "
    "Compile head and loss together, without a graph break between them (lmhead_pass.explain names "
    "it)"
)


def find(graph: Graph) -> list[Rewrite | Refusal]:
    """Everything in ``graph`` that computes a loss over logits, in the order of the heads."""
    flows = [follow_logits(head) for head in heads(graph)]
    claims = Counter(node for flow in flows for node in _claimed(flow))
    found: list[Rewrite | Refusal] = []
    for flow in flows:
        losses = [reader for reader in flow.readers if reader.kind in _OF_A_LOSS]
        try:
            if losses:
                _check_nobody_else(flow, any(claims[node] > 1 for node in _claimed(flow)))
                _check_derivatives(graph)
                found.append(_rewrite(flow))
            else:
                found += _unread_log_softmaxes(flow)
        except Refused as refused:
            if flow.returned and not is_whole(graph):
                continue  # who calls this part of a graph tells what becomes of its logits
            named = [reader for reader in losses if reader.kind == "loss"] or losses[:1]
            found += (Refusal(reader.node, str(refused)) for reader in named)
    served = {reader.node for flow in flows for reader in flow.readers}
    strangers = {node: why for flow in flows for node, why in flow.strangers.items()}
    for node in graph.nodes:
        if is_loss(node) and node not in served:
            why = _why_no_flow_reached(node, strangers)
            if is_whole(graph) or why is not _INPUT:
                found.append(Refusal(node, why))
    return found


def has_no_head(refusal: Refusal) -> bool:
    """Whether a loss is left alone because its logits come from outside of the graph."""
    return refusal.reason == _INPUT


def unread_heads(graph: Graph) -> Iterator[Flow]:
    """What becomes of the large linear layers in ``graph`` that no loss reads."""
    for head in heads(graph):
        flow = follow_logits(head)
        if not any(reader.kind in _OF_A_LOSS for reader in flow.readers):
            yield flow


def _claimed(flow: Flow) -> set[Node]:
    return flow.nodes | {reader.node for reader in flow.readers}


def heads(graph: Graph) -> Iterator[Head]:
    """The linear layers in ``graph`` that are large enough."""
    for node in graph.nodes:
        if is_head(node):
            try:
                head = read_head(node)
                vocab = hint(tensor_of(node).size(head.vocab_dim))
            except Refused:
                continue  # a loss that it feeds tells why
            if vocab >= config.min_vocab_size:
                yield head


def _check_nobody_else(flow: Flow, is_mixed: bool) -> None:
    """Refused if the logits are needed for other than what the op computes."""
    for stranger, why in flow.strangers.items():
        raise Refused(why or f"{describe(stranger)}{at(stranger)} reads the logits too")
    if is_mixed:
        raise Refused("the logits are mixed with those of another head")
    if is_inference(flow.head.node):
        for reader in flow.readers:
            if not is_inference(reader.node):  # which is an error, or as good as one
                raise Refused(
                    "the head is inside torch.inference_mode in the compiled function, and "
                    f"{describe(reader.node)}{at(reader.node)} is not"
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
        if describe(node) == "detach_":
            raise Refused(f"{describe(node)}{at(node)} hides what had a gradient before")
        if describe(node) == "_make_dual":
            raise Refused(f"{describe(node)}{at(node)} differentiates in forward mode")
        if node.target is torch.autograd.grad and (
            node.kwargs.get("create_graph") or any(node.args[4:5])
        ):
            raise Refused(f"{describe(node)}{at(node)} makes gradients to be differentiated again")


def _rewrite(flow: Flow) -> Rewrite:
    nodes = tuple(node for node in flow.head.node.graph.nodes if node in flow.nodes)
    returned = tuple(check_returned(logits) for logits in flow.returned)
    if config.returned_logits == "lazy":
        return Rewrite(plan_calls(flow.readers, bool(returned)), returned, nodes, flow.facts)
    computed = [Reader(logits.node, logits, "returned") for logits in returned]
    return Rewrite(plan_calls([*flow.readers, *computed], bool(returned)), (), nodes, flow.facts)


def _unread_log_softmaxes(flow: Flow) -> Iterator[Refusal]:
    """A head's log_softmax that no loss takes: maybe a loss in a spelling that is not known."""
    for node in flow.nodes:
        if operation(node) == "log_softmax" and flow.strangers:
            stranger, why = next(iter(flow.strangers.items()))
            yield Refusal(node, why or f"log_softmax goes to {describe(stranger)}{at(stranger)}")
            return


def _why_no_flow_reached(loss: Node, strangers: dict[Node, str]) -> str:
    """Why the logits of ``loss`` are no head's: what was met on the way up."""
    try:
        classes = class_count(loss)
        if hint(classes) < config.min_vocab_size:
            return (
                f"{classes} classes are fewer than config.min_vocab_size ({config.min_vocab_size})"
            )
    except Refused as refused:
        return str(refused)
    if loss in strangers:
        return strangers[loss]
    node = loss.args[0] if loss.args else loss.kwargs["input"]
    while True:
        if strangers.get(node):
            return strangers[node]
        if is_head(node):
            return _why_no_head(node)
        if node in strangers or not node.args or not isinstance(node.args[0], Node):
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
