"""What is known of a head's logits: how they were made, what nodes hold of them, who reads them."""

import enum
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch.fx import Node

from ..graph import tensor_of
from .row_steps import RowStep, ScaleRows, row_order
from .value_steps import Fill, Values, ValueStep, values_after

# The ignore_index of consumers that ignore nothing: no row has this target, except those of calls
# that have no target at all.
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

    @property
    def vocab_size(self) -> int:
        """A SymInt if it is dynamic."""
        return tensor_of(self.node).size(self.vocab_dim)


class Stage(enum.Enum):
    """What a node holds: logits, or what was made of them before a single word is read."""

    LOGITS = "logits"
    PROBABILITIES = "probabilities"
    LOG_PROBABILITIES = "log-probabilities"
    TARGET_LOGITS = "logits times a one-hot"
    TARGET_LOG_PROBABILITIES = "log-probabilities times a one-hot"
    RAISED_PROBABILITIES = "probabilities of at least some small number"
    RAISED_LOG_PROBABILITIES = "log-probabilities of at least some number"
    P_LOG_P = "probabilities times their logs"
    P_LOGIT = "probabilities times logits"
    SQUARE = "logits squared"
    ROOT = "a root of logits squared"
    INVERSE_ROOT = "the inverse of a root of logits squared"


class AliasRegion:
    """Which elements of the head's logits a node holds: the same object for the same elements."""

    def __init__(self, parent: "AliasRegion | None" = None):
        """``parent`` holds these elements, and more."""
        self.parent = parent

    def is_within(self, other: "AliasRegion") -> bool:
        region: AliasRegion | None = self
        while region is not None and region is not other:
            region = region.parent
        return region is other


@dataclass(frozen=True)
class Logits:
    """What a node after the head holds."""

    node: Node
    head: Head
    vocab_dim: int
    alias_region: AliasRegion = field(default_factory=AliasRegion)
    steps: tuple[RowStep, ...] = ()
    """From the head's rows to this node's."""
    history: tuple[ValueStep, ...] = ()
    """What was done to the values, from the head's on."""
    stage: Stage = Stage.LOGITS
    factor: float = 1.0
    """What is held is ``stage`` times this. It is 1 for ``Stage.LOGITS``."""
    offset: float = 0.0
    """Added to the squares times ``factor``, before a root is taken; 0 for other stages."""
    index: Node | None = None
    """Of the one-hot, for the stages that have one."""
    is_detached: bool = False
    """Whether the gradient that would have come back ends on the way to this node."""

    @cached_property
    def values(self) -> Values:
        """What ``history`` comes down to."""
        return values_after(self.history, self.head.bias, self.head.vocab_size)

    def then(self, *steps: ValueStep) -> "Logits":
        """These logits after ``steps``."""
        return replace(self, history=(*self.history, *steps))

    @property
    def inputs(self) -> set[Node]:
        """What they are computed from: the op reads it later than the head did."""
        biases = [bias.node for bias in self.values.biases]
        fills = [step for step in self.values.masking if isinstance(step, Fill)]
        operands = [node for step in (*self.steps, *fills) for node in step.nodes]
        return {self.head.hidden, self.head.weight, *biases, *operands}

    def same_values(self, other: "Logits") -> bool:
        """Whether both hold the same function of the same logits, row by row."""
        return self._made_alike(other) and row_order(self.steps) == row_order(other.steps)

    def holds_all_of(self, other: "Logits") -> bool:
        """Whether the rows of ``other`` are among those of this, and the same function."""
        steps = row_order(self.steps)
        return (
            self._made_alike(other)
            and other.steps[: len(steps)] == steps
            and not any(isinstance(step, ScaleRows) for step in other.steps[len(steps) :])
        )

    def _made_alike(self, other: "Logits") -> bool:
        return self.head.node is other.head.node and self.values == other.values


@dataclass(frozen=True)
class TargetUse:
    """What a consumer wants to know of a target, and how it counts."""

    target: Node
    """int64, one for each row."""
    class_weight: Node | None = None
    """``[V]``"""
    ignore_index: int = NOTHING_IGNORED
    label_smoothing: float = 0.0
    words: int | None = None
    """Negative targets count from the end of so many words. None: there are none."""

    @property
    def nodes(self) -> set[Node]:
        return {self.target} if self.class_weight is None else {self.target, self.class_weight}


class ConsumerKind(enum.Enum):
    """What is read: one number of each row, if nothing else is said."""

    LOSS = "loss"
    """A cross entropy, which may be reduced."""
    LOG_PROBABILITY = "log_probability"
    """Of the word that is the target."""
    PROBABILITY = "probability"
    """The same."""
    LOGIT = "logit"
    """The same."""
    MEAN_LOG_PROBABILITY = "mean_log_probability"
    """Over the words."""
    MEAN_LOGIT = "mean_logit"
    """The same."""
    LOGSUMEXP = "logsumexp"
    ARGMAX = "argmax"
    MAX = "max"
    """Of logits or what their softmax makes of them, as ``Logits.stage`` says."""
    ENTROPY = "entropy"
    EXPECTED_LOGIT = "expected_logit"
    """The sum of probabilities times logits."""
    TOPK_VALUES = "topk_values"
    """``k`` numbers of each row, of what ``MAX`` is."""
    TOPK_INDICES = "topk_indices"
    """The same."""
    RETURNED = "returned"
    """All of the logits, which leave the graph."""


@dataclass(frozen=True)
class Consumer:
    """A node that reads logits, and that the op can compute instead."""

    node: Node
    logits: Logits
    kind: ConsumerKind
    target_use: TargetUse | None = None
    """None if it looks at no target."""
    reduction: str = "none"
    """Of a loss: "mean", "sum" or "none"."""
    factor: float = 1.0
    """What is read is multiplied by this."""
    k: int = 0
    """Of a top-k."""
    keeps_dim: bool = False
    """Whether the vocabulary's dimension is kept, with a size of 1."""
    is_summed: bool = False
    """Whether the rows' numbers are summed as well."""
    is_differentiated: bool = False
    """Whether a gradient may reach what is read."""


@dataclass(frozen=True)
class Look:
    """A node that reads shape, dtype and device of ``seen``, and no values."""

    seen: Node
    """Made of logits."""
    logits: Logits
    """What ``seen`` holds, or what it was made of."""


@dataclass(frozen=True)
class ExpandLike:
    """A node that expands another tensor to the logits' shape."""

    logits: Logits
    tensor: Node


# What a node takes from logits that can be known without their values.
MetadataUse = Look | ExpandLike
