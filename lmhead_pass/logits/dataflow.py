"""Where a head's logits go: what each node holds of them, and who reads them.

A walk forward in graph order, not back from a loss: writes in place (``logits.div_(2)``) have no
edge to the loss that comes after them, and change what every other name of the logits holds.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Node

from ..graph import (
    Refused,
    at,
    canonical_op,
    describe,
    draws,
    given_a_gradient,
    gradients_are_recorded,
    in_inference,
    is_cut_off,
    is_in_place,
    is_pieces,
    memory_of,
    mutation,
    passing,
    same,
    same_shape,
    seen_by,
    tensor_of,
    value_of,
)
from .algebraic_caps import times_root
from .consumers import consumers_of_largest, differentiated, read
from .row_steps import row_order
from .rows import follow_pieces, follow_rows, is_row_step
from .softmaxes import follow_softmax, is_softmax_step, less_logsumexp, times, times_one_hot
from .types import (
    Consumer,
    ConsumerKind,
    ExpandLike,
    Head,
    Logits,
    Look,
    MetadataUse,
    Stage,
)
from .value_steps import Cast
from .values import fill_words, follow_values, is_fill, is_value_step, read_fill

_OF_A_LOSS = (
    *(ConsumerKind.LOSS, ConsumerKind.LOG_PROBABILITY, ConsumerKind.LOGSUMEXP),
    ConsumerKind.MEAN_LOG_PROBABILITY,
)


@dataclass(frozen=True)
class _UnknownContents:
    """After a write that is not understood, nobody knows what a node holds."""

    writer: Node


@dataclass
class Flow:
    """The logits of a head, followed to the end of the graph."""

    head: Head
    consumers: list[Consumer] = field(default_factory=list)
    """What reads the logits and can be computed by the op instead, in graph order."""
    unsupported: dict[Node, str] = field(default_factory=dict)
    """What else reads or writes the logits, and why it is not supported; perhaps ""."""
    nodes: set[Node] = field(default_factory=set)
    """What holds logits, or writes to them. Once the op serves the consumers, nobody needs it."""
    returned: list[Logits] = field(default_factory=list)
    """Logits that leave the graph."""
    metadata_uses: dict[Node, MetadataUse] = field(default_factory=dict)
    """What reads the logits' shape or dtype, and not their values."""

    @property
    def losses(self) -> list[Consumer]:
        """The consumers that make a loss. Others alone are no reason to rewrite a head."""
        return [consumer for consumer in self.consumers if consumer.kind in _OF_A_LOSS]

    @property
    def claimed(self) -> set[Node]:
        """What need not be computed any more once the op serves the consumers."""
        return self.nodes | {consumer.node for consumer in self.consumers}


def follow_logits(head: Head) -> Flow:
    """Follow what ``head`` computes through its graph."""
    (flow,) = follow_heads([head])
    return flow


def follow_heads(heads: Iterable[Head]) -> list[Flow]:
    """The same for several heads of one graph."""
    flows: list[Flow] = []
    gradients: tuple[set[Node], set[int]] | None = None
    for head in heads:
        graph = head.node.graph
        gradients = gradients or (passing(graph), given_a_gradient(graph))
        flows.append(_LogitsTracker(head, *gradients).run())
    return flows


class _LogitsTracker:
    def __init__(self, head: Head, passing: set[Node], given_a_gradient: set[int]):
        inputs = [node for node in (head.hidden, head.weight, head.bias) if node is not None]
        self.logits = Logits(
            node=head.node,
            head=head,
            vocab_dim=head.vocab_dim,
            is_detached=not tensor_of(head.node).requires_grad
            and any(tensor_of(node).requires_grad for node in inputs),
        )
        self.holds: dict[Node, Any] = {head.node: self.logits}
        """What each node holds: Logits, or _UnknownContents. A node that gives a tuple holds a list
        of Logits, of Consumers, or of None for members that do not come from the logits."""
        self.flow = Flow(head, nodes={head.node})
        self.absorbed: set[Node] = set()
        """Nodes that only make an operand of a followed operation, such as the logsumexp in
        ``logits - logsumexp``. They go with the logits, unless somebody else reads them."""
        self.without_history: set[Node] = set()
        """Made without autograd: no gradient gets through, even if the node requires one."""
        self.passing = passing
        self.given_a_gradient = given_a_gradient

    def run(self) -> Flow:
        inference = in_inference(self.logits.node.graph)
        for node in _from(self.logits.node):
            inputs = [source for source in node.all_input_nodes if source in self.holds]
            if node in inference or (inputs and is_cut_off(node)):
                self.without_history.add(node)
            if inputs:
                try:
                    self._check_history(node, inputs)
                    self._visit(node, inputs)
                except Refused as refused:
                    if not self._is_only_seen(node, inputs[0]):
                        self.flow.unsupported[node] = _with_place(str(refused), node)
        self._drop_what_was_absorbed()
        return self.flow

    def _visit(self, node: Node, inputs: list[Node]) -> None:
        for source in inputs:
            if isinstance(held := self.holds[source], _UnknownContents):
                raise Refused(
                    f"{describe(held.writer)}{at(held.writer)} writes to the logits in place, and "
                    "what is in them afterwards is not understood"
                )
        if node.op == "output":
            return self._leave(inputs)
        if is_in_place(node):
            return self._write(node)
        if canonical_op(node) == "getitem" and isinstance(held := self.holds[inputs[0]], list):
            if type(node.args[1]) is not int:
                raise Refused(f"{describe(node)} takes several parts of a tuple")
            return self._take(node, held[node.args[1]])
        logits = self._first(node, inputs)
        if (use := self._metadata_use(logits, node)) is not None:
            self.flow.metadata_uses[node] = use
        elif (consumer := read(logits, node)) is not None:
            if not self._is_only_seen(node, inputs[0]):
                self._consume(consumer, node)
        elif (largest := consumers_of_largest(logits, node)) is not None:
            self._hold(node, largest)
        elif canonical_op(node) == "broadcast_tensors":
            self._broadcast(node, logits)
        elif is_pieces(node):
            self._hold(node, follow_pieces(logits, node))
        else:
            self._hold(node, self._checked(logits, self._step(logits, node, inputs), node))
        return None

    def _check_history(self, node: Node, inputs: list[Node]) -> None:
        """Refused if a gradient would flow through ``node`` to where the model sends none."""
        value = value_of(node)
        if (
            node not in self.without_history
            and not self.without_history.isdisjoint(inputs)
            and isinstance(value, torch.Tensor)
            and value.requires_grad
        ):
            raise Refused(f"{describe(node)} takes a gradient of what was made without autograd")

    def _first(self, node: Node, inputs: list[Node]) -> Logits:
        logits = self.holds[inputs[0]]
        if not isinstance(logits, Logits):
            raise Refused(f"{describe(node)} reads a tuple of logits")
        return logits

    def _step(self, logits: Logits, node: Node, inputs: list[Node]) -> Logits:
        if len(inputs) == 2 and canonical_op(node) in ("mul", "div"):
            both = [self.holds[source] for source in inputs]
            if (capped := times_root(node, *both)) is not None:
                return capped
            if canonical_op(node) == "mul":
                return times(*both)
        if (chain := less_logsumexp(logits, node)) is not None:
            self.absorbed.update(chain)
            return replace(logits, stage=Stage.LOG_PROBABILITIES)
        if (hot := times_one_hot(logits, node)) is not None:
            self.absorbed.update(hot[1])
            of_logits = logits.stage is Stage.LOGITS
            stage = Stage.TARGET_LOGITS if of_logits else Stage.TARGET_LOG_PROBABILITIES
            return replace(logits, stage=stage, index=hot[0])
        if len(inputs) > 1:
            raise Refused(f"{describe(node)} puts logits together")
        if is_softmax_step(logits, node):
            return follow_softmax(logits, node)
        if is_value_step(node):
            return follow_values(logits, node)
        if not node.args or node.args[0] is not logits.node:
            raise Refused("")
        if is_row_step(node):
            return follow_rows(logits, node)
        raise Refused("")

    def _checked(self, before: Logits, after: Logits, node: Node) -> Logits:
        """``after`` as what ``node`` holds, with its dtype and whether it has a gradient."""
        old, new = tensor_of(before.node), tensor_of(node)
        if old.device != new.device:
            raise Refused(f"{describe(node)} moves the logits from {old.device} to {new.device}")
        if not new.is_floating_point() or (new.dtype == torch.float64) != (
            old.dtype == torch.float64
        ):
            raise Refused(f"{describe(node)} turns {old.dtype} logits into {new.dtype}")
        if before.is_detached and new.requires_grad:
            raise Refused(f"{describe(node)} brings a gradient into detached logits")
        is_detached = before.is_detached or (old.requires_grad and not new.requires_grad)
        if old.dtype != new.dtype and after.history[-1:] != (Cast(new.dtype),):
            after = after.then(Cast(new.dtype))  # by promotion
        return replace(after, node=node, is_detached=is_detached)

    def _hold(self, node: Node, held: Any) -> None:
        self.holds[node] = held
        self.flow.nodes.add(node)

    def _consume(self, consumer: Consumer, reader: Node) -> None:
        if not memory_of(consumer.node).isdisjoint(self.given_a_gradient):
            raise Refused(f"{describe(consumer.node)} is given a gradient by a write")
        if tensor_of(consumer.node).requires_grad and consumer.node in self.passing:
            consumer = differentiated(consumer, reader)
        self.flow.consumers.append(consumer)

    def _take(self, node: Node, item: Any) -> None:
        if isinstance(item, Consumer):
            self._consume(replace(item, node=node), node.args[0])
        elif item is not None:
            before = next(source for source in node.args[0].all_input_nodes if source in self.holds)
            self._hold(node, self._checked(self.holds[before], item, node))

    def _broadcast(self, node: Node, logits: Logits) -> None:
        """``broadcast_tensors`` of logits and others, if all get the shape of the logits."""
        shape, place = tensor_of(logits.node).shape, node.args.index(logits.node)
        after = value_of(node)[place].shape
        if len(shape) != len(after) or not all(map(same, after, shape)):
            raise Refused(f"{describe(node)} repeats the logits")
        self._hold(node, [logits if number == place else None for number in range(len(node.args))])
        for user in node.users:
            if user.args[1] != place:
                self.flow.metadata_uses[user] = ExpandLike(logits, node.args[user.args[1]])

    def _metadata_use(self, logits: Logits, node: Node) -> MetadataUse | None:
        """What ``node`` reads of the logits, if that is not their values; else None."""
        is_size = node.target is torch.ops.aten.sym_size.int
        if not (is_size or seen_by(node) is logits.node) or is_in_place(node):
            return None
        others = [source for source in node.all_input_nodes if source is not logits.node]
        if not self.holds.keys().isdisjoint(others) or not _is_contiguous(node):
            return None
        return Look(logits.node, logits)

    def _is_only_seen(self, node: Node, source: Node) -> bool:
        """Whether of ``node``, whatever it makes of ``source``, only shape and dtype are read.

        Then nobody needs it.
        """
        value, logits = value_of(node), self.holds[source]
        if (
            not isinstance(value, torch.Tensor)
            or not isinstance(logits, Logits)
            or not all(isinstance(size, int) for size in value.shape)
            or mutation.may_write(node)
            or draws(node)
        ):
            return False
        looks = [user for user in node.users if seen_by(user) is node and not is_in_place(user)]
        alone = [user for user in looks if self.holds.keys().isdisjoint(user.all_input_nodes)]
        if not alone or len(alone) < len(node.users) or not all(map(_is_contiguous, alone)):
            return False
        self.flow.nodes.add(node)
        self.flow.metadata_uses |= dict.fromkeys(alone, Look(node, logits))
        return True

    def _leave(self, inputs: list[Node]) -> None:
        for source in inputs:
            logits = self.holds[source]
            if not isinstance(logits, Logits):
                raise Refused("a tuple of logits leaves the graph")
            self.flow.returned.append(logits)

    def _write(self, node: Node) -> None:
        """Follow a write in place to logits: it changes every node in the same memory."""
        written = node.args[0]
        before = self.holds.get(written)
        if not isinstance(before, Logits) or not self.holds.keys().isdisjoint(
            node.all_input_nodes[1:]
        ):
            raise Refused(f"{describe(node)} puts logits into another tensor")
        if not memory_of(written).isdisjoint(self.given_a_gradient):
            raise Refused(f"{describe(node)} brings a gradient into detached logits")
        change = self._change_by(node, before)
        is_recorded = gradients_are_recorded(node) or not tensor_of(written).requires_grad
        for other, held in list(self.holds.items()):
            if memory_of(written).isdisjoint(memory_of(other)):
                continue
            is_clear = (
                is_recorded
                and isinstance(held, Logits)
                and (
                    held.alias_region.is_within(before.alias_region)
                    or _fills_all(node, before, held)
                )
                and tensor_of(other).requires_grad == tensor_of(written).requires_grad
            )
            self.holds[other] = (change(held) if is_clear else None) or _UnknownContents(node)
        self.flow.nodes.add(node)
        if isinstance(value_of(node), torch.Tensor):
            after = self.holds[written]
            is_clear = isinstance(after, Logits)
            self.holds[node] = self._checked(before, after, node) if is_clear else after

    def _change_by(self, node: Node, written: Logits) -> Callable[[Logits], Logits | None]:
        """A function from what a node held before the write to what it holds after it.

        It returns None where that is unclear. Refused if it is unclear for ``written`` itself.
        """
        if written.stage is not Stage.LOGITS:
            raise Refused(f"{describe(node)} writes to {written.stage.value} in place")
        if is_fill(node):
            step = read_fill(written, node)
            return lambda held: fill_words(held, written, step)
        follow_values(written, node)
        by_number = len(node.all_input_nodes) == 1

        def change(held: Logits) -> Logits | None:
            if held.stage is not Stage.LOGITS or not (by_number or _look_alike(held, written)):
                return None
            return follow_values(held, node)

        return change

    def _drop_what_was_absorbed(self) -> None:
        """Let nodes go that only made an operand; they are no consumers."""
        gone = {node for node in self.absorbed if self._is_inside(node)}
        self.flow.consumers = [
            consumer for consumer in self.flow.consumers if consumer.node not in gone
        ]
        self.flow.nodes |= gone

    def _is_inside(self, node: Node) -> bool:
        return all(
            user in self.flow.nodes or (user in self.absorbed and self._is_inside(user))
            for user in node.users
        )


def _with_place(reason: str, node: Node) -> str:
    name = describe(node)
    return f"{name}{at(node)}{reason.removeprefix(name)}" if reason.startswith(name) else reason


def _from(node: Node) -> Iterator[Node]:
    while node.op != "output":
        node = node.next
        yield node


def _is_contiguous(node: Node) -> bool:
    """Whether ``node`` has the strides that it has of a tensor with any strides, or has none."""
    value = value_of(node)
    return (
        not isinstance(value, torch.Tensor) or canonical_op(node) != "like" or value.is_contiguous()
    )


def _fills_all(node: Node, written: Logits, held: Logits) -> bool:
    """Whether ``node`` sets words in all rows of ``held``, which may have more of them."""
    return is_fill(node) and row_order(held.steps) == row_order(written.steps)


def _look_alike(a: Logits, b: Logits) -> bool:
    """Whether both have the same elements in the same places."""
    return (
        a.alias_region is b.alias_region
        and a.vocab_dim == b.vocab_dim
        and a.values.vocab_slice == b.values.vocab_slice
        and a.steps == b.steps
        and same_shape(a.node, b.node)
    )
