"""Plans the calls of the op that serve the readers of a head: who shares one, and where it stands."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from . import mutation
from .chunking import plan_rows
from .emitter import nodes_read
from .match import NOTHING_IGNORED, Logits, Match, Reader, Refused, Weighting
from .source import at
from .spelling import describe
from .tensors import hint, product, tensor_of
from .weighting import weighted_sum


@dataclass
class _Call:
    """A call in the making."""

    readers: list[Reader] = field(default_factory=list)
    asked: tuple[Any, ...] | None = None
    """What its loss is: target and options; None as long as no reader has any."""

    def takes(self, reader: Reader, asked: tuple[Any, ...] | None, order: dict[Node, int]) -> bool:
        """Whether the call can serve ``reader`` too."""
        first = self.readers[0]
        if asked is None:
            return first.logits.holds_all_of(reader.logits)
        if self.asked != asked or not first.logits.same_values(reader.logits):
            return False
        # Of several losses with one target, each has a reduction, and so a call, of its own.
        is_second_loss = "loss" in (reader.kind, first.kind) and reader.kind == first.kind
        place = order[_place([*self.readers, reader], order)]
        inputs = [part for part in asked if isinstance(part, Node)]
        return not is_second_loss and all(order[node] < place for node in inputs)


def plan_calls(readers: list[Reader], returns_logits: bool) -> tuple[Match, ...]:
    """The calls that serve ``readers``, all of one head; Refused if one cannot be served."""
    graph = readers[0].node.graph
    order = {node: number for number, node in enumerate(graph.nodes)}
    calls: list[_Call] = []
    # Who asks for a target comes first: others can join at any place.
    for reader in sorted(readers, key=lambda reader: (_asked(reader) is None, order[reader.node])):
        asked = _asked(reader)
        call = next((call for call in calls if call.takes(reader, asked, order)), None)
        if call is None:
            calls.append(call := _Call())
        call.readers.append(reader)
        call.asked = call.asked or asked
    return tuple(_match(call, order, returns_logits) for call in calls)


def _place(readers: list[Reader], order: dict[Node, int]) -> Node:
    """Before which node a call can serve all of ``readers``: the first that uses one of them."""
    if len(readers) == 1 and readers[0].kind != "returned":
        return readers[0].node
    users = {user for reader in readers if reader.kind != "returned" for user in reader.node.users}
    return min(users, key=order.__getitem__, default=readers[0].node.graph.output_node())


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
    if weighting is not None:
        place = weighting.nodes[-1]
    reduction = _reduction(readers, weighting)
    differentiable = any(tensor_of(reader.node).requires_grad for reader in readers)
    # Where gradients are computed in the backward, what they are computed from is read again.
    last = place.graph.output_node() if reduction == "none" and differentiable else place
    _check_writers(call, weighting, place, last, order)

    head, logits = readers[0].logits.head, readers[0].logits
    computed = tensor_of(head.node)
    first, last = logits.words or (0, computed.size(head.vocab_dim))
    shape = tensor_of(logits.node).shape
    tokens = product(size for dim, size in enumerate(shape) if dim != logits.vocab_dim)
    return Match(
        readers=tuple(readers),
        reduction=reduction,
        place=place,
        weighting=weighting,
        tokens=tokens,
        vocab_size=last - first,
        compute_dtype=computed.dtype,
        rows_per_chunk=plan_rows(
            hint(tensor_of(head.hidden).size(head.hidden_dim)),
            hint(last - first),
            computed.dtype,
            computed.device,
            tokens=hint(tokens),
            gradient_dtype=_gradient_dtype(logits, differentiable),
        ),
        returns_logits=returns_logits,
    )


def _gradient_dtype(logits: Logits, differentiable: bool) -> torch.dtype:
    weight = tensor_of(logits.head.weight)
    wanted = differentiable and weight.requires_grad and not logits.is_detached
    return weight.dtype if wanted else torch.float32


def _weighting(reader: Reader) -> Weighting | None:
    reduces = reader.loss is not None and reader.loss.reduction != "none"
    if reader.kind not in ("loss", "log_probability") or reduces or reader.is_summed:
        return None
    # The weights take the shape of the target.
    target = reader.target if reader.loss is None else reader.loss.target
    if tensor_of(target).shape != tensor_of(reader.node).shape:
        return None
    return weighted_sum(reader.node) if tensor_of(reader.node).requires_grad else None


def _check_writers(
    call: _Call, weighting: Weighting | None, place: Node, last: Node, order: dict[Node, int]
) -> None:
    """Refused if what the call, or its backward, reads may be other than what its readers saw.

    The call is at ``place``; it and its backward read until ``last``.
    """
    logits = call.readers[0].logits
    asked = {part for part in call.asked or () if isinstance(part, Node)}
    if weighting is not None:
        asked.update(source for node in weighting.nodes for source in node.all_input_nodes)
    first = min((place, *(reader.node for reader in call.readers)), key=order.__getitem__)
    latest = max((last, *(reader.node for reader in call.readers)), key=order.__getitem__)
    for what, of, since, until in (
        ("the head's input, weight or bias", nodes_read(logits), logits.head.node, last),
        ("the target or weights of the loss", asked, first, latest),
    ):
        for writer in mutation.writers(_between(since, until), of=of):
            when = "between the head and the loss"
            if order[writer] > order[place]:
                when = "after the loss, whose backward reads it again"
            raise Refused(f"{describe(writer)}{at(writer)} may change {what} in place {when}")


def _reduction(readers: list[Reader], weighting: Weighting | None) -> str:
    if weighting is not None or (len(readers) == 1 and readers[0].is_summed):
        return "sum"
    # The gradient of a measure, and a second reading of the losses, take each row's own.
    by_row = any(
        reader.kind in ("log_probability", "logit")
        or (reader.kind == "logsumexp" and tensor_of(reader.node).requires_grad)
        for reader in readers
    )
    loss = readers[0].loss
    return "none" if loss is None or by_row else loss.reduction


def _between(first: Node, last: Node) -> Iterator[Node]:
    node = first
    while node is not last:
        node = node.next
        if node is not last:
            yield node
