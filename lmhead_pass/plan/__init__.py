"""What is to take the place of the logits: for each head a plan, or a refusal with its reason.

``matcher`` goes from each head to a ``Rewrite``. ``call_planning`` decides which consumers share a
call of the op, and where it stands; ``call_fusion`` which calls become one, because they end in one
sum, and ``call_memory`` which ones leave their gradients to the backward; ``returned_plan`` whether
logits that leave the graph can be computed later, and ``returned_views`` which of them are views of
which; ``compared`` which numbers of a row are asked to be the same. ``unreached`` tells of losses
that no head was followed to. Nothing is changed here.
"""

from .call_fusion import (
    FusedCall,
    leaves_gradients_to_backward,
    plan_fused_calls,
    run_the_same_behind,
)
from .matcher import check_derivatives, find, unread_heads
from .returned_plan import (
    ends_in_a_break,
    is_differentiable,
    is_frozen_view,
    is_whole,
    recipe_of,
)
from .types import Match, Rewrite
from .unreached import has_no_head, way_up

__all__ = [
    "FusedCall",
    "Match",
    "Rewrite",
    "check_derivatives",
    "ends_in_a_break",
    "find",
    "has_no_head",
    "is_differentiable",
    "is_frozen_view",
    "is_whole",
    "leaves_gradients_to_backward",
    "plan_fused_calls",
    "recipe_of",
    "run_the_same_behind",
    "unread_heads",
    "way_up",
]
