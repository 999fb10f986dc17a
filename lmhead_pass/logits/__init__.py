"""What becomes of a head's logits: the analysis.

From a linear layer (``heads``) the logits are followed forward through the graph (``dataflow``).
What a node holds of them (``types``) follows from what was done to their shape (``rows``,
``row_steps``), to their values (``values``, ``algebraic_caps``, by ``value_steps``) and to their
softmax (``softmaxes``). Whoever takes single numbers out of each row is a consumer
(``consumers``, ``losses``).
"""

from .dataflow import Flow, follow_heads, follow_logits
from .heads import is_head, large_heads, read_head
from .losses import class_count, is_loss
from .row_steps import (
    Index,
    Permute,
    Piece,
    Reshape,
    RowStep,
    ScaleRows,
    row_order,
    take_different_rows,
)
from .softmaxes import summed_dims
from .types import (
    NOTHING_IGNORED,
    Consumer,
    ConsumerKind,
    ExpandLike,
    Head,
    Logits,
    Look,
    MetadataUse,
    Stage,
    TargetUse,
)
from .value_steps import (
    AddNumber,
    AddTensor,
    Algebraic,
    Bias,
    Cast,
    Fill,
    KeepWords,
    Scale,
    Sigmoid,
    Tanh,
    ValueStep,
)

__all__ = [
    "NOTHING_IGNORED",
    "AddNumber",
    "AddTensor",
    "Algebraic",
    "Bias",
    "Cast",
    "Consumer",
    "ConsumerKind",
    "ExpandLike",
    "Fill",
    "Flow",
    "Head",
    "Index",
    "KeepWords",
    "Logits",
    "Look",
    "MetadataUse",
    "Permute",
    "Piece",
    "Reshape",
    "RowStep",
    "Scale",
    "ScaleRows",
    "Sigmoid",
    "Stage",
    "Tanh",
    "TargetUse",
    "ValueStep",
    "class_count",
    "follow_heads",
    "follow_logits",
    "is_head",
    "is_loss",
    "large_heads",
    "read_head",
    "row_order",
    "summed_dims",
    "take_different_rows",
]
