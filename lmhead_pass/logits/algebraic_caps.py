"""Follows the algebraic softcap ``c z / sqrt(z * z + c * c)``: squares of logits, and their roots.

On the way to it a node holds ``factor * z * z + offset``, the root of that, or the root's inverse.
"""

import math
from dataclasses import replace

from torch.fx import Node

from ..graph import Refused, arguments, canonical_op, describe, is_number, number_of
from .types import Logits, Stage
from .value_steps import Algebraic, Bias, Scale, Values

_ROOT_STEPS = ("square", "pow", "sqrt", "rsqrt", "reciprocal")


def is_root_step(node: Node) -> bool:
    return canonical_op(node) in _ROOT_STEPS


def is_square(node: Node) -> bool:
    """Whether ``node`` multiplies a tensor by itself."""
    call = arguments(node, lambda input, other: locals())
    match canonical_op(node):
        case "square":
            return True
        case "mul":
            return call is not None and call["input"] is call["other"]
        case "pow":
            return call is not None and is_number(call["other"]) and call["other"] == 2
    return False


def follow_root(logits: Logits, node: Node) -> Logits:
    """What ``node`` makes of ``logits``, which are squares, or roots of these; else Refused."""
    refused = Refused(f"{describe(node)} is done to {logits.stage.value}")
    name, call = canonical_op(node), arguments(node, lambda input, other=None: locals())
    if call is None:
        raise refused
    is_first = call["input"] is logits.node
    other = call["other" if is_first else "input"]
    number = float(number_of(other)) if other is not None and is_number(other) else None
    stage = logits.stage
    match name, number:
        case ("sqrt", None) | ("pow", 0.5) if stage is Stage.SQUARE and is_first:
            return replace(logits, stage=Stage.ROOT)
        case ("rsqrt", None) | ("pow", -0.5) if stage is Stage.SQUARE and is_first:
            return replace(logits, stage=Stage.INVERSE_ROOT)
        case ("reciprocal", None) | ("pow", -1.0) if stage is Stage.ROOT and is_first:
            return replace(logits, stage=Stage.INVERSE_ROOT)
        case ("div", 1.0) if stage is Stage.ROOT and not is_first:
            return replace(logits, stage=Stage.INVERSE_ROOT)
        case ("add", float(added)) if stage is Stage.SQUARE:
            return replace(logits, offset=logits.offset + added)
        case ("mul" | "div", float(factor)) if factor > 0 and (is_first or name == "mul"):
            scale = factor if name == "mul" else 1 / factor
            # A factor of the root is its square under the root.
            scale = {Stage.ROOT: scale**2, Stage.INVERSE_ROOT: scale**-2}.get(stage, scale)
            return replace(logits, factor=logits.factor * scale, offset=logits.offset * scale)
    raise refused


def times_root(node: Node, first: Logits, second: Logits) -> Logits | None:
    """If ``node`` caps logits with a root of their squares: what it holds; else None."""
    if canonical_op(node) == "div":
        logits, root = first, second
        if node.args[:2] != (first.node, second.node) or root.stage is not Stage.ROOT:
            return None
    else:
        roots = [held for held in (first, second) if held.stage is Stage.INVERSE_ROOT]
        if canonical_op(node) != "mul" or len(roots) != 1:
            return None
        (root,) = roots
        logits = second if root is first else first
    if logits.stage is not Stage.LOGITS:
        return None
    ratio = logits.values.scale / root.values.scale
    if (
        logits.head.node is not root.head.node
        or logits.steps != root.steps
        or logits.vocab_dim != root.vocab_dim
        or logits.is_detached != root.is_detached
        or not _is_multiple(logits.values, root.values, ratio)
        or not (root.factor > 0 and root.offset > 0)
    ):
        raise Refused(f"{describe(node)} puts logits together with a root of other squares")
    scales = Scale(math.sqrt(root.factor / root.offset)), Scale(ratio / math.sqrt(root.factor))
    capped = replace(root, stage=Stage.LOGITS, factor=1.0, offset=0.0)
    return capped.then(scales[0], Algebraic(), scales[1])


def _is_multiple(values: Values, others: Values, ratio: float) -> bool:
    """Whether ``values`` are ``ratio`` times ``others``, neither of them masked or capped."""
    return (
        values.cap is others.cap is None
        and not (values.masking or others.masking)
        and values.vocab_slice == others.vocab_slice
        and math.isclose(values.shift, others.shift * ratio)
        and len(values.biases) == len(others.biases)
        and all(map(lambda a, b: _is_multiple_bias(a, b, ratio), values.biases, others.biases))
    )


def _is_multiple_bias(bias: Bias, other: Bias, ratio: float) -> bool:
    same = bias.node is other.node and bias.vocab_slice == other.vocab_slice
    return same and math.isclose(bias.factor, other.factor * ratio)
