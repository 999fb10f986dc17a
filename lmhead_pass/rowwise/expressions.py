"""What an expression is computed of: its leaves, and how far a gradient reaches."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch.fx import Node

from ..compat.graphs import tree_leaves
from .values import Exit, Expression, HeadLeaf, Outer

# These pass no gradient on, not even one of 0.
_DISCRETE = {
    *("detach", "gt", "ge", "lt", "le", "eq", "ne", "isnan", "isinf", "argmax", "argmin"),
    *("logical_and", "logical_or", "logical_not", "any", "all", "count_nonzero", "full_like"),
}


def exits_of(result: Any) -> Iterator[Exit]:
    if isinstance(result, Exit):
        yield result
    elif isinstance(result, Outer) and result.call is not None:
        for leaf in tree_leaves(result.call[1:]):
            yield from exits_of(leaf)


def nodes_of(outer: Any) -> Iterator[Node]:
    """The nodes that ``outer`` is made of."""
    if isinstance(outer, Outer):
        if outer.node is not None:
            yield outer.node
        else:
            for leaf in tree_leaves(outer.call[1:] if outer.call is not None else ()):
                yield from nodes_of(leaf)


def _inputs_of(expression: Expression) -> Iterator[Expression]:
    for leaf in tree_leaves((expression.args, expression.kwargs)):
        if isinstance(leaf, Expression):
            yield leaf


def collect(expression: Expression, found: dict[Expression, None]) -> None:
    """Put what ``expression`` is computed of into ``found``, and then itself."""
    pending = [(expression, False)]
    while pending:
        one, is_ready = pending.pop()
        if one in found:
            continue
        if is_ready:
            found[one] = None
            continue
        pending.append((one, True))
        pending += [(source, False) for source in _inputs_of(one)]


def with_gradient(ends: Iterable[Expression]) -> set[Expression]:
    """What a gradient of ``ends`` may reach."""
    found, pending = set[Expression](), list(ends)
    while pending:
        one = pending.pop()
        if one not in found and not _ends_gradients(one):
            found.add(one)
            pending += _inputs_of(one)
    return found


def reaches_a_head(expression: Expression) -> bool:
    """Whether a gradient of ``expression`` may reach logits."""
    return any(isinstance(one.op, HeadLeaf) for one in with_gradient([expression]))


def _ends_gradients(one: Expression) -> bool:
    return isinstance(one.op, str) and not _DISCRETE.isdisjoint(one.op.split(".")[1:2])


def heads_of(expression: Expression) -> Iterator[int]:
    found: dict[Expression, None] = {}
    collect(expression, found)
    for one in found:
        if isinstance(one.op, HeadLeaf):
            yield one.op.number


def is_head(expression: Expression, number: int) -> bool:
    return isinstance(expression.op, HeadLeaf) and expression.op.number == number
