"""Numbers of one head's logits that are compared with each other.

The op's log-probability of a word and its largest logit are rounded in ways of their own. To
compare them asks whether they are the same logit: ``logits.gather(-1, words) == logits.amax(-1)``.
"""

from collections.abc import Iterator, Sequence

from torch.fx import Node

from ..graph import canonical_op, describe
from ..logits import Consumer, ConsumerKind

_PICKED = (
    *(ConsumerKind.LOGIT, ConsumerKind.LOG_PROBABILITY, ConsumerKind.PROBABILITY),
    ConsumerKind.LOSS,
)
_LARGEST = ConsumerKind.MAX, ConsumerKind.TOPK_VALUES

_COMPARING = (
    *("eq", "ne", "gt", "ge", "lt", "le", "equal", "not_equal"),
    *("greater", "greater_equal", "less", "less_equal"),
)
# What two numbers that are equal go through, and are equal still, or what tells whether they are.
_KEEPING = {
    *("cast", "reshape", "permute", "getitem", "select", "narrow", "index_select", "expand"),
    *("neg", "add", "sub"),
}


def compared(consumers: Sequence[Consumer]) -> Node | None:
    """A node that compares a word's number with the largest of its row, or with another word's."""
    seen: dict[Node, list[Consumer]] = {}
    for consumer in consumers:
        if consumer.kind in (*_PICKED, *_LARGEST) and _is_of_each_row(consumer):
            for node in dict.fromkeys(_comparisons(consumer.node)):
                seen.setdefault(node, []).append(consumer)
    return next((node for node, found in seen.items() if _may_be_equal(found)), None)


def _is_of_each_row(consumer: Consumer) -> bool:
    return consumer.reduction == "none" and not consumer.is_summed


def _comparisons(node: Node) -> Iterator[Node]:
    """The nodes that compare ``node``, as it is, with something."""
    pending, known = [node], {node}
    while pending:
        for user in pending.pop().users:
            if describe(user).strip("_") in _COMPARING:
                yield user
            elif canonical_op(user) in _KEEPING and user not in known:
                known.add(user)
                pending.append(user)


def _may_be_equal(found: Sequence[Consumer]) -> bool:
    """Whether two of them are numbers of the same rows. Pieces of the rows have one number each."""
    words = [consumer for consumer in found if consumer.kind in _PICKED]
    if not words:
        return False
    return len(words) < len(found) or any(
        one.logits.steps == other.logits.steps
        for place, one in enumerate(words)
        for other in words[:place]
    )
