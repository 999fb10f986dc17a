"""Follows logits from the head to where they leave the graph."""

from collections.abc import Iterator
from dataclasses import replace

from torch.fx import Graph, Node

from . import config, mutation
from .match import Head, Logits, Refused, Returned
from .rows import follow, is_step
from .spelling import describe, operation
from .tensors import tensor_of

_INSTEAD = "Return the loss alone, or set lmhead_pass.config.returned_logits to 'detach'"


def returned_logits(head: Head) -> tuple[Returned, ...]:
    """What of the head's logits leaves the graph after nothing but steps on rows and casts.

    Nothing if config.returned_logits is "keep". Refused if it is "lazy" and they cannot be.
    """
    if config.returned_logits == "keep":
        return ()
    paths = list(_paths((Logits(head.node, head.vocab_dim),)))
    if paths and config.returned_logits == "lazy":
        head = _head_for_later(head)
    return tuple(Returned(head, path[-1], tuple(logits.node for logits in path)) for path in paths)


def _paths(path: tuple[Logits, ...]) -> Iterator[tuple[Logits, ...]]:
    logits = path[-1]
    for reader in logits.node.users:
        if reader.op == "output" and not logits.are_log_probabilities:
            yield path
        elif is_step(reader) and reader.args and reader.args[0] is logits.node:
            try:
                after = follow(logits, reader)
            except Refused:
                continue  # it reads the logits in another way
            yield from _paths((*path, after))


def _head_for_later(head: Head) -> Head:
    """``head`` with an input of the graph as its weight; Refused if that would not do later."""
    if not _is_whole(head.node.graph):
        raise Refused(
            "the logits leave a part of the graph (gradient checkpointing, say) and not the "
            "compiled function itself. Return the loss alone"
        )
    weight, is_transposed = _input_weight(head)
    kept = [node for node in (head.hidden, weight, head.bias) if node is not None]
    for writer in mutation.writers(_after(head.node), of=kept):
        raise Refused(
            f"the logits are returned, and {describe(writer)} may change the head's input, weight "
            f"or bias in place, so that they cannot be computed afterwards. {_INSTEAD}"
        )
    return replace(head, weight=weight, weight_is_transposed=is_transposed)


def _is_whole(graph: Graph) -> bool:
    """Whether ``graph`` is what a compiled function runs, and not a part that it calls."""
    return "dynamo_compile_id" in graph.owning_module.meta


def _input_weight(head: Head) -> tuple[Node, bool]:
    """The graph's input that is the head's weight, and whether it is ``[H, V]``."""
    node, is_transposed = head.weight, head.weight_is_transposed
    while node.op == "call_function" or node.op == "call_method":
        source = node.args[0] if node.args else None
        if operation(node) == "permute" and isinstance(source, Node):
            before, after = tensor_of(source), tensor_of(node)
            if before.dim() == 2 and after.stride() == before.stride()[::-1]:
                node, is_transposed = source, not is_transposed
                continue
        # The products' dtype is known: what is cast to it before can be cast to it afterwards.
        if operation(node) == "cast" and tensor_of(node).dtype == tensor_of(head.node).dtype:
            node = source
            continue
        raise Refused(
            f"the logits are returned, and the head's weight is computed in the graph (by "
            f"{describe(node)}): to compute them afterwards, it would have to be kept. "
            f"{_INSTEAD}"
        )
    return node, is_transposed


def _after(node: Node) -> Iterator[Node]:
    while (node := node.next).op != "output":
        yield node
