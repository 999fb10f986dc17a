"""Heads whose loss a library computes in a call of its own: there are no logits to avoid."""

from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from .. import config
from ..compat.graphs import autograd_function_call, namespace_of
from ..graph import Place, describe, hint, place_of, value_of

_PLAIN = ("aten", "prims", "prim", "lmhead_pass")


def fused_elsewhere(graph: Graph) -> Iterator[str]:
    """A sentence for each call that takes hidden states, a head's weight and targets."""
    for node in graph.nodes:
        if is_opaque(node) and (words := _words_of_head(node)):
            yield (
                f"already fused: {at(place_of(node))}{name_of(node)} takes hidden states, a weight "
                f"of {words} words and targets, and returns no logits"
            )


def is_opaque(node: Node) -> bool:
    """Whether ``node`` calls an autograd.Function or a custom op."""
    if (namespace := namespace_of(node.target)) is not None:
        return namespace not in _PLAIN
    return node.op == "call_function" and node.target is autograd_function_call()


def name_of(node: Node) -> str:
    """What an opaque call is, in words."""
    if node.target is autograd_function_call():
        return "an autograd.Function"
    return f"the custom op {describe(node)}"


def at(place: Place | None) -> str:
    return f"{place}: " if place else ""


def _words_of_head(node: Node) -> int:
    """How many words the weight among the arguments has; 0 if that is no fused loss."""
    tensors = [t for t in map(value_of, node.all_input_nodes) if isinstance(t, torch.Tensor)]
    if not any(t.dim() > 0 and _is_whole_numbers(t) for t in tensors):
        return 0
    floats = [t for t in tensors if t.dim() > 1 and t.is_floating_point()]
    for weight in floats:
        words, size = (hint(n) for n in weight.shape[:2])
        others = (t for t in floats if t is not weight)
        if (
            weight.dim() == 2
            and words >= config.min_vocab_size
            and any(hint(t.size(-1)) == size for t in others)
            and not any(words in map(hint, t.shape) for t in _results(node))
        ):
            return words
    return 0


def _is_whole_numbers(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.int64, torch.int32)


def _results(node: Node) -> list[torch.Tensor]:
    """What the call returns to its users: torch 2.11 adds what its backward needs."""
    is_one = isinstance(value_of(node), torch.Tensor)
    values = [value_of(n) for n in ((node,) if is_one else node.users)]
    return [each for each in values if isinstance(each, torch.Tensor)]
