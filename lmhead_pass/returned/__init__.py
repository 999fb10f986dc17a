"""Logits that a compiled function returns, computed when somebody reads them.

``return_op`` has the op that makes them in a graph, ``recipe`` what they are computed from,
``lazy_logits`` the tensor that the caller gets, and ``gradient_refusal`` the error that a gradient
through them raises. Importing this registers the ops.
"""

from . import return_op
from .recipe import Step, StepKind

__all__ = ["Step", "StepKind", "return_op"]
