"""Plans the calls of the op that serve a head's readers: who shares one, and where it stands."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from . import mutation
from .chunking import plan_rows
from .emitter import nodes_read
from .match import NOTHING_IGNORED, Match, Reader, Refused, Weighting
from .source import at
from .spelling import describe
from .tensors import hint, product, tensor_of, value_of
from .weighting import can_be_made_behind, weighted_sum


@dataclass
class _Call:
    """A call in the making."""

    asked: tuple[Any, ...] | None
    """What its loss is: target and options; None if no reader looks at a target."""
    readers: list[Reader] = field(default_factory=list)

    def takes(self, reader: Reader, order: dict[Node, int]) -> bool:
        """Whether the call can serve ``reader`` too."""
        first, asked = self.readers[0].logits, _asked(reader)
        if asked is None:
            return first.holds_all_of(reader.logits) and self._has_place_with(reader, order)
        # Of several losses with one target, each has a reduction, and so a call, of its own.
        if reader.kind == "loss" and any(other.kind == "loss" for other in self.readers):
            return False
        return (
            self.asked == asked
            and first.same_values(reader.logits)
            and self._has_place_with(reader, order)
        )

    def _has_place_with(self, reader: Reader, order: dict[Node, int]) -> bool:
        place = _place([*self.readers, reader], order)
        return place is not None and _late_inputs(self.asked, place, order) is not None


def plan_calls(readers: list[Reader], returns_logits: bool) -> tuple[Match, ...]:
    """The calls that serve ``readers``, all of one head; Refused if one cannot be served."""
    graph = readers[0].node.graph
    order = {node: number for number, node in enumerate(graph.nodes)}
    calls: list[_Call] = []
    # Who asks for a target comes first: others can join at any place.
    for reader in sorted(readers, key=lambda reader: (_asked(reader) is None, order[reader.node])):
        call = next((call for call in calls if call.takes(reader, order)), None)
        if call is None:
            calls.append(call := _Call(asked=_asked(reader)))
        call.readers.append(reader)
    return tuple(_match(call, order, returns_logits) for call in calls)


def _place(readers: list[Reader], order: dict[Node, int]) -> Node | None:
    """Before which node a call can serve all of ``readers``; None if there is no such place."""
    readers = [reader for reader in readers if reader.kind != "returned"] or readers[:1]
    if readers[0].kind == "returned":
        return readers[0].node.graph.output_node()
    users = [user for reader in readers for user in reader.node.users]
    if not {reader.node for reader in readers}.isdisjoint(users):
        return None  # a target that is made of the same logits
    first_user = min(users, key=order.__getitem__, default=readers[0].node)
    # Where a gradient is wanted, it is recorded.
    wanting = [reader.node for reader in readers if tensor_of(reader.node).requires_grad]
    place = min(wanting or [readers[0].node], key=order.__getitem__)
    return place if order[place] <= order[first_user] else None


def _late_inputs(
    asked: tuple[Any, ...] | None, place: Node, order: dict[Node, int]
) -> tuple[Node, ...] | None:
    """What has to be moved before ``place`` for target and class weights to be there.

    None if something cannot be: it is made of other than targets, or reads what is written before.
    """
    late: set[Node] = set()
    pending = [part for part in asked or () if isinstance(part, Node)]
    while pending:
        node = pending.pop()
        if order[node] < order[place] or node in late:
            continue
        before = mutation.nodes_between(place.prev, node)
        if (
            not _is_of_integers(node)
            or mutation.may_write(node)
            or any(mutation.writers(before, of=node.all_input_nodes))
        ):
            return None
        late.add(node)
        pending += node.all_input_nodes
    return tuple(sorted(late, key=order.__getitem__))


def _is_of_integers(node: Node) -> bool:
    """Whether ``node`` makes targets of targets, and nothing of logits."""
    values = [value_of(part) for part in (node, *node.all_input_nodes)]
    return node.op != "output" and not any(
        isinstance(value, torch.Tensor) and value.is_floating_point() for value in values
    )


def _asked(reader: Reader) -> tuple[Any, ...] | None:
    """The target that ``reader`` wants to see, and how; None if it looks at no target."""
    if reader.loss is not None:
        loss = reader.loss
        return loss.target, loss.class_weight, loss.ignore_index, loss.label_smoothing
    return None if reader.target is None else (reader.target, None, NOTHING_IGNORED, 0.0)


def _match(call: _Call, order: dict[Node, int], returns_logits: bool) -> Match:
    # A loss comes first: it gives the call its name and its options.
    readers = sorted(call.readers, key=lambda reader: reader.kind != "loss")
    only = readers[0] if len(readers) == 1 else None
    weighting = None if only is None else _weighting(only)
    place = _place(readers, order)
    assert place is not None, "a call with no place was never begun"
    moved = _late_inputs(call.asked, place, order) or ()
    if weighting is not None:
        place, moved = weighting.sum, ()
    reduction = _reduction(readers, weighting)
    differentiable = any(tensor_of(reader.node).requires_grad for reader in readers)
    # What is needed in the backward is read again: where gradients are computed there, and where
    # hidden states are multiplied by a tensor.
    is_scaled = any(step.method in ("mul", "div") for step in readers[0].logits.steps)
    is_read_again = differentiable and (reduction == "none" or is_scaled)
    last = place.graph.output_node() if is_read_again else place
    _check_writers(call, place, last, order)

    head, logits = readers[0].logits.head, readers[0].logits
    computed, weight = tensor_of(head.node), tensor_of(head.weight)
    start, stop = logits.words or (0, computed.size(head.vocab_dim))
    shape = tensor_of(logits.node).shape
    tokens = product(size for dim, size in enumerate(shape) if dim != logits.vocab_dim)
    return Match(
        readers=tuple(readers),
        reduction=reduction,
        place=place,
        moved=moved,
        weighting=weighting,
        tokens=tokens,
        vocab_size=stop - start,
        compute_dtype=computed.dtype,
        rows_per_chunk=plan_rows(
            hint(tensor_of(head.hidden).size(head.hidden_dim)),
            hint(stop - start),
            computed.dtype,
            computed.device,
            tokens=hint(tokens),
            gradient_dtype=weight.dtype
            if differentiable and weight.requires_grad
            else torch.float32,
        ),
        returns_logits=returns_logits,
    )


def _weighting(reader: Reader) -> Weighting | None:
    reduces = reader.loss is not None and reader.loss.reduction != "none"
    if reader.kind not in ("loss", "log_probability") or reduces or reader.is_summed:
        return None
    found = weighted_sum(reader.node) if tensor_of(reader.node).requires_grad else None
    is_clear = found is not None and can_be_made_behind(found.sum.prev, found)
    return found if is_clear else None


def _check_writers(call: _Call, place: Node, last: Node, order: dict[Node, int]) -> None:
    """Refused if what the call, or its backward, reads may be other than what its readers saw.

    The call is at ``place``; it and its backward read until ``last``.
    """
    logits = call.readers[0].logits
    asked = {part for part in call.asked or () if isinstance(part, Node)}
    first = min((place, *(reader.node for reader in call.readers)), key=order.__getitem__)
    latest = max((last, *(reader.node for reader in call.readers)), key=order.__getitem__)
    for what, of, since, until in (
        ("the head's input, weight or bias", nodes_read(logits), logits.head.node, last),
        ("the target or class weights of the loss", asked, first, latest),
    ):
        for writer in mutation.writers(mutation.nodes_between(since, until), of=of):
            when = "between the head and the loss"
            if order[writer] > order[place]:
                when = "after the loss, whose backward reads it again"
            raise Refused(f"{describe(writer)}{at(writer)} may change {what} in place {when}")


def _reduction(readers: list[Reader], weighting: Weighting | None) -> str:
    only = readers[0] if len(readers) == 1 else None
    if weighting or (only and only.kind == "log_probability" and only.is_summed):
        return "sum"
    # The gradient of a measure, and a second reading of the losses, take each row's own.
    by_row = any(
        reader.kind in ("log_probability", "logit")
        or (reader.kind == "logsumexp" and tensor_of(reader.node).requires_grad)
        for reader in readers
    )
    loss = readers[0].loss
    return "none" if loss is None or by_row else loss.reduction
