"""The plan for one head: which calls of the op take the place of what reads its logits."""

from dataclasses import dataclass

import torch
from torch.fx import Node

from ..graph import tensor_of
from ..logits import Consumer, Logits, MetadataUse, TargetUse
from ..sums import LinearReduction


@dataclass(frozen=True)
class Match:
    """What one call of the op computes: a loss of logits, or other consumers of the same logits."""

    consumers: tuple[Consumer, ...]
    """All of the same rows and values of the same head's logits."""
    reduction: str
    """What the op gives: ``"mean"``, ``"sum"``, or with ``"none"`` each row's own loss."""
    place: Node
    """The call comes before this node."""
    moved: tuple[Node, ...]
    """What has to be moved before ``place`` first, in this order."""
    linear_reduction: LinearReduction | None
    """What is done to the per-row losses of the only consumer, if that is a weighted sum."""
    tokens: int | torch.SymInt
    vocab_size: int | torch.SymInt
    compute_dtype: torch.dtype
    rows_per_chunk: int
    returns_logits: bool
    """Whether logits of the same head leave the graph, in another way than before."""

    @property
    def logits(self) -> Logits:
        return self.consumers[0].logits

    @property
    def target_use(self) -> TargetUse | None:
        """The same for all consumers that have one; None if no consumer looks at a target."""
        uses = (consumer.target_use for consumer in self.consumers)
        return next((use for use in uses if use is not None), None)

    @property
    def wanting(self) -> tuple[Consumer, ...]:
        """The consumers that have a gradient."""
        return tuple(c for c in self.consumers if tensor_of(c.node).requires_grad)

    @property
    def node(self) -> Node:
        """The consumer that the match is named after."""
        return self.consumers[0].node


@dataclass(frozen=True)
class Rewrite:
    """A head whose logits go to nothing but what the op computes."""

    matches: tuple[Match, ...]
    returned: tuple[Logits, ...]
    """What of them leaves the graph and is to be computed when it is read."""
    nodes: tuple[Node, ...]
    """What computes the logits and what is made of them: not needed any more, in graph order."""
    metadata_uses: dict[Node, MetadataUse]
    """What looks at the logits' shape or dtype alone."""
