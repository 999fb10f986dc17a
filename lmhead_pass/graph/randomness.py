"""Which nodes draw random numbers: run twice, or in another order, they draw others."""

import torch
from torch.fx import Node

from ..compat.graphs import is_torch_op
from .bodies import bodies_of

# Functions of torch.nn.functional that draw, and whose names no operator of ATen has.
_DRAWING = {
    *("dropout1d", "dropout2d", "dropout3d", "gumbel_softmax", "multi_head_attention_forward"),
    *("fractional_max_pool1d", "fractional_max_pool2d", "fractional_max_pool3d"),
    *("fractional_max_pool2d_with_indices", "fractional_max_pool3d_with_indices"),
}


def draws(node: Node) -> bool:
    """Whether ``node``, or a graph that it calls, may take numbers from a random generator."""
    if node.op not in ("call_function", "call_method"):
        return bool(node.op == "call_module")
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return True
    if any(draws(inner) for body in bodies_of(node) for inner in body.graph.nodes):
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    operator = getattr(torch.ops.aten, name, None)
    return name in _DRAWING or (
        operator is not None
        and is_torch_op(operator)  # and no method of the namespace itself, as __eq__ is
        and any(
            torch.Tag.nondeterministic_seeded in getattr(operator, overload).tags
            for overload in operator.overloads()
        )
    )
