"""Fuses calls whose consumers end in one sum: one call computes the gradient of that sum.

There are two reasons. Several losses over one weight (a loop over pieces of a sequence, multi-token
prediction) would be several calls, and each would hold a gradient of the weight until the backward.
And a call with several consumers (a cross entropy and a z-loss, or losses that are logged as well)
would leave its gradients to the backward, which computes the logits again. In a sum, the forward
already knows what each consumer counts for in the gradient.

Where there is no sum, and gradients of the weight would take more memory than logits do
(``call_memory``), one call leaves the gradients of several losses to the backward.
"""

from collections.abc import Container, Hashable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch.fx import Node

from ..compat.graphs import tree_leaves
from ..graph import (
    AUTOCAST_SWITCHES,
    ENTER_AUTOCAST,
    SameValues,
    canonical_op,
    draws,
    gradients_are_recorded,
    is_pieces,
    memory_of,
    mutation,
    same_shape,
    seen_by,
    tensor_of,
    value_of,
    wraps_none,
)
from ..logits import NOTHING_IGNORED, Consumer, ConsumerKind, row_order
from ..sums import LinearReduction, can_be_made_behind, sums
from .call_memory import hold_more_than_they_save
from .call_planning import chunks_of
from .types import Match, Rewrite


@dataclass(frozen=True)
class FusedCall:
    """Consumers whose gradients one call computes together."""

    matches: tuple[Match, ...]
    linear_reduction: LinearReduction | None
    """How the sum is made of the consumers that require a gradient. None: they end in no sum, and
    the backward computes the gradient of each row."""
    last: Node
    """The call comes right after this node: all its inputs are computed by then."""
    moved: tuple[Node, ...]
    """Users of the consumers before that place: they move behind the call, in this order."""
    likes: dict[Node, tuple[Node, Node]]
    """Users before that place that read shape and dtype alone. For each, the tensor it looks at,
    and another one of the same shape that is there earlier."""

    @property
    def root(self) -> Node | None:
        """The sum; None if there is none."""
        return None if self.linear_reduction is None else self.linear_reduction.sum

    @cached_property
    def call(self) -> Match:
        """What the op is called for: the first match, with the rows of all."""
        first = self.matches[0]
        tokens = sum(match.tokens for match in self.matches)
        chunks = chunks_of(first.logits, first.vocab_size, tokens, True, first.target_use)
        reduction = "none" if self.linear_reduction is None else "sum"
        return replace(first, reduction=reduction, tokens=tokens, chunks=chunks)


def plan_fused_calls(
    rewrites: list[Rewrite], checkpointed: Container[Node]
) -> Iterator[FusedCall | Match]:
    """The calls of the op that serve the matches of ``rewrites``.

    A ``FusedCall`` serves several matches, or one with the gradient of its sum. Heads in
    ``checkpointed`` were in checkpointed regions. A generator: the next one is planned when the one
    before has been inserted into the graph.
    """
    matches = [match for rewrite in rewrites for match in rewrite.matches]
    places = {match.place for match in matches}
    plain = [match for match in matches if not match.differentiable]
    for over_one_weight in _alike(matches):
        joined: list[Match] = []
        apart: list[Match] = []
        for group in over_one_weight:
            fused = _joined(group, places)
            if fused is not None:
                joined.append(fused.call)
                yield fused
            apart += [m for m in group if fused is None or m not in fused.matches]
        with_gradients = [match for match in apart if match.reduction != "none"]
        if len(joined) + len(apart) > 2:
            with_gradients += [
                match
                for match in apart
                if match.reduction == "none" and _fused_call([match], places) is not None
            ]
        holding = [*joined, *with_gradients]
        if len(holding) > 2 and hold_more_than_they_save(holding, checkpointed):
            for group in over_one_weight:
                by_row = _by_row([match for match in group if match in apart], places)
                if by_row is not None:
                    yield by_row
                    apart = [match for match in apart if match not in by_row.matches]
        for match in apart:
            alone = _fused_call([match], places)
            if alone is None or not _gains(alone):
                plain.append(match)
            else:
                yield alone
    yield from plain


def leaves_gradients_to_backward(rewrite: Rewrite) -> bool:
    """Whether the logits are computed again in the backward: of a head with one call."""
    if len(rewrite.matches) != 1 or rewrite.returned or not rewrite.matches[0].differentiable:
        return False
    (match,) = rewrite.matches
    return match.reduction == "none" and _fused_call([match], {match.place}) is None


def _gains(alone: FusedCall) -> bool:
    """Whether a single match is better off with the gradient of its sum.

    Others have their gradients in the forward as they are.
    """
    (match,), reduction = alone.matches, alone.linear_reduction
    return match.reduction == "none" or (reduction is not None and reduction.is_scaled)


def _alike(matches: list[Match]) -> list[list[list[Match]]]:
    """For each weight, the matches with a gradient: in one list those that may share a call."""
    matches = [match for match in matches if match.differentiable]
    found: dict[Hashable, dict[Hashable, list[Match]]] = {}
    if matches:
        same_values = SameValues(matches[0].node.graph)
        for match in matches:
            weight = same_values.of(match.logits.head.weight, match.node)
            of_weight = found.setdefault(weight, {})
            of_weight.setdefault(_key(match, same_values), []).append(match)
    return [list(of_weight.values()) for of_weight in found.values()]


def _joined(group: list[Match], places: set[Node]) -> FusedCall | None:
    """A call for several of ``group``: for all, or all that end in a sum; None if there is none."""
    fused = _fused_call(group, places) if len(group) > 1 else None
    if fused is None and len(group) > 1:
        group = [match for match in group if next(_sums([match]), None) is not None]
        fused = _fused_call(group, places) if len(group) > 1 else None
    return fused


def _by_row(group: list[Match], places: set[Node]) -> FusedCall | None:
    """All of ``group`` in one call that computes its gradients in the backward, and so holds none
    until then; None if that is impossible."""
    returns = any(c.kind is ConsumerKind.RETURNED for match in group for c in match.consumers)
    if len(group) < 2 or returns:
        return None
    return _fused_call_in(None, group, places - {match.place for match in group})


def _sums(group: list[Match]) -> Iterator[LinearReduction]:
    """The sums through which all gradients of ``group`` pass."""
    consumers = [consumer for match in group for consumer in match.consumers]
    if any(c.kind is ConsumerKind.RETURNED for c in consumers):
        return
    differentiable = [(match, consumer) for match in group for consumer in match.differentiable]
    if all(_is_of_all_rows(match, consumer) for match, consumer in differentiable):
        # The op squares nothing else.
        squarable = [
            consumer.node
            for _, consumer in differentiable
            if consumer.kind is ConsumerKind.LOGSUMEXP
        ]
        yield from sums([consumer.node for _, consumer in differentiable], squarable)


def _is_of_all_rows(match: Match, consumer: Consumer) -> bool:
    """Whether the consumer has a number for each row of the call in their order, or their sum."""
    if consumer.reduction != "none":
        return True
    return row_order(consumer.logits.steps) == row_order(match.logits.steps)


def _key(match: Match, same_values: SameValues) -> Hashable:
    """What has to be the same for matches to share a call."""
    logits, use = match.logits, match.target_use
    # Without a target, the call has one that is ignored in each row.
    counted = (
        (None, NOTHING_IGNORED, 0.0)
        if use is None
        else (use.class_weight, use.ignore_index, use.label_smoothing)
    )
    head = logits.head
    return same_values.of(
        (head.weight, head.weight_is_transposed, logits.values, match.compute_dtype, counted),
        reader=match.node,
    )


def _fused_call(group: list[Match], places: set[Node]) -> FusedCall | None:
    """All of ``group`` in one call; None if that is impossible.

    Of several sums the last one is taken: a factor that comes after the sum would multiply
    gradients that are rounded already.
    """
    others = places - {match.place for match in group}
    joins = (_fused_call_in(linear_reduction, group, others) for linear_reduction in _sums(group))
    return next((fused for fused in joins if fused is not None), None)


def _fused_call_in(
    linear_reduction: LinearReduction | None, group: list[Match], others: set[Node]
) -> FusedCall | None:
    """The call for ``group`` with the gradient of one sum, or of each row; None if it has no place.

    ``others`` are the nodes before which other calls will be inserted.
    """
    graph = group[0].node.graph
    # The backward of each row reads the inputs again.
    root = graph.output_node() if linear_reduction is None else linear_reduction.sum
    reads_of = {} if linear_reduction is None else linear_reduction.reads_of
    weighted_by = set[Node]().union(*reads_of.values())
    consumers = {consumer.node for match in group for consumer in match.consumers}
    wanting = {consumer.node for match in group for consumer in match.differentiable}
    asked = {node for match in group for node in _inputs(match)}
    inputs = asked | weighted_by
    # A weight that is written in place is read after the last write.
    inputs.update(
        writer
        for node, reads in reads_of.items()
        for writer in mutation.writers(mutation.nodes_between(min(consumers), node), reads)
    )
    # Consumers without a gradient have no other inputs, and may come later.
    last = max(wanting | inputs)
    while last < root and not gradients_are_recorded(last.next):
        last = last.next  # an input is made under no_grad
    users = _users_until(last, consumers)
    if last >= root or users is None or not consumers.isdisjoint(weighted_by):
        return None
    moved, looking = users
    likes = {node: (seen, _twin(node, seen)) for node, seen in looking.items()}
    if not (inputs | others).isdisjoint(moved):
        return None
    # The node that replaces the root has memory of its own.
    later = mutation.nodes_between(root, graph.output_node())
    if (
        linear_reduction is not None
        and mutation.has_other_names(root)
        and any(mutation.writers(later, of=[root]))
    ):
        return None
    # The call reads the same values as the nodes between the consumers and the root did.
    on_the_way = list(mutation.nodes_between(min(consumers), root))
    if any(mutation.writers(on_the_way, of=asked)):
        return None
    if linear_reduction is not None and not can_be_made_behind(last, linear_reduction):
        return None
    if linear_reduction is not None and any(
        mutation.writers(on_the_way, of=linear_reduction.squared)
    ):
        return None  # the squares may be of other numbers then
    if not run_the_same_behind(last, moved):
        return None
    if len(group) > 1 and _enters_autocast(group, last):
        return None
    known = {node: (seen, twin) for node, (seen, twin) in likes.items() if twin is not None}
    return (
        FusedCall(tuple(group), linear_reduction, last, moved, known)
        if len(known) == len(likes)
        else None
    )


def _twin(node: Node, seen: Node) -> Node | None:
    """A tensor in the shape of ``seen`` that is there before ``node``; None if there is none."""
    inputs = (other for other in node.graph.nodes if other.op == "placeholder")
    if not tensor_of(seen).is_contiguous():
        return None
    is_static = all(isinstance(size, int) for size in tensor_of(seen).shape)
    for other in (*node.all_input_nodes, *inputs):
        value = value_of(other)
        if other is seen or not wraps_none(value):
            continue
        if value.layout == torch.strided and (is_static or same_shape(other, seen)):
            return other
    return None


def _enters_autocast(group: list[Match], last: Node) -> bool:
    """Whether ``last`` is in an autocast that a head is not in: cat takes no FP16 under BF16."""
    first = min(match.logits.head.node for match in group)
    return any(node.target is ENTER_AUTOCAST for node in mutation.nodes_between(first, last))


def _users_until(
    last: Node, consumers: set[Node]
) -> tuple[tuple[Node, ...], dict[Node, Node]] | None:
    """The nodes up to ``last`` that depend on ``consumers``, and those that read only the shape or
    dtype of such a node, with that node.

    None if it is not understood.
    """
    users: set[Node] = set()
    looking: dict[Node, Node] = {}
    pending = list(consumers)
    while pending:
        node = pending.pop()
        for user in node.users:
            if user <= last and user not in users | consumers:
                if seen_by(user) is node:
                    looking[user] = node
                    continue
                is_tensor = isinstance(value_of(user), torch.Tensor)
                is_known = is_tensor or is_pieces(user) or canonical_op(user) == "setitem"
                if canonical_op(user) is None or not is_known:
                    return None
                users.add(user)
                pending.append(user)
            elif user in consumers:
                return None  # a consumer that depends on another
    looking = {user: node for user, node in looking.items() if user not in users}
    return tuple(sorted(users)), looking


def run_the_same_behind(last: Node, moved: tuple[Node, ...]) -> bool:
    """Whether ``moved``, and what they are moved past, compute what they did."""
    if not moved:
        return True
    passed = set(mutation.nodes_between(moved[0], last.next)).difference(moved)
    read, read_by_passed = (
        {source for node in nodes for source in node.all_input_nodes} for nodes in (moved, passed)
    )
    written = {storage for node in moved for storage in mutation.memory_written(node)}
    return (
        not any(map(draws, moved))
        and all(gradients_are_recorded(node) or not _has_gradient(node) for node in moved)
        and not any(node.target in AUTOCAST_SWITCHES for node in passed)
        and not any(mutation.writers(passed, of=read))
        and all(written.isdisjoint(memory_of(source)) for source in read_by_passed)
    )


def _has_gradient(node: Node) -> bool:
    values = tree_leaves(value_of(node))
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)


def _inputs(match: Match) -> set[Node]:
    """What a call for ``match`` reads, except for coefficients."""
    inputs = match.logits.inputs
    for consumer in match.consumers:
        if consumer.target_use is not None:
            inputs |= consumer.target_use.nodes
    return inputs
