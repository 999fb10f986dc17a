"""What stands between finding and replacing: a match, described, or a refusal, with its reason."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

# The ignore_index of readers that ignore nothing: the target of no row, but of one that has none.
NOTHING_IGNORED = -(1 << 63)


class Refused(Exception):
    """Raised while a match is read: this is not one, and the message tells a user why."""


@dataclass(frozen=True)
class Refusal:
    """A loss over logits that is left as it is."""

    loss: Node
    reason: str


@dataclass(frozen=True)
class Head:
    """A linear layer: ``logits = hidden @ weight.T + bias``."""

    node: Node
    """What computes the logits."""
    hidden: Node
    """``[*rows, H]``, or with ``H`` in another place: ``hidden_dim``."""
    weight: Node
    """``[V, H]``, or ``[H, V]`` if ``weight_is_transposed``, or ``[V, H, 1]`` of a convolution."""
    weight_is_transposed: bool
    bias: Node | None
    """``[V]``"""
    vocab_dim: int
    """Which dimension of the logits is the vocabulary; the others are ``rows``, in order."""
    hidden_dim: int = -1


@dataclass(frozen=True)
class RowStep:
    """An operation on the rows of the logits, as it is to be done on the hidden states instead.

    ``method`` is ``"reshape"`` (args: the row sizes), ``"permute"`` (args: the order of the row
    dimensions), ``"getitem"`` (args: an index for each row dimension), ``"piece"`` (args: a method
    that gives a tuple, its arguments, the dimension, and which piece is taken) or ``"mul"``,
    ``"div"`` (args: a factor or divisor that is one number, or one for each row with a 1 for the
    vocabulary). The hidden dimension comes after the rows, and is left as it is.
    """

    method: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Bias:
    """A number for each word, added to the logits."""

    node: Node
    """``[V]``, perhaps with dimensions of size 1 around it; a mask if there is a ``fill``."""
    factor: float = 1.0
    fill: float | None = None
    """What is added where the mask ``node`` is True; 0 elsewhere."""
    words: tuple[int, int] | None = None
    """The part of ``node`` that is added; None: all of it."""


@dataclass(frozen=True)
class Values:
    """What becomes of each of the head's logits ``x`` (without the head's own bias):

    z = scale x + biases + shift                    or, with a cap,
    z = cap tanh(scale x + biases + inner) + shift
    """

    scale: float = 1.0
    biases: tuple[Bias, ...] = ()
    inner: float = 0.0
    cap: float | None = None
    shift: float = 0.0


@dataclass(frozen=True)
class Logits:
    """What a node after the head holds."""

    node: Node
    head: Head
    vocab_dim: int
    extent: "Extent"
    values: Values
    steps: tuple[RowStep, ...] = ()
    """From the head's rows to this node's."""
    words: tuple[int, int] | None = None
    """The part of the vocabulary that counts; None: all of it. Behind it may be words so unlikely
    that they count for nothing."""
    stage: str = "logits"
    """``logits``; what a softmax makes of them: ``probabilities``, ``log_probabilities``; and the
    products ``selected`` and ``selected_logits`` (of log-probabilities or logits and a one-hot
    ``index``), ``p_log_p``, ``p_z``."""
    factor: float = 1.0
    """By which what ``stage`` names is multiplied, beyond ``logits``."""
    index: Node | None = None
    is_detached: bool = False
    """Whether the gradient that would have come back ends on the way to this node."""
    history: tuple[tuple[Any, ...], ...] = ()
    """What was done to the values, in order, from the head's on: an operation and its operand."""

    @property
    def is_masked(self) -> bool:
        """Whether some words are so unlikely that they count for nothing."""
        return any(bias.fill is not None for bias in self.values.biases) or any(
            step[0] == "fill" for step in self.history
        )

    def same_values(self, other: "Logits") -> bool:
        """Whether both hold the same function of the same logits, row by row."""
        return self._made_alike(other) and row_order(self.steps) == row_order(other.steps)

    def holds_all_of(self, other: "Logits") -> bool:
        """Whether the rows of ``other`` are among those of this, and the same function."""
        steps = row_order(self.steps)
        return (
            self._made_alike(other)
            and other.steps[: len(steps)] == steps
            and not any(step.method in ("mul", "div") for step in other.steps[len(steps) :])
        )

    def _made_alike(self, other: "Logits") -> bool:
        return (self.head.node, self.values, self.words) == (
            *(other.head.node, other.values, other.words),
        )


class Extent:
    """Which elements of the head's logits a node holds: all nodes of one extent hold the same."""

    def __init__(self, parent: "Extent | None" = None):
        self.parent = parent

    def is_within(self, other: "Extent") -> bool:
        extent: Extent | None = self
        while extent is not None and extent is not other:
            extent = extent.parent
        return extent is other


def row_order(steps: tuple[RowStep, ...]) -> tuple[RowStep, ...]:
    """``steps`` without those that change the shape of the rows alone, not which come when."""
    while steps and steps[-1].method == "reshape":
        steps = steps[:-1]
    return steps


@dataclass(frozen=True)
class Loss:
    """A cross entropy of logits and class indices."""

    logits: Node
    target: Node
    class_weight: Node | None
    reduction: str
    ignore_index: int
    label_smoothing: float
    wants_log_probabilities: bool
    """Whether it is ``nll_loss``, which takes what ``log_softmax`` gives."""


@dataclass(frozen=True)
class Reader:
    """A node that reads logits, and that the op can compute instead."""

    node: Node
    logits: Logits
    kind: str
    """``loss``: a Loss. ``log_probability``, ``logit``: those of the words ``target``.
    ``logsumexp``, ``argmax``, ``max``, ``entropy``, ``expected_logit``: one number for each row.
    ``topk_values:k``, ``topk_indices:k``: k of them.
    ``returned``: the logits leave the graph."""
    loss: Loss | None = None
    target: Node | None = None
    factor: float = 1.0
    keeps_dim: bool = False
    """Whether the vocabulary's dimension is kept, with a size of 1."""
    is_summed: bool = False
    """Whether the rows' numbers are summed as well."""


@dataclass(frozen=True)
class Fact:
    """What a node takes from logits that can be known without their values."""

    logits: Logits
    kind: str
    """``size``: that of the dimension ``operand``. ``to``: the dtype, for the tensor ``operand``.
    ``expand``: the shape, for the tensor ``operand``."""
    operand: Any


@dataclass(frozen=True)
class Step:
    """A step from numbers, or from what is made of them, to a sum: linear in them, or a square."""

    node: Node
    """What makes the step."""
    source: Node
    """What has made the numbers that it takes, and ..."""
    name: Node
    """... by which name it reads them: another node, if ``source`` has written to that."""
    kind: str
    """``scale``: each number times what is known. ``move``: each is one of the numbers, or none.
    ``square``: of each. ``sum``: otherwise linear."""
    back: Callable[..., Node]
    """Inserts what becomes of a gradient on the way back."""
    reads: tuple[Node, ...] = ()
    """What that takes."""
    has_others: bool = False
    """Whether there is anything else in the result."""


@dataclass(frozen=True)
class Weighting:
    """How a single number is a sum of others, each times a weight that does not depend on these."""

    steps: tuple[Step, ...]
    """In graph order."""

    @property
    def nodes(self) -> tuple[Node, ...]:
        """What is behind the numbers; the last one is the sum."""
        return tuple(dict.fromkeys(step.node for step in self.steps))

    @property
    def sum(self) -> Node:
        return self.steps[-1].node

    @property
    def is_scaled(self) -> bool:
        """Whether there are factors on the way."""
        return any(step.kind == "scale" for step in self.steps)

    @property
    def reads(self) -> set[Node]:
        """What the weights are made of."""
        return {node for step in self.steps for node in step.reads}

    @property
    def squared(self) -> set[Node]:
        """What squares are taken of, and what that is made of."""
        nodes: set[Node] = set()
        for step in reversed(self.steps):
            if step.kind == "square" or step.node in nodes:
                nodes.add(step.source)
        return nodes


@dataclass(frozen=True)
class Match:
    """What one call of the op computes: a loss of logits, or other readers of the same logits."""

    readers: tuple[Reader, ...]
    """All of the same rows and values of the same head's logits."""
    reduction: str
    """What the op gives: ``"mean"``, ``"sum"``, or with ``"none"`` each row's own loss."""
    place: Node
    """The call comes before this node."""
    moved: tuple[Node, ...]
    """What has to be moved before ``place`` first, in this order."""
    weighting: Weighting | None
    """What is done to the per-row losses of the only reader, if that is a weighted sum."""
    tokens: int | torch.SymInt
    vocab_size: int | torch.SymInt
    compute_dtype: torch.dtype
    rows_per_chunk: int
    returns_logits: bool
    """Whether logits of the same head leave the graph, in another way than before."""

    @property
    def logits(self) -> Logits:
        return self.readers[0].logits

    @property
    def node(self) -> Node:
        """The reader that the match is named after."""
        return self.readers[0].node


@dataclass(frozen=True)
class Rewrite:
    """A head whose logits go to nothing but what the op computes."""

    matches: tuple[Match, ...]
    returned: tuple[Logits, ...]
    """What of them leaves the graph and is to be computed when it is read."""
    nodes: tuple[Node, ...]
    """What computes the logits and what is made of them: not needed any more, in graph order."""
    facts: dict[Node, Fact]
    """What looks at the logits' shape or dtype alone."""


def with_values(logits: Logits, **changes: Any) -> Logits:
    return replace(logits, values=replace(logits.values, **changes))
