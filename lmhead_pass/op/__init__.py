"""The op that a match is rewritten to: ``torch.ops.lmhead_pass.linear_cross_entropy``.

``torch_ops`` has its schemas and gradients, ``problem`` its arguments, ``chunking`` the number of
rows of logits that exist at once, ``memory_budget`` what fits into ``config.memory_budget``, and
``kernels`` the loops over chunks, in ATen and in Triton.
Importing this registers the op; it knows nothing of graphs.
"""

from . import torch_ops
from .chunking import row_bytes
from .holding import can_hold_exponentials
from .memory_budget import Chunks, MemoryBudgetTooSmall, plan_chunks
from .problem import held_dtype

__all__ = [
    "Chunks",
    "MemoryBudgetTooSmall",
    "can_hold_exponentials",
    "held_dtype",
    "plan_chunks",
    "row_bytes",
    "torch_ops",
]
