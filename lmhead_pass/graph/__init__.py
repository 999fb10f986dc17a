"""What can be said of any pre-grad graph, whoever made it.

``canonical_ops`` maps every spelling of an operation to one name, ``tensors`` reads what Dynamo
knows of a node's value, ``mutation`` tells which nodes may write to a tensor, ``randomness`` which
draw random numbers, ``gradients`` which pass gradients on, and ``SameValues`` which hold the same
values; ``in_fp32`` says what a node calls with more digits; ``stack_trace`` finds the user's line,
and ``Emitter`` inserts nodes. What cannot be said raises ``Refused``.
"""

from ..compat.graphs import ENTER_AUTOCAST
from . import mutation
from .canonical_ops import arguments, canonical_op, describe, is_in_place, is_pieces
from .emitter import Emitter, move_before, size_of
from .gradients import given_a_gradient, passing
from .in_fp32 import NARROW, in_fp32
from .randomness import draws
from .refusal import Refusal, Refused
from .same_values import SameValues
from .stack_trace import Place, at, place_in, place_of
from .tensors import (
    AUTOCAST_SWITCHES,
    gradients_are_recorded,
    hint,
    in_inference,
    is_cut_off,
    is_input,
    is_number,
    is_plain,
    is_symbol,
    memory_of,
    number_of,
    product,
    same,
    same_shape,
    seen_by,
    tensor_of,
    value_of,
    wraps_none,
)

__all__ = [
    "AUTOCAST_SWITCHES",
    "ENTER_AUTOCAST",
    "NARROW",
    "Emitter",
    "Place",
    "Refusal",
    "Refused",
    "SameValues",
    "arguments",
    "at",
    "canonical_op",
    "describe",
    "draws",
    "given_a_gradient",
    "gradients_are_recorded",
    "hint",
    "in_fp32",
    "in_inference",
    "is_cut_off",
    "is_in_place",
    "is_input",
    "is_number",
    "is_pieces",
    "is_plain",
    "is_symbol",
    "memory_of",
    "move_before",
    "mutation",
    "number_of",
    "passing",
    "place_in",
    "place_of",
    "product",
    "same",
    "same_shape",
    "seen_by",
    "size_of",
    "tensor_of",
    "value_of",
    "wraps_none",
]
