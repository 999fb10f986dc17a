"""Reads a cross entropy over class indices, however it is written."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..compat.graphs import reduction_of
from ..graph import Refused, arguments, canonical_op, describe, number_of, tensor_of
from .types import Logits, Stage, TargetUse


@dataclass(frozen=True)
class Loss:
    """A cross entropy of logits and class indices."""

    logits: Node
    target_use: TargetUse
    reduction: str
    wants_log_probabilities: bool
    """Whether it is ``nll_loss``, which takes what ``log_softmax`` gives."""


def _cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: Any = -100,
    reduce: Any = None,
    reduction: Any = "mean",
    label_smoothing: Any = 0.0,
) -> dict[str, Any]:
    return locals()


def _nll_loss(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: Any = -100,
    reduce: Any = None,
    reduction: Any = "mean",
) -> dict[str, Any]:
    return {**locals(), "label_smoothing": 0.0}


_SIGNATURES: dict[str | None, Callable[..., dict[str, Any]]] = {
    "cross_entropy": _cross_entropy,
    "nll_loss": _nll_loss,
}


def is_loss(node: Node) -> bool:
    return canonical_op(node) in _SIGNATURES


def class_count(node: Node) -> int | torch.SymInt:
    """How many classes a loss node distinguishes, or over how many words a softmax runs."""
    if is_loss(node):
        logits = tensor_of(_call(node)["input"])
        dim = _class_dim(logits.dim())
    else:
        logits = tensor_of(node.all_input_nodes[0])
        call = arguments(node, lambda input, dim=-1, *_, **__: locals())
        dim = -1 if call is None else call["dim"]
    if logits.dim() == 0:
        raise Refused("the logits are a single number")
    if not isinstance(dim, int):
        raise Refused(f"{describe(node)} runs over several dimensions")
    return logits.size(dim)


def read_loss(node: Node) -> Loss:
    """Describe the loss that ``node`` computes; Refused if it is not one of class indices."""
    name, call = canonical_op(node), _call(node)
    reduction = call["reduction"]
    if call["size_average"] is not None or call["reduce"] is not None:
        reduction = reduction_of(call["size_average"], call["reduce"])
    logits, target = tensor_of(call["input"]), tensor_of(call["target"])
    if target.is_floating_point():
        raise Refused("the targets are probabilities of classes, not class indices")
    if target.dtype != torch.int64:
        raise Refused(f"the targets are {target.dtype}, which eager {name} does not take")
    if target.dim() != logits.dim() - 1:
        raise Refused(f"{target.dim()}-d targets do not fit {logits.dim()}-d logits")
    if reduction not in ("mean", "sum", "none"):
        raise Refused(f"reduction is {reduction!r}")
    ignore_index = number_of(call["ignore_index"])
    label_smoothing = number_of(call["label_smoothing"])
    if not 0 <= label_smoothing <= 1:
        raise Refused(f"label_smoothing is {label_smoothing}, not between 0 and 1")
    if call["weight"] is not None:
        _check_class_weight(call["weight"], logits, node)
    return Loss(
        logits=call["input"],
        target_use=TargetUse(
            target=call["target"],
            class_weight=call["weight"],
            ignore_index=int(ignore_index),
            label_smoothing=float(label_smoothing),
        ),
        reduction=reduction,
        wants_log_probabilities=name == "nll_loss",
    )


def _call(node: Node) -> dict[str, Any]:
    name = canonical_op(node)
    call = arguments(node, _SIGNATURES[name])
    if call is None:
        raise Refused(f"{name} is called with arguments that are not understood")
    return call


def check_fits(loss: Loss, logits: Logits) -> None:
    """Refused unless ``loss`` takes its softmax over the vocabulary of ``logits``."""
    if _class_dim(tensor_of(logits.node).dim()) != logits.vocab_dim:
        raise Refused("the loss takes its classes from another dimension than the vocabulary's")
    if loss.wants_log_probabilities and logits.stage is not Stage.LOG_PROBABILITIES:
        raise Refused("nll_loss is taken of logits that went through no log_softmax")
    if logits.stage not in (Stage.LOGITS, Stage.LOG_PROBABILITIES) or logits.factor != 1:
        raise Refused("the loss is taken of what is made of the softmax, not of logits")


def _class_dim(dims: int) -> int:
    return min(dims - 1, 1)


def _check_class_weight(weight: Node, logits: torch.Tensor, loss: Node) -> None:
    value = tensor_of(weight)
    if value.requires_grad:
        raise Refused("the class weights require a gradient, which cross_entropy does not give")
    if value.dtype != tensor_of(loss).dtype:
        raise Refused(
            f"the class weights are {value.dtype} and the loss {tensor_of(loss).dtype}, which "
            "eager cross_entropy does not take"
        )
