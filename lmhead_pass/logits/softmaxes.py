"""Follows softmaxes of logits, and what is made of them before a single word is read."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from ..graph import (
    Refused,
    arguments,
    canonical_op,
    describe,
    hint,
    number_of,
    same,
    same_shape,
    tensor_of,
)
from .types import Logits, Stage

# How a node that a tensor was reshaped or cast from is found again.
_SHAPED = ("reshape", "cast", "expand")
# What a softmax of is the same.
_BEFORE_SOFTMAX = (Stage.LOGITS, Stage.SQUARE, Stage.ROOT, Stage.INVERSE_ROOT)
_WITH_SOFTMAX = (Stage.LOGITS, Stage.LOG_PROBABILITIES)


def is_softmax_step(logits: Logits, node: Node) -> bool:
    """Whether ``node`` takes a softmax, or goes on with one."""
    goes_on = logits.stage not in _BEFORE_SOFTMAX
    return canonical_op(node) in (_FOLLOWERS | _AFTER_SOFTMAX if goes_on else _FOLLOWERS)


def follow_softmax(logits: Logits, node: Node) -> Logits:
    """What ``node`` holds: a softmax of ``logits``, or the log of one."""
    return (_FOLLOWERS | _AFTER_SOFTMAX)[canonical_op(node)](logits, node)


def _log_softmax(logits: Logits, node: Node) -> Logits:
    _check_dim(logits, node)
    if logits.stage not in _WITH_SOFTMAX or logits.factor != 1:
        raise Refused(f"log_softmax is taken of {logits.stage.value}")
    return replace(logits, stage=Stage.LOG_PROBABILITIES)


def _softmax(logits: Logits, node: Node) -> Logits:
    _check_dim(logits, node)
    if logits.stage not in _WITH_SOFTMAX or logits.factor != 1:
        raise Refused(f"softmax is taken of {logits.stage.value}")
    return replace(logits, stage=Stage.PROBABILITIES)


def _log(logits: Logits, node: Node) -> Logits:
    after = {
        Stage.PROBABILITIES: Stage.LOG_PROBABILITIES,
        Stage.RAISED_PROBABILITIES: Stage.RAISED_LOG_PROBABILITIES,
    }
    if logits.stage not in after or logits.factor != 1:
        raise Refused(f"log is taken of {logits.stage.value}")
    return replace(logits, stage=after[logits.stage])


def _exp(logits: Logits, node: Node) -> Logits:
    if logits.stage is not Stage.LOG_PROBABILITIES or logits.factor != 1:
        raise Refused(f"exp is taken of {logits.stage.value}")
    return replace(logits, stage=Stage.PROBABILITIES)


def _entr(logits: Logits, node: Node) -> Logits:
    """``entr(p)`` is ``-p log(p)``."""
    if logits.stage is not Stage.PROBABILITIES or logits.factor != 1:
        raise Refused(f"{describe(node)} is taken of {logits.stage.value}")
    return replace(logits, stage=Stage.P_LOG_P, factor=-1.0)


def _clamp(logits: Logits, node: Node) -> Logits:
    call = arguments(node, lambda input, min=None, max=None: locals())
    if call is None or call["input"] is not logits.node or call["min"] is None:
        raise Refused(f"{describe(node)} is done to {logits.stage.value}")
    largest = {Stage.PROBABILITIES: 1, Stage.LOG_PROBABILITIES: 0}.get(logits.stage, math.inf)
    if call["max"] is not None and number_of(call["max"]) < largest:
        raise Refused(f"{describe(node)} is done to {logits.stage.value}")
    return _raised(logits, node, number_of(call["min"]))


def _plus(logits: Logits, node: Node) -> Logits:
    call = arguments(node, lambda input, other: locals())
    others = [] if call is None else [v for v in call.values() if v is not logits.node]
    if logits.stage is not Stage.PROBABILITIES or len(others) != 1:
        raise Refused(f"{describe(node)} is done to {logits.stage.value}")
    return _raised(logits, node, number_of(others[0]))


def _raised(logits: Logits, node: Node, least: float) -> Logits:
    """``logits`` of at least ``least``: so little that an entropy is the same but for rounding.

    ``p log(max(p, least))`` and ``p log(p + least)`` differ from ``p log(p)`` by at most ``least``.
    """
    limits = torch.finfo(tensor_of(logits.node).dtype)
    if logits.stage is Stage.LOG_PROBABILITIES and logits.factor == 1 and least <= limits.min:
        return replace(logits, stage=Stage.RAISED_LOG_PROBABILITIES)
    words = hint(tensor_of(logits.node).size(logits.vocab_dim))
    if logits.stage is not Stage.PROBABILITIES or logits.factor != 1:
        raise Refused(f"{describe(node)} is done to {logits.stage.value}")
    if not 0 <= least * words <= limits.eps:
        raise Refused(
            f"{describe(node)} changes probabilities by {least}: over {words} words that is more "
            "than rounding"
        )
    return replace(logits, stage=Stage.RAISED_PROBABILITIES)


def _check_dim(logits: Logits, node: Node) -> None:
    call = arguments(
        node, lambda input, dim=None, third=None, *, _stacklevel=3, dtype=None: locals()
    )
    name, dims = canonical_op(node), tensor_of(logits.node).dim()
    if call is None or not isinstance(call["dim"], int):
        raise Refused(f"{name} is called without a dimension, or not understood")
    if call["dim"] % max(dims, 1) != logits.vocab_dim:
        raise Refused(f"{name} runs over dimension {call['dim']}, which is not the vocabulary's")


_FOLLOWERS: dict[str | None, Callable[[Logits, Node], Logits]] = {
    "log_softmax": _log_softmax,
    "softmax": _softmax,
    "log": _log,
}
_AFTER_SOFTMAX: dict[str | None, Callable[[Logits, Node], Logits]] = {
    "exp": _exp,
    "entr": _entr,
    "clamp": _clamp,
    "add": _plus,
}


def less_logsumexp(logits: Logits, node: Node) -> list[Node] | None:
    """If ``node`` is ``logits - logsumexp(logits)``: the nodes from the logsumexp on; else None."""
    call = arguments(node, lambda input, other: locals())
    if canonical_op(node) != "sub" or call is None or call["input"] is not logits.node:
        return None
    if not isinstance(call["other"], Node):
        return None
    chain = origin(call["other"])
    if canonical_op(chain[0]) != "logsumexp" or chain[0].args[:1] != (logits.node,):
        return None
    value = tensor_of(call["other"])
    if value.dim() != tensor_of(logits.node).dim() or not same(value.size(logits.vocab_dim), 1):
        return None
    return chain


def times_one_hot(logits: Logits, node: Node) -> tuple[Node, list[Node]] | None:
    """If ``node`` is ``logits * one_hot(index)``: the index, and the nodes from the one-hot on."""
    call = arguments(node, lambda input, other: locals())
    if canonical_op(node) != "mul" or call is None:
        return None
    if logits.stage not in _WITH_SOFTMAX:
        return None
    other = call["other"] if call["input"] is logits.node else call["input"]
    if not isinstance(other, Node):
        return None
    chain = origin(other)
    hot = arguments(chain[0], lambda input, num_classes=-1: locals())
    if canonical_op(chain[0]) != "one_hot" or hot is None:
        return None
    if (
        logits.vocab_dim != tensor_of(logits.node).dim() - 1
        or not same_shape(chain[0], logits.node)
        or any(canonical_op(step) != "cast" for step in chain[1:])
    ):
        return None
    return hot["input"], chain


def origin(node: Node) -> list[Node]:
    """The nodes from what ``node`` is a reshape or cast of, to ``node``."""
    chain = [node]
    while (
        canonical_op(chain[0]) in _SHAPED and chain[0].args and isinstance(chain[0].args[0], Node)
    ):
        chain.insert(0, chain[0].args[0])
    return chain


def summed_dims(node: Node) -> tuple[Any, bool] | None:
    """Over which dimensions ``sum`` runs (None: all) and whether it keeps them; None if unclear."""
    call = arguments(
        node, lambda input, dim=None, keepdim=False, *, axis=None, dtype=None: locals()
    )
    if call is None:
        return None
    dim = call["dim"] if call["axis"] is None else call["axis"]
    if isinstance(dim, tuple | list) and len(dim) == 1:
        dim = dim[0]
    return dim, bool(call["keepdim"])


def times(first: Logits, second: Logits) -> Logits:
    """The product of probabilities and their logs, or of probabilities and logits."""
    if not first.same_values(second) or first.vocab_dim != second.vocab_dim:
        raise Refused("logits are multiplied by logits")
    if first.stage is not Stage.PROBABILITIES:
        first, second = second, first
    if first.stage is not Stage.PROBABILITIES:
        raise Refused("logits are multiplied by logits")
    match second.stage:
        case Stage.LOGITS:
            made = Stage.P_LOGIT
        case Stage.LOG_PROBABILITIES | Stage.RAISED_LOG_PROBABILITIES:
            made = Stage.P_LOG_P
        case _:
            raise Refused("probabilities are multiplied by probabilities")
    return replace(first, stage=made, factor=first.factor * second.factor)
