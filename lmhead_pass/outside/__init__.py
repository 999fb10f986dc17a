"""Losses that are taken outside of the compiled function, of logits that it returned.

What was done to the logits is written down (``returned``); ``recording`` makes a graph of it, as
Dynamo would have, and ``fused_reader`` gives that to the pass that rewrites any graph.
"""

from .fused_reader import reader_of

__all__ = ["reader_of"]
