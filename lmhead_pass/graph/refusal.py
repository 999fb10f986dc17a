"""Why the pass leaves a loss as it is: an exception while it reads, a value afterwards."""

from dataclasses import dataclass

from torch.fx import Node


class Refused(Exception):
    """What the pass reads cannot be rewritten. The message tells the user why."""


@dataclass(frozen=True)
class Refusal:
    """A loss over logits that the pass leaves as it is."""

    loss: Node
    reason: str
