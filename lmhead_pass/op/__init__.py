"""The op that a match is rewritten to: ``torch.ops.lmhead_pass.linear_cross_entropy``.

``torch_ops`` has its schemas and gradients, ``problem`` its arguments, ``chunking`` the number of
rows of logits that exist at once, and ``kernels`` the loops over chunks, in ATen and in Triton.
Importing this registers the op; it knows nothing of graphs.
"""

from . import row_ops, torch_ops
from .chunking import plan_rows, row_bytes
from .problem import held_dtype
from .row_part import Output, RowCount, RowInput, RowPart, Step, Value

__all__ = [
    "Output",
    "RowCount",
    "RowInput",
    "RowPart",
    "Step",
    "Value",
    "held_dtype",
    "plan_rows",
    "row_bytes",
    "row_ops",
    "torch_ops",
]
