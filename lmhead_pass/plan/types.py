"""The plan for one head: which calls of the op take the place of what reads its logits."""

from dataclasses import dataclass

import torch
from torch.fx import Node

from ..graph import hint, tensor_of
from ..logits import Consumer, Logits, MetadataUse, TargetUse
from ..op import Chunks, row_bytes


@dataclass(frozen=True)
class Match:
    """What one call of the op computes: a loss of logits, or other consumers of the same logits."""

    consumers: tuple[Consumer, ...]
    """All read the same rows and values of one head's logits. A loss comes first."""
    reduction: str
    """Of the op: ``"mean"``, ``"sum"``, or ``"none"`` for one loss for each row."""
    place: Node
    """The call comes before this node."""
    moved: tuple[Node, ...]
    """These nodes have to be moved before ``place`` first, in this order."""
    tokens: int | torch.SymInt
    vocab_size: int | torch.SymInt
    compute_dtype: torch.dtype
    chunks: Chunks
    returns_logits: bool
    """Whether logits of the same head leave the graph, lazily or detached."""

    @property
    def logits(self) -> Logits:
        return self.consumers[0].logits

    @property
    def target_use(self) -> TargetUse | None:
        """The same for all consumers that have one; None if no consumer looks at a target."""
        uses = (consumer.target_use for consumer in self.consumers)
        return next((use for use in uses if use is not None), None)

    @property
    def differentiable(self) -> tuple[Consumer, ...]:
        """The consumers that a gradient may reach."""
        return tuple(c for c in self.consumers if c.is_differentiated)

    @property
    def logits_bytes(self) -> int:
        """Of the logits that are avoided, but for those of one chunk."""
        return hint(self.tokens) * hint(self.vocab_size) * self.compute_dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Of the logits that exist at once."""
        hidden = tensor_of(self.logits.head.hidden)
        of_row = row_bytes(
            hint(hidden.size(self.logits.head.hidden_dim)),
            hint(self.vocab_size),
            self.compute_dtype,
            hidden.device,
        )
        return min(hint(self.tokens), self.chunks.rows) * of_row

    @property
    def node(self) -> Node:
        """The consumer that the match is named after."""
        return self.consumers[0].node


@dataclass(frozen=True)
class Rewrite:
    """A head all of whose consumers the op can serve."""

    matches: tuple[Match, ...]
    returned: tuple[Logits, ...]
    """Logits that leave the graph, and are computed when they are read."""
    views: dict[Node, tuple[Node, str]]
    """Which of these are views of others of these: of which, and how (``returned.encode_view``)."""
    nodes: tuple[Node, ...]
    """What computes and holds the logits, in graph order: nobody needs it any more."""
    metadata_uses: dict[Node, MetadataUse]
    """What reads the logits' shape or dtype, and not their values."""
