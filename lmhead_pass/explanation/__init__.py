"""``lmhead_pass.explain``: what the pass makes of a function, and what to change about it."""

from .explain import Explanation, explain

__all__ = ["Explanation", "explain"]
