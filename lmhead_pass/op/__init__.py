"""The op that a match is rewritten to: ``torch.ops.lmhead_pass.linear_cross_entropy``.

``ops`` has its schemas and gradients, ``problem`` its arguments, ``chunking`` how many rows of
logits exist at once, and ``kernels`` the loops over chunks, in ATen and in Triton. Importing this
registers the op; it knows nothing of graphs.
"""

from . import ops
from .chunking import plan_rows

__all__ = ["ops", "plan_rows"]
