"""What stands between finding and replacing: a match, described, or a refusal, with its reason."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node


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
    """``[*rows, H]``"""
    weight: Node
    """``[V, H]``, or ``[H, V]`` if ``weight_is_transposed``."""
    weight_is_transposed: bool
    bias: Node | None
    """``[V]``"""
    vocab_dim: int
    """Which dimension of the logits is the vocabulary; the others are ``rows``, in order."""


@dataclass(frozen=True)
class RowStep:
    """An operation on the rows of the logits, as it is to be done on the hidden states instead.

    ``method`` is ``"reshape"`` (args: the row sizes), ``"permute"`` (args: the order of the row
    dimensions) or ``"getitem"`` (args: an index for each row dimension). The hidden dimension comes
    after the rows, and is left as it is.
    """

    method: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Logits:
    """What a node between head and loss holds."""

    node: Node
    vocab_dim: int
    steps: tuple[RowStep, ...] = ()
    """From the head's rows to this node's."""
    are_log_probabilities: bool = False


@dataclass(frozen=True)
class Loss:
    """A cross entropy of logits and class indices."""

    node: Node
    logits: Node
    target: Node
    class_weight: Node | None
    reduction: str
    ignore_index: int
    label_smoothing: float
    wants_log_probabilities: bool
    """Whether it is ``nll_loss``, which takes what ``log_softmax`` gives."""


@dataclass(frozen=True)
class Returned:
    """Logits that leave the graph."""

    head: Head
    """What they are computed from, perhaps after the graph has run."""
    logits: Logits
    path: tuple[Node, ...]
    """The nodes from the head to them, both included."""


@dataclass(frozen=True)
class Match:
    """A head and a loss, and all that lies between them."""

    head: Head
    loss: Loss
    steps: tuple[RowStep, ...]
    """What is done to the rows between them."""
    path: tuple[Node, ...]
    """The nodes that hold logits, from the head on, without the loss."""
    tokens: int | torch.SymInt
    vocab_size: int | torch.SymInt
    compute_dtype: torch.dtype
    rows_per_chunk: int
    returned: tuple[Returned, ...]
    """Logits of the same head that leave the graph, and are to be returned in another way."""
