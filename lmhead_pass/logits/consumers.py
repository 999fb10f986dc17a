"""Reads what takes single numbers out of each row of logits: a loss, a word's logit, a maximum."""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from ..graph import Refused, arguments, canonical_op, describe, same, tensor_of, value_of
from .losses import check_fits, is_loss, read_loss
from .softmaxes import origin, summed_dims
from .types import Consumer, ConsumerKind, Logits, Stage, TargetUse

# What has no gradient in the op.
_MEASURES = (
    *(ConsumerKind.ARGMAX, ConsumerKind.MAX),
    *(ConsumerKind.ENTROPY, ConsumerKind.EXPECTED_LOGIT),
)


def read(logits: Logits, node: Node) -> Consumer | None:
    """What ``node`` reads of ``logits``; None if it is no consumer, Refused if not understood."""
    if is_loss(node):
        loss = read_loss(node)
        if loss.logits is not logits.node:
            raise Refused("the logits are no logits to the loss")
        check_fits(loss, logits)
        return Consumer(node, logits, ConsumerKind.LOSS, loss.target_use, loss.reduction)
    if canonical_op(node) not in _CONSUMERS:
        return None
    consumer = _CONSUMERS[canonical_op(node)](logits, node)
    if consumer is not None and consumer.kind in _MEASURES and tensor_of(node).requires_grad:
        raise Refused(f"{describe(node)} needs a gradient, and has one only if all logits are kept")
    return consumer


def _gather(logits: Logits, node: Node) -> Consumer:
    call = arguments(node, lambda input, dim, index, *, sparse_grad=False: locals())
    return _word_along(logits, node, call)


def _take_along_dim(logits: Logits, node: Node) -> Consumer:
    call = arguments(node, lambda input, index=None, dim=None, *, indices=None: locals())
    if call is not None and call["index"] is None:
        call["index"] = call["indices"]
    return _word_along(logits, node, call)


def _word_along(logits: Logits, node: Node, call: dict[str, Any] | None) -> Consumer:
    shape = tensor_of(logits.node).shape
    if call is None or not isinstance(call["dim"], int) or call["input"] is not logits.node:
        raise Refused(f"{describe(node)} is called with arguments that are not understood")
    if call["dim"] % len(shape) != logits.vocab_dim:
        raise Refused(f"{describe(node)} picks rows, not words")
    index = tensor_of(call["index"])
    expected = [1 if dim == logits.vocab_dim else size for dim, size in enumerate(shape)]
    if index.dim() != len(shape) or not all(map(same, index.shape, expected)):
        raise Refused(f"{describe(node)} picks other than one word of each row")
    return _word(logits, node, call["index"], keeps_dim=True)


def _word(
    logits: Logits, node: Node, target: Node, words: int | None = None, **options: Any
) -> Consumer:
    if tensor_of(target).dtype != torch.int64:
        raise Refused(f"words are picked with {tensor_of(target).dtype}, not torch.int64")
    match logits.stage:
        case Stage.LOGITS | Stage.TARGET_LOGITS:
            kind = ConsumerKind.LOGIT
        case Stage.LOG_PROBABILITIES | Stage.TARGET_LOG_PROBABILITIES:
            kind = ConsumerKind.LOG_PROBABILITY
        case stage:
            raise Refused(f"{describe(node)} reads {stage.value}")
    use = TargetUse(target, words=words)
    return Consumer(node, logits, kind, use, factor=logits.factor, **options)


def _getitem(logits: Logits, node: Node) -> Consumer | None:
    """``logits[arange(N), target]``, and the like in more dimensions."""
    call = arguments(node, lambda input, index: locals())
    shape = tensor_of(logits.node).shape
    index = call and call["index"]
    if not isinstance(index, tuple) or len(index) != len(shape):
        return None
    values = [value_of(part) for part in index]
    if not all(isinstance(value, torch.Tensor) for value in values):
        return None
    rows = tensor_of(node)
    target = index[logits.vocab_dim]
    numbers = [part for dim, part in enumerate(index) if dim != logits.vocab_dim]
    sizes = [size for dim, size in enumerate(shape) if dim != logits.vocab_dim]
    if (
        not all(map(same, rows.shape, sizes))
        or tensor_of(target).dim() != len(sizes)
        or not all(map(same, tensor_of(target).shape, sizes))
        or not all(_counts(part, dim, sizes) for dim, part in enumerate(numbers))
    ):
        raise Refused("the logits are indexed with tensors that are not one word for each row")
    words = shape[logits.vocab_dim]
    if not isinstance(words, int):
        raise Refused(f"{describe(node)} may count from the end of a vocabulary of unknown size")
    return _word(logits, node, target, words)


def _counts(node: Node, dim: int, sizes: list[Any]) -> bool:
    """Whether ``node`` is 0, 1, 2 ... along dimension ``dim``, and the same along the others."""
    chain = origin(node)
    call = arguments(chain[0], lambda end, *, dtype=None, device=None, **_: locals())
    if canonical_op(chain[0]) != "arange" or call is None:
        # A slice with None gives dimensions of size 1, as unsqueeze does.
        if canonical_op(chain[0]) != "getitem" or not _only_adds_dims(chain[0].args[1]):
            return False
        chain = [*origin(chain[0].args[0]), *chain]
        call = arguments(chain[0], lambda end, *, dtype=None, device=None, **_: locals())
        if canonical_op(chain[0]) != "arange" or call is None:
            return False
    value = tensor_of(node)
    place = dim - len(sizes)
    return (
        value.dim() >= -place
        and same(value.size(place), sizes[dim])
        and same(value.numel(), sizes[dim])
        and same(tensor_of(chain[0]).numel(), sizes[dim])
    )


def _only_adds_dims(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is ... or part == slice(None) for part in parts)


def _sum(logits: Logits, node: Node) -> Consumer | None:
    summed = summed_dims(node)
    of_target = logits.stage in (Stage.TARGET_LOGITS, Stage.TARGET_LOG_PROBABILITIES)
    if summed is None or not (of_target or logits.stage in (Stage.P_LOG_P, Stage.P_LOGIT)):
        return None
    dim, keeps_dim = summed
    if dim is not None and (
        not isinstance(dim, int) or dim % tensor_of(logits.node).dim() != logits.vocab_dim
    ):
        raise Refused(f"{describe(node)} sums over rows")
    options: dict[str, Any] = {"keeps_dim": keeps_dim, "is_summed": dim is None}
    if of_target:
        assert logits.index is not None
        return _word(logits, node, logits.index, **options)
    if logits.stage is Stage.P_LOG_P:
        return Consumer(node, logits, ConsumerKind.ENTROPY, factor=-logits.factor, **options)
    return Consumer(node, logits, ConsumerKind.EXPECTED_LOGIT, factor=logits.factor, **options)


def _over_words(kind: ConsumerKind) -> Callable[[Logits, Node], Consumer | None]:
    def read_over_words(logits: Logits, node: Node) -> Consumer:
        call = arguments(
            node, lambda input, dim=None, keepdim=False, *, axis=None, keepdims=False: locals()
        )
        dim = call and (call["axis"] if call["dim"] is None else call["dim"])
        if isinstance(dim, tuple | list) and len(dim) == 1:
            dim = dim[0]
        if call is None or not isinstance(dim, int):
            raise Refused(f"{describe(node)} is taken over more than the vocabulary")
        if dim % tensor_of(logits.node).dim() != logits.vocab_dim:
            raise Refused(f"{describe(node)} is not taken over the vocabulary")
        # The largest of all of these is in the same place.
        alike = (Stage.LOGITS, Stage.LOG_PROBABILITIES, Stage.PROBABILITIES)
        is_argmax = kind is ConsumerKind.ARGMAX and logits.stage in alike and logits.factor > 0
        if not is_argmax and logits.stage is not Stage.LOGITS:
            raise Refused(f"{describe(node)} is taken of {logits.stage.value}")
        return Consumer(node, logits, kind, keeps_dim=call["keepdim"] or call["keepdims"])

    return read_over_words


_CONSUMERS: dict[str | None, Callable[[Logits, Node], Consumer | None]] = {
    "gather": _gather,
    "take_along_dim": _take_along_dim,
    "getitem": _getitem,
    "sum": _sum,
    "logsumexp": _over_words(ConsumerKind.LOGSUMEXP),
    "argmax": _over_words(ConsumerKind.ARGMAX),
    "amax": _over_words(ConsumerKind.MAX),
}


def consumers_of_largest(logits: Logits, node: Node) -> list[Consumer] | None:
    """The consumers that ``max(dim)`` or ``topk`` is, for values and indices; None if neither."""
    if canonical_op(node) not in ("max", "topk") or not isinstance(value_of(node), tuple):
        return None
    if value_of(node)[0].requires_grad:
        raise Refused(f"{describe(node)} needs a gradient, and has one only if all logits are kept")
    if canonical_op(node) == "topk":
        return _topk(logits, node)
    pair = [_over_words(kind)(logits, node) for kind in (ConsumerKind.MAX, ConsumerKind.ARGMAX)]
    return [consumer for consumer in pair if consumer is not None]


def _topk(logits: Logits, node: Node) -> list[Consumer]:
    call = arguments(node, lambda input, k, dim=-1, largest=True, sorted=True: locals())
    dims = tensor_of(logits.node).dim()
    if call is None or type(call["k"]) is not int or not call["largest"]:
        raise Refused(f"{describe(node)} is called with arguments that are not understood")
    if call["dim"] % dims != logits.vocab_dim or logits.vocab_dim != dims - 1:
        raise Refused(f"{describe(node)} is not taken over a vocabulary that comes last")
    kept, kinds = logits.values.vocab_slice, (ConsumerKind.TOPK_VALUES, ConsumerKind.TOPK_INDICES)
    if logits.stage is not Stage.LOGITS or (kept and call["k"] > kept[1] - kept[0]):
        raise Refused(f"{describe(node)} is taken of other than logits, or of more than there are")
    return [Consumer(node, logits, kind, k=call["k"]) for kind in kinds]
