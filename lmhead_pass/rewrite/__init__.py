"""Carries the plans out: emits what is new, checks it, and only then takes away what is old.

``rewriter`` goes through all phases. ``checkpoint_regions`` first brings heads and losses out of
checkpointed regions. ``edit`` holds the changes to a graph until they are committed or rolled back;
``emit_calls`` inserts calls of the op, from what ``emit_inputs``, ``emit_coefficients`` and
``emit_results`` insert around them, and ``emit_returned`` what stands for logits that leave the
graph. ``report`` tells what was done. ``lazy_inputs`` leaves functions that are given such logits
to eager.
"""

from ..op import MemoryBudgetTooSmall
from .checkpoint_regions import regions_of
from .edit import GraphEdit
from .lazy_inputs import leave_lazy_inputs_to_eager, losses_of_inputs
from .report import summary
from .rewriter import prepare, rewrite_graph

__all__ = [
    "GraphEdit",
    "MemoryBudgetTooSmall",
    "leave_lazy_inputs_to_eager",
    "losses_of_inputs",
    "prepare",
    "regions_of",
    "rewrite_graph",
    "summary",
]
