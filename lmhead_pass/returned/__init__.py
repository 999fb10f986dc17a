"""Logits that a compiled function returns, computed when somebody reads them.

``return_op`` is the node that makes them, ``recipe`` what they are computed from, ``lazy_logits``
the tensor that the caller gets, and ``gradient_refusal`` what a gradient through them meets.
Importing this registers the ops.
"""

from . import return_op

__all__ = ["return_op"]
