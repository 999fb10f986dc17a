"""What is to take the place of the logits: for each head a plan, or a refusal with its reason.

``matcher`` goes from each head to a ``Rewrite``. ``call_planning`` decides which consumers share a
call of the op, and where it stands; ``call_fusion`` which calls become one, because they end in one
sum, and ``call_memory`` which ones leave their gradients to the backward; ``returned_plan`` whether
logits that leave the graph can be computed later. Nothing is changed here.
"""

from .call_fusion import FusedCall, plan_fused_calls
from .matcher import find, has_no_head, unread_heads
from .returned_plan import is_whole, recipe_of, sources_of
from .types import Match, Rewrite

__all__ = [
    "FusedCall",
    "Match",
    "Rewrite",
    "find",
    "has_no_head",
    "is_whole",
    "plan_fused_calls",
    "recipe_of",
    "sources_of",
    "unread_heads",
]
