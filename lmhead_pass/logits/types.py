"""What is known of a head's logits: how they were made, what a node holds of them, who reads them."""

from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

# The ignore_index of consumers that ignore nothing: the target of no row, but of one that has none.
NOTHING_IGNORED = -(1 << 63)


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
    vocab_slice: tuple[int, int] | None = None
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
    alias_region: "AliasRegion"
    values: Values
    steps: tuple[RowStep, ...] = ()
    """From the head's rows to this node's."""
    vocab_slice: tuple[int, int] | None = None
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
        return (self.head.node, self.values, self.vocab_slice) == (
            *(other.head.node, other.values, other.vocab_slice),
        )


class AliasRegion:
    """Which elements of the head's logits a node holds: all nodes of one alias_region hold the same."""

    def __init__(self, parent: "AliasRegion | None" = None):
        self.parent = parent

    def is_within(self, other: "AliasRegion") -> bool:
        alias_region: AliasRegion | None = self
        while alias_region is not None and alias_region is not other:
            alias_region = alias_region.parent
        return alias_region is other


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
class Consumer:
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
class MetadataUse:
    """What a node takes from logits that can be known without their values."""

    logits: Logits
    kind: str
    """``size``: that of the dimension ``operand``. ``to``: the dtype, for the tensor ``operand``.
    ``expand``: the shape, for the tensor ``operand``."""
    operand: Any


def with_values(logits: Logits, **changes: Any) -> Logits:
    return replace(logits, values=replace(logits.values, **changes))
