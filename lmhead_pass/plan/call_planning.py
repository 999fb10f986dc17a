"""Plans the calls of the op that serve a head's consumers: who shares one, and where it stands."""

from dataclasses import dataclass, field

import torch
from torch.fx import Node

from ..graph import Refused, at, describe, draws, hint, mutation, product, tensor_of, value_of
from ..logits import Consumer, ConsumerKind, Logits, ScaleRows, TargetUse
from ..op import Chunks, plan_chunks
from .types import Match

LOSS, RETURNED = ConsumerKind.LOSS, ConsumerKind.RETURNED
_OF_ALL_WORDS = (
    *(ConsumerKind.LOGSUMEXP, ConsumerKind.MEAN_LOGIT),
    ConsumerKind.MEAN_LOG_PROBABILITY,
)


@dataclass
class _Call:
    """A call in the making."""

    target_use: TargetUse | None
    """None if no consumer looks at a target."""
    consumers: list[Consumer] = field(default_factory=list)

    def takes(self, consumer: Consumer, order: dict[Node, int]) -> bool:
        """Whether the call can serve ``consumer`` too."""
        first = self.consumers[0].logits
        if consumer.target_use is None:
            return first.holds_all_of(consumer.logits) and self._has_place_with(consumer, order)
        # Of several losses with one target, each has a reduction, and so a call, of its own.
        if consumer.kind is LOSS and any(other.kind is LOSS for other in self.consumers):
            return False
        return (
            self.target_use == consumer.target_use
            and first.same_values(consumer.logits)
            and self._has_place_with(consumer, order)
        )

    def _has_place_with(self, consumer: Consumer, order: dict[Node, int]) -> bool:
        place = _place([*self.consumers, consumer], order)
        return place is not None and _late_inputs(self.target_use, place, order) is not None


def plan_calls(consumers: list[Consumer], returns_logits: bool) -> tuple[Match, ...]:
    """The calls that serve ``consumers``, all of one head; Refused if one cannot be served."""
    graph = consumers[0].node.graph
    order = {node: number for number, node in enumerate(graph.nodes)}
    calls: list[_Call] = []
    # Who asks for a target comes first: others can join at any place.
    for consumer in sorted(consumers, key=lambda c: (c.target_use is None, order[c.node])):
        call = next((call for call in calls if call.takes(consumer, order)), None)
        if call is None:
            calls.append(call := _Call(consumer.target_use))
        call.consumers.append(consumer)
    return tuple(_match(call, order, returns_logits) for call in calls)


def _place(consumers: list[Consumer], order: dict[Node, int]) -> Node | None:
    """The node before which a call can serve all of ``consumers``; None if there is none."""
    consumers = [consumer for consumer in consumers if consumer.kind is not RETURNED] or consumers[
        :1
    ]
    if consumers[0].kind is RETURNED:
        return consumers[0].node.graph.output_node()
    users = [user for consumer in consumers for user in consumer.node.users]
    if not {consumer.node for consumer in consumers}.isdisjoint(users):
        return None  # a target that is made of the same logits
    first_user = min(users, key=order.__getitem__, default=consumers[0].node)
    # Where a gradient is wanted, it is recorded.
    wanting = [consumer.node for consumer in consumers if consumer.is_differentiated]
    place = min(wanting or [consumers[0].node], key=order.__getitem__)
    return place if order[place] <= order[first_user] else None


def _late_inputs(
    target_use: TargetUse | None, place: Node, order: dict[Node, int]
) -> tuple[Node, ...] | None:
    """The nodes that have to move before ``place``, so that target and class weights are there.

    None if something cannot be: it is made of other than targets, draws random numbers, or reads
    what is written before.
    """
    late: set[Node] = set()
    pending = [] if target_use is None else list(target_use.nodes)
    while pending:
        node = pending.pop()
        if order[node] < order[place] or node in late:
            continue
        before = mutation.nodes_between(place.prev, node)
        if (
            not _is_of_integers(node)
            or mutation.may_write(node)
            or draws(node)
            or any(mutation.writers(before, of=node.all_input_nodes))
        ):
            return None
        late.add(node)
        pending += node.all_input_nodes
    return tuple(sorted(late, key=order.__getitem__))


def _is_of_integers(node: Node) -> bool:
    """Whether ``node`` and all that it reads hold integers: targets, and no logits."""
    values = [value_of(part) for part in (node, *node.all_input_nodes)]
    return node.op != "output" and not any(
        isinstance(value, torch.Tensor) and value.is_floating_point() for value in values
    )


def _match(call: _Call, order: dict[Node, int], returns_logits: bool) -> Match:
    # A loss comes first: it gives the call its name and its options.
    consumers = sorted(call.consumers, key=lambda consumer: consumer.kind is not LOSS)
    place = _place(consumers, order)
    assert place is not None, "a call with no place was never begun"
    moved = _late_inputs(call.target_use, place, order) or ()
    reduction = _reduction(consumers)
    differentiable = any(consumer.is_differentiated for consumer in consumers)
    # What is needed in the backward is read again: where gradients are computed there, and where
    # hidden states are multiplied by a tensor.
    is_scaled = any(isinstance(step, ScaleRows) for step in consumers[0].logits.steps)
    is_read_again = differentiable and (reduction == "none" or is_scaled)
    last = place.graph.output_node() if is_read_again else place
    _check_writers(call, place, last, order)

    head, logits = consumers[0].logits.head, consumers[0].logits
    computed = tensor_of(head.node)
    start, stop = logits.values.vocab_slice or (0, head.vocab_size)
    shape = tensor_of(logits.node).shape
    tokens = product(size for dim, size in enumerate(shape) if dim != logits.vocab_dim)
    return Match(
        consumers=tuple(consumers),
        reduction=reduction,
        place=place,
        moved=moved,
        tokens=tokens,
        vocab_size=stop - start,
        compute_dtype=computed.dtype,
        chunks=chunks_of(logits, stop - start, tokens, differentiable, call.target_use),
        returns_logits=returns_logits,
    )


def chunks_of(
    logits: Logits,
    vocab_size: int | torch.SymInt,
    tokens: int | torch.SymInt,
    differentiable: bool,
    target_use: TargetUse | None,
) -> Chunks:
    """What exists at once of ``logits`` in a call for ``tokens`` rows."""
    head = logits.head
    computed, weight = tensor_of(head.node), tensor_of(head.weight)
    has_gradient = differentiable and weight.requires_grad
    return plan_chunks(
        hint(tensor_of(head.hidden).size(head.hidden_dim)),
        hint(vocab_size),
        computed.dtype,
        computed.device,
        tokens=hint(tokens),
        is_dynamic=not isinstance(tokens, int),
        needs_whole_rows=target_use is not None and target_use.label_smoothing != 0,
        gradient_dtype=weight.dtype if has_gradient else torch.float32,
    )


def _check_writers(call: _Call, place: Node, last: Node, order: dict[Node, int]) -> None:
    """Refused if what the call or its backward reads may have changed since its consumers read it.

    The call is at ``place``; it and its backward read until ``last``.
    """
    logits = call.consumers[0].logits
    asked = set() if call.target_use is None else call.target_use.nodes
    first = min((place, *(consumer.node for consumer in call.consumers)), key=order.__getitem__)
    latest = max((last, *(consumer.node for consumer in call.consumers)), key=order.__getitem__)
    for what, of, since, until in (
        ("the head's input, weight or bias", logits.inputs, logits.head.node, last),
        ("the target or class weights of the loss", asked, first, latest),
    ):
        for writer in mutation.writers(mutation.nodes_between(since, until), of=of):
            when = "between the head and the loss"
            if order[writer] > order[place]:
                when = "after the loss, whose backward reads it again"
            raise Refused(f"{describe(writer)}{at(writer)} may change {what} in place {when}")


def _reduction(consumers: list[Consumer]) -> str:
    only = consumers[0] if len(consumers) == 1 else None
    if only and only.kind is ConsumerKind.LOG_PROBABILITY and only.is_summed:
        return "sum"
    # The gradient of a measure, and a second reading of the losses, take each row's own.
    by_row = any(
        consumer.kind
        in (ConsumerKind.LOG_PROBABILITY, ConsumerKind.LOGIT, ConsumerKind.PROBABILITY)
        or (consumer.kind in _OF_ALL_WORDS and consumer.is_differentiated)
        for consumer in consumers
    )
    # Of a call with a loss, that is the first consumer.
    return "none" if by_row else consumers[0].reduction
