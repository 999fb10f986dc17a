"""Why something is left as it is: an exception while it is read, a value afterwards."""

from dataclasses import dataclass

from torch.fx import Node


class Refused(Exception):
    """Raised while a match is read: this is not one, and the message tells a user why."""


@dataclass(frozen=True)
class Refusal:
    """A loss over logits that is left as it is."""

    loss: Node
    reason: str
