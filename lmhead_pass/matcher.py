"""Finds every loss over logits in a pre-grad graph: a match, or a refusal with its reason.

From each loss up to the linear layer that feeds it, then down again, describing what happens to
the rows on the way; last, whether anybody else reads or writes what the rewrite takes away.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from . import config, mutation
from .chunking import plan_rows
from .heads import is_head, read_head
from .leaving import returned_logits
from .losses import check_fits, class_count, is_loss, read_loss
from .match import Head, Logits, Loss, Match, Refusal, Refused
from .rows import follow, is_step
from .source import place_of
from .spelling import describe, operation
from .tensors import hint, tensor_of

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def find(graph: Graph) -> list[Match | Refusal]:
    """Everything in ``graph`` that computes a loss over logits, in graph order."""
    losses = [node for node in graph.nodes if is_loss(node)]
    found = [_attempt(node) for node in losses]
    while readers := list(_other_readers(found)):
        for index, reader in readers:
            found[index] = Refusal(losses[index], _read_by(reader))
    return found + list(_unused_log_softmaxes(graph, losses))


def _attempt(node: Node) -> Match | Refusal:
    try:
        return _match(node)
    except Refused as refused:
        return Refusal(node, str(refused))


def _match(node: Node) -> Match:
    classes = class_count(node)
    if hint(classes) < config.min_vocab_size:
        raise Refused(
            f"{classes} classes are fewer than config.min_vocab_size ({config.min_vocab_size})"
        )
    loss = read_loss(node)
    path = _path(loss.logits)
    head = read_head(path[0])
    logits = Logits(path[0], head.vocab_dim)
    for step in path[1:]:
        logits = follow(logits, step)
    check_fits(loss, logits)
    _check_writers(head, loss)

    computed = tensor_of(head.node)
    vocab_size, hidden_size = computed.size(head.vocab_dim), tensor_of(head.hidden).size(-1)
    if computed.dtype not in _DTYPES:
        raise Refused(f"the logits are {computed.dtype}")
    differentiable = tensor_of(node).requires_grad and tensor_of(head.weight).requires_grad
    tokens = tensor_of(loss.target).numel()
    return Match(
        head=head,
        loss=loss,
        steps=logits.steps,
        path=tuple(path),
        tokens=tokens,
        vocab_size=vocab_size,
        compute_dtype=computed.dtype,
        rows_per_chunk=plan_rows(
            hint(hidden_size),
            hint(vocab_size),
            computed.dtype,
            computed.device,
            tokens=hint(tokens),
            gradient_dtype=tensor_of(head.weight).dtype if differentiable else torch.float32,
        ),
        returned=returned_logits(head),
    )


def _path(logits: Node) -> list[Node]:
    """The nodes from the head to ``logits``, both included."""
    path = [logits]
    while is_step(path[-1]):
        if not path[-1].args:
            raise Refused(f"{describe(path[-1])} is called with keywords only")
        path.append(path[-1].args[0])
    if not is_head(path[-1]):
        raise Refused(_not_a_head(path[-1]))
    return path[::-1]


def _not_a_head(node: Node) -> str:
    if node.op == "placeholder":
        return (
            f"the logits are an input of this graph ({node.target}): their head was compiled in "
            "another one, or not at all. Compile head and loss together, without a graph break "
            "between them (lmhead_pass.explain names it)"
        )
    return f"the logits come from {describe(node)}{_at(node)}, which is not understood"


def _check_writers(head: Head, loss: Loss) -> None:
    reads = [node for node in (head.hidden, head.weight, head.bias) if node is not None]
    for writer in mutation.writers(_between(head.node, loss.node), of=reads):
        raise Refused(
            f"{describe(writer)}{_at(writer)} may change the head's input, weight or bias in place "
            "between the head and the loss"
        )
    if loss.reduction == "none" and tensor_of(loss.node).requires_grad:
        # Its backward reads them again. That of the head as it is needs no bias, and the others
        # only for each other's gradients: there a write may be allowed.
        for writer in mutation.writers(_after(loss.node), of=reads):
            raise Refused(
                f"{describe(writer)}{_at(writer)} may change the head's input, weight or bias in "
                "place after the loss, and with reduction 'none' they are read in the backward"
            )


def _between(first: Node, last: Node) -> Iterator[Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


def _after(node: Node) -> Iterator[Node]:
    while (node := node.next).op != "output":
        yield node


def _other_readers(found: list[Match | Refusal]) -> Iterator[tuple[int, Node]]:
    """Matches with a node that somebody reads who is not part of any match: index and reader."""
    matches = [match for match in found if isinstance(match, Match)]
    edges = {edge for match in matches for path in _paths(match) for edge in pairwise(path)}
    for index, match in enumerate(found):
        if isinstance(match, Match):
            for node in {node for path in _paths(match) for node in path[:-1]}:
                for user in node.users:
                    uses = sum(leaf is node for leaf in tree_leaves((user.args, user.kwargs)))
                    if (node, user) not in edges or (uses > 1 and user.op != "output"):
                        yield index, user
                        break


def _paths(match: Match) -> Iterator[tuple[Node, ...]]:
    """From the head to each reader that the rewrite takes the logits from."""
    yield (*match.path, match.loss.node)
    for returned in match.returned:
        yield (*returned.path, match.loss.node.graph.output_node())


def _read_by(reader: Node) -> str:
    if reader.op == "output" and config.returned_logits != "keep":
        return "the compiled function returns log-probabilities. Return the loss alone"
    if reader.op == "output":
        return (
            "the compiled function returns the logits, or keeps them for code outside the graph, "
            "and config.returned_logits is 'keep'. Return the loss alone, or set it to 'lazy'"
        )
    return f"{describe(reader)}{_at(reader)} reads the logits too"


def _unused_log_softmaxes(graph: Graph, losses: list[Node]) -> Iterator[Refusal]:
    """A head's log_softmax that no loss takes: maybe a loss in a spelling that is not known."""
    taken: set[Node] = set()
    for loss in losses:
        node = loss.args[0] if loss.args else loss.kwargs["input"]
        while isinstance(node, Node) and node not in taken and (is_step(node) or is_head(node)):
            taken.add(node)
            node = node.args[0] if node.args else None
    for node in graph.nodes:
        if operation(node) == "log_softmax" and node not in taken:
            try:
                head = read_head(_path(node)[0])
                classes = tensor_of(head.node).size(head.vocab_dim)
            except Refused:
                continue  # not a head's
            if hint(classes) >= config.min_vocab_size:
                readers = " and ".join(describe(user) + _at(user) for user in node.users)
                yield Refusal(node, f"log_softmax goes to {readers or 'nobody'}, not to nll_loss")


def _at(node: Node) -> str:
    place = place_of(node)
    return f" at {place}" if place else ""
