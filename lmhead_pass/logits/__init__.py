"""What becomes of a head's logits: the analysis.

From a linear layer (``heads``) forward through the graph (``dataflow``): what each node holds of
the logits (``types``), by what was done to their shape (``rows``), their values (``values``) and
their softmax (``softmaxes``), down to whoever takes single numbers out of each row (``consumers``,
``losses``). ``emit_inputs`` does to hidden states, weight and bias what was done to the logits.
"""

from .dataflow import Flow, follow_logits
from .emit_inputs import (
    emit_bias,
    emit_hidden,
    emit_metadata_use,
    emit_weight,
    input_nodes,
    on_numbers,
    on_rows,
)
from .heads import is_head, read_head
from .losses import class_count, is_loss
from .softmaxes import summed_dims
from .types import NOTHING_IGNORED, Consumer, Head, Logits, Loss, MetadataUse, RowStep, row_order
from .values import fill_behind

__all__ = [
    "NOTHING_IGNORED",
    "Consumer",
    "Flow",
    "Head",
    "Logits",
    "Loss",
    "MetadataUse",
    "RowStep",
    "class_count",
    "emit_bias",
    "emit_hidden",
    "emit_metadata_use",
    "emit_weight",
    "fill_behind",
    "follow_logits",
    "input_nodes",
    "is_head",
    "is_loss",
    "on_numbers",
    "on_rows",
    "read_head",
    "row_order",
    "summed_dims",
]
