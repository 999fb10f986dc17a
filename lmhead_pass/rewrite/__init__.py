"""Carries the plans out: emits what is new, checks it, and only then takes away what is old.

``rewriter`` is the whole of it. ``checkpoint_regions`` brings heads and losses out of checkpointed
regions before, ``emit_calls`` and ``emit_returned`` insert, ``report`` tells.
"""

from .checkpoint_regions import find_across_regions
from .report import summary
from .rewriter import rewrite_graph

__all__ = ["find_across_regions", "rewrite_graph", "summary"]
