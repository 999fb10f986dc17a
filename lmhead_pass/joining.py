"""Readers of a head that go into one sum, by shares that are known before: one call for them all.

Several losses over one weight: a loop over pieces of the logits, or of the hidden states;
multi-token prediction. A call for each would hold a gradient of the weight for each until the
backward. And several readers of one call: a cross entropy and a z-loss, or losses that are logged
too. Their gradients would be left to the backward, and the logits so be computed twice. In a sum,
each reader's share of the gradient is known before, so that one call computes that of the sum.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from . import mutation
from .emitter import nodes_read
from .match import NOTHING_IGNORED, Match, Reader, Rewrite, Weighting, row_order
from .softmaxes import summed_dims
from .spelling import operation
from .tensors import (
    AUTOCAST_SWITCHES,
    ENTER_AUTOCAST,
    gradients_are_recorded,
    is_number,
    memory_of,
    tensor_of,
    value_of,
)
from .weighting import (
    differentiable_user,
    factors_of,
    is_negated,
    is_sum,
    other_operand,
    weighted_sum_of_others_too,
)

# A factor of a number in the sum: the operation, and its operand.
Factor = tuple[str, Any]


@dataclass(frozen=True)
class Term:
    """What a reader adds to the sum, as far as it has a gradient."""

    reader: Reader
    weighting: Weighting | None
    """How a number comes of the reader's, one for each row; None if the reader is one number."""
    factors: tuple[Factor, ...] = ()
    """What that number is multiplied with or divided by on its way to the sum."""

    @property
    def number(self) -> Node:
        return self.reader.node if self.weighting is None else self.weighting.nodes[-1]


@dataclass(frozen=True)
class Join:
    """Readers whose gradients one call computes together."""

    matches: tuple[Match, ...]
    terms: tuple[tuple[Term, ...], ...]
    """Of each match."""
    root: Node
    """The sum."""
    last: Node
    """The call comes after this node: then all that it needs is there."""
    moved: tuple[Node, ...]
    """What uses the readers before that, and has to be moved behind the call, in this order."""


def join(rewrites: list[Rewrite]) -> Iterator[Join]:
    """Which of the matches of ``rewrites`` a call computes with the gradient of a sum.

    Each is found in the graph as the call for the one before has left it.
    """
    places = {match.place for rewrite in rewrites for match in rewrite.matches}
    alike: list[list[tuple[Match, tuple[Term, ...]]]] = []
    for rewrite in rewrites:
        for match in rewrite.matches:
            terms = _terms(match)
            if terms is None:
                continue
            group = next((group for group in alike if _key(group[0][0]) == _key(match)), None)
            if group is None:
                alike.append(group := [])
            group.append((match, terms))
    for group in alike:
        together = _join(group, places) if len(group) > 1 else None
        if together is not None:
            yield together
            continue
        for match, terms in group:
            alone = _join([(match, terms)], places)
            # Others have their gradients in the forward as they are.
            if alone is not None and (match.reduction == "none" or alone.terms[0][0].factors):
                yield alone


def _terms(match: Match) -> tuple[Term, ...] | None:
    """What ``match`` adds to sums; None if that is not known before."""
    if any(reader.kind == "returned" or reader.is_summed for reader in match.readers):
        return None
    wanting = [reader for reader in match.readers if tensor_of(reader.node).requires_grad]
    terms = [_term(match, reader) for reader in wanting]
    known = [term for term in terms if term is not None]
    return tuple(known) if known and len(known) == len(terms) else None


def _term(match: Match, reader: Reader) -> Term | None:
    if reader.loss is not None and reader.loss.reduction != "none":
        return Term(reader, None)
    # A weight for each row of the call, in their order.
    is_of_all_rows = row_order(reader.logits.steps) == row_order(match.logits.steps)
    weighting = weighted_sum_of_others_too(reader.node) if is_of_all_rows else None
    if weighting is None:
        return None
    if weighting.power == 2:
        if reader.kind != "logsumexp":
            return None  # the op has no other squares
        until = mutation.nodes_between(reader.node, weighting.nodes[-1])
        if any(mutation.writers(until, of=(reader.node, *weighting.nodes))):
            return None  # they may be squares of other numbers
    return Term(reader, weighting)


def _key(match: Match) -> tuple[Any, ...]:
    """What has to be the same for matches to share a call."""
    logits, loss = match.logits, match.readers[0].loss
    asked = (None, NOTHING_IGNORED, 0.0)
    if loss is not None:
        asked = (loss.class_weight, loss.ignore_index, loss.label_smoothing)
    return (
        *(logits.head.weight, logits.head.weight_is_transposed, logits.values, logits.words),
        *(match.compute_dtype, asked),
    )


def _join(group: list[tuple[Match, tuple[Term, ...]]], places: set[Node]) -> Join | None:
    """All of ``group`` in one call, with the last sum of them all: it has the most factors.

    A gradient that is multiplied with a factor afterwards is rounded twice.
    """
    paths = {term.reader.node: _path(term.number) for _, terms in group for term in terms}
    common = set.intersection(*(set(path) for path in paths.values()))
    others = places - {match.place for match, _ in group}
    joins = (_join_at(root, group, paths, others) for root in sorted(common, reverse=True))
    return next((joined for joined in joins if joined is not None), None)


def _join_at(
    root: Node,
    group: list[tuple[Match, tuple[Term, ...]]],
    paths: dict[Node, dict[Node, tuple[Factor, ...]]],
    others: set[Node],
) -> Join | None:
    """``group`` joined in ``root``, if possible; ``others`` are where other calls will be."""
    terms = tuple(
        tuple(replace(term, factors=paths[term.reader.node][root]) for term in terms)
        for _, terms in group
    )
    readers = {reader.node for match, _ in group for reader in match.readers}
    inputs = {
        node
        for (match, _), of_match in zip(group, terms, strict=True)
        for node in _inputs(match, of_match)
    }
    # Readers that have no gradient take nothing else, and may come later.
    last = max(paths.keys() | inputs)
    while last < root and not gradients_are_recorded(last.next):
        last = last.next  # an input is made under no_grad
    moved = _users_until(last, readers)
    if last >= root or moved is None or not (inputs | others).isdisjoint(moved):
        return None
    # What the call reads is what was read on the way to the root.
    if any(mutation.writers(mutation.nodes_between(min(readers), root), of=inputs)):
        return None
    if not _run_the_same_behind(last, moved):
        return None
    if len(group) > 1 and _enters_autocast(group, last):
        return None
    return Join(tuple(match for match, _ in group), terms, root, last, moved)


def _enters_autocast(group: list[tuple[Match, tuple[Term, ...]]], last: Node) -> bool:
    """Whether ``last`` is in an autocast that a head is not in: cat takes no FP16 under BF16."""
    first = min(match.logits.head.node for match, _ in group)
    return any(node.target is ENTER_AUTOCAST for node in mutation.nodes_between(first, last))


def _users_until(last: Node, readers: set[Node]) -> tuple[Node, ...] | None:
    """What depends on ``readers``, up to ``last``; None if it is not understood."""
    users: set[Node] = set()
    pending = list(readers)
    while pending:
        for user in pending.pop().users:
            if user <= last and user not in users | readers:
                if not isinstance(value_of(user), torch.Tensor) or operation(user) is None:
                    return None
                users.add(user)
                pending.append(user)
            elif user in readers:
                return None  # a reader that depends on another
    return tuple(sorted(users))


def _run_the_same_behind(last: Node, moved: tuple[Node, ...]) -> bool:
    """Whether ``moved``, and what they are moved past, compute what they did."""
    if not moved:
        return True
    passed = set(mutation.nodes_between(moved[0], last.next)).difference(moved)
    read, read_by_passed = (
        {source for node in nodes for source in node.all_input_nodes} for nodes in (moved, passed)
    )
    written = {storage for node in moved for storage in mutation.memory_written(node)}
    return (
        all(gradients_are_recorded(n) or not tensor_of(n).requires_grad for n in moved)
        and not any(node.target in AUTOCAST_SWITCHES for node in passed)
        and not any(mutation.writers(passed, of=read))
        and all(written.isdisjoint(memory_of(source)) for source in read_by_passed)
    )


def _inputs(match: Match, terms: Iterable[Term]) -> set[Node]:
    """What a call for ``match`` is made of."""
    inputs = nodes_read(match.logits)
    for reader in match.readers:
        loss = reader.loss
        asked = (reader.target,) if loss is None else (loss.target, loss.class_weight)
        inputs.update(node for node in asked if node is not None)
    for term in terms:
        inputs.update(operand for _, operand in term.factors if isinstance(operand, Node))
        if term.weighting is not None:
            inputs.update(factors_of(term.reader.node, term.weighting))
    return inputs


def _path(number: Node) -> dict[Node, tuple[Factor, ...]]:
    """The sums that ``number`` goes into, and by what factors: all that its gradient comes from."""
    path: dict[Node, tuple[Factor, ...]] = {number: ()}
    node = number
    factors: tuple[Factor, ...] = ()
    while (user := differentiable_user(node)) is not None:
        step = _STEPS.get(operation(user), lambda node, user: None)(node, user)
        if step is None:
            break
        node, factors = user, (*factors, *step)
        path[node] = factors
    return {sum_: factors for sum_, factors in path.items() if tensor_of(sum_).dim() == 0}


def _scaled(before: Node, after: Node) -> list[Factor] | None:
    operand = other_operand(before, after)
    is_known = operand is not None and (
        is_number(operand)
        or (tensor_of(operand).dim() == 0 and not tensor_of(operand).requires_grad)
    )
    return [(str(operation(after)), operand)] if is_known else None


def _added(before: Node, after: Node) -> list[Factor] | None:
    if not is_sum(before, after):
        return None
    return [("mul", -1)] if is_negated(before, after) else []


def _summed(before: Node, after: Node) -> list[Factor] | None:
    reduction = summed_dims(after)
    size = tensor_of(before).numel()
    if reduction is None or tensor_of(after).dim() > 0 or not isinstance(size, int):
        return None
    return [("div", size)] if operation(after) == "mean" else []


_STEPS: dict[str | None, Callable[[Node, Node], list[Factor] | None]] = {
    "mul": _scaled,
    "div": _scaled,
    "neg": lambda before, after: [("mul", -1)],
    "add": _added,
    "sub": _added,
    "cast": lambda before, after: [],
    "stack": lambda before, after: [] if tensor_of(before).dim() == 0 else None,
    "sum": _summed,
    "mean": _summed,
}
