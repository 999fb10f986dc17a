"""Losses that are taken outside of the compiled function, of logits that it returned.

What was done to the logits is written down (``returned``). ``ways`` says what of it makes a graph
another one, ``recording`` makes that graph, as Dynamo would have, and ``rewriting`` gives it to the
pass that rewrites any graph. ``fused_reader`` keeps what comes of it.
"""

from .fused_reader import reader_of

__all__ = ["reader_of"]
