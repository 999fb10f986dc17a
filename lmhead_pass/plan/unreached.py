"""Losses over logits that no head was followed to, or whose log-probabilities nobody understood.

They are left alone, and the user is told what was in the way.
"""

from collections.abc import Iterator, Sequence

import torch
from torch.fx import Graph, Node

from .. import config
from ..compat.graphs import tree_leaves
from ..graph import Refusal, Refused, at, canonical_op, describe, hint, tensor_of, value_of
from ..logits import Flow, class_count, is_head, is_loss, read_head
from .returned_plan import is_whole

_INPUT = (
    "the logits are an input of this graph: their head was compiled in another one, or not at all. "
    "Compile head and loss together, without a graph break between them (lmhead_pass.explain names "
    "it)"
)


def has_no_head(refusal: Refusal) -> bool:
    """Whether a loss is left alone because its logits come from outside of the graph."""
    return refusal.reason == _INPUT


def unreached(graph: Graph, flows: Sequence[Flow]) -> Iterator[Refusal]:
    """The losses in ``graph`` that no consumer of ``flows`` is or makes, and why.

    Of what one step keeps apart from its head, losses that say so are told of, or the first.
    """
    unsupported = {node: why for flow in flows for node, why in flow.unsupported.items()}
    told = {node for flow in flows if flow.losses for node in flow.unsupported}
    apart: dict[Node, list[Refusal]] = {}
    for node in _softmaxes_of_losses(graph):
        flow = next((flow for flow in flows if node in flow.claimed), None)
        if flow is None:
            step, why = _what_is_between(node, unsupported)
        elif flow.unsupported and not flow.losses:
            step, why = next(iter(flow.unsupported.items()))
            why = why or f"{describe(node)} goes to {describe(step)}{at(step)}"
        else:
            continue
        if (is_loss(node) or step not in told) and (why != _INPUT or is_whole(graph)):
            apart.setdefault(step, []).append(Refusal(node, why))
    for refusals in apart.values():
        yield from [r for r in refusals if is_loss(r.loss)] or refusals[:1]


def _softmaxes_of_losses(graph: Graph) -> Iterator[Node]:
    """Losses, and softmaxes over many words whose log is taken: by hand, a loss begins so."""
    found: set[Node] = set()
    for node in graph.nodes:
        softmax = _softmax_below(node) if canonical_op(node) == "log" else node
        if softmax is None or softmax in found:
            continue
        if canonical_op(softmax) in ("log_softmax", "logsumexp") or softmax is not node:
            try:
                if hint(class_count(softmax)) < config.min_vocab_size:
                    continue
            except Refused:
                continue
        elif not is_loss(softmax):
            continue
        found.add(softmax)
        yield softmax


def _softmax_below(log: Node) -> Node | None:
    """The softmax of which ``log`` is taken, or the ``exp`` whose sum it is taken of."""
    node, is_sum = _source(log), False
    while node is not None and not _is_product(node):
        if canonical_op(node) == "softmax" or (is_sum and canonical_op(node) == "exp"):
            return node
        is_sum |= canonical_op(node) == "sum"
        node = _source(node)
    return None


def way_up(loss: Node) -> Iterator[Node]:
    """``loss``, and what its logits are made of, up to a head, or to what has so many words."""
    try:
        words = hint(class_count(loss))
    except Refused:
        return
    node: Node | None = loss
    while node is not None:
        yield node
        source = None if _is_product(node) else _source(node)
        is_wide = source is not None and any(
            hint(size) >= words for tensor in _floating(source) for size in tensor.shape
        )
        node = source if is_wide or canonical_op(node) == "reshape" else None


def _is_product(node: Node) -> bool:
    return is_head(node) or canonical_op(node) == "product"


def _source(node: Node) -> Node | None:
    """The input of ``node`` that holds logits, if any does: the largest of those with a gradient,
    or of all if there are none."""

    def weight(source: Node) -> tuple[bool, int]:
        tensors = _floating(source)
        return any(t.requires_grad for t in tensors), max(hint(t.numel()) for t in tensors)

    return max(filter(_floating, node.all_input_nodes), key=weight, default=None)


def _floating(node: Node) -> list[torch.Tensor]:
    leaves = tree_leaves(value_of(node))
    return [v for v in leaves if isinstance(v, torch.Tensor) and v.is_floating_point()]


def _what_is_between(loss: Node, unsupported: dict[Node, str]) -> tuple[Node, str]:
    """The step that keeps ``loss`` apart from its head, and why: the first on the way up."""
    try:
        classes = class_count(loss)
        if hint(classes) < config.min_vocab_size:
            return loss, (
                f"{classes} classes are fewer than config.min_vocab_size ({config.min_vocab_size})"
            )
    except Refused as refused:
        return loss, str(refused)
    node = loss
    for node in way_up(loss):
        if unsupported.get(node):
            return node, unsupported[node]
        if is_head(node):
            return node, _why_no_head(node)
        if node in unsupported:
            break
    if node.op == "placeholder":
        return node, _INPUT
    return node, f"the logits come from {describe(node)}{at(node)}, which is not understood"


def _why_no_head(node: Node) -> str:
    try:
        read_head(node)
        tensor_of(node)
    except Refused as refused:
        return str(refused)
    return f"the logits come from {describe(node)}{at(node)}, which is not understood"
