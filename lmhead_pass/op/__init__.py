"""The op that a match is rewritten to: ``torch.ops.lmhead_pass.linear_cross_entropy``.

``torch_ops`` has its schemas and gradients, ``problem`` its arguments, ``chunking`` the number of
rows of logits that exist at once, ``memory_budget`` what fits into ``config.memory_budget``, and
``kernels`` the loops over chunks, in ATen and in Triton; ``held_gradients`` multiplies what the
forward has computed for the backward. ``fingerprints`` has the op that tells whether tensors have
changed.
Importing this registers the ops; it knows nothing of graphs.
"""

from . import fingerprints, row_ops, torch_ops
from .chunking import row_bytes
from .fingerprints import fingerprint
from .holding import can_hold_exponentials
from .memory_budget import Chunks, MemoryBudgetTooSmall, plan_chunks
from .problem import held_dtype
from .row_part import Output, RowCount, RowInput, RowPart, Step, Value

__all__ = [
    "Chunks",
    "MemoryBudgetTooSmall",
    "Output",
    "RowCount",
    "RowInput",
    "RowPart",
    "Step",
    "Value",
    "can_hold_exponentials",
    "fingerprint",
    "fingerprints",
    "held_dtype",
    "plan_chunks",
    "row_bytes",
    "row_ops",
    "torch_ops",
]
