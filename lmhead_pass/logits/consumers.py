"""Reads what takes single numbers out of each row of logits: a loss, a word's logit, a maximum."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from ..graph import Refused, arguments, canonical_op, describe, product, same, tensor_of, value_of
from .losses import check_fits, is_loss, read_loss
from .softmaxes import origin, summed_dims
from .types import Consumer, ConsumerKind, Logits, Stage, TargetUse

# What has no gradient in the op.
_MEASURES = (
    *(ConsumerKind.ARGMAX, ConsumerKind.MAX, ConsumerKind.TOPK_VALUES, ConsumerKind.PROBABILITY),
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
    return _CONSUMERS[canonical_op(node)](logits, node)


def differentiated(consumer: Consumer, reader: Node) -> Consumer:
    """``consumer``, which a gradient may reach; Refused if the op has none for what it reads."""
    if consumer.kind in _MEASURES:
        name = describe(reader)
        raise Refused(f"{name} needs a gradient, and has one only if all logits are kept")
    return replace(consumer, is_differentiated=True)


def _gather(logits: Logits, node: Node) -> Consumer:
    call = arguments(node, lambda input, dim, index, *, sparse_grad=False: locals())
    return _word_along(logits, node, call)


def _take_along_dim(logits: Logits, node: Node) -> Consumer:
    call = arguments(node, lambda input, index=None, dim=None, *, indices=None: locals())
    if call is not None and call["index"] is None:
        call["index"] = call["indices"]
    return _word_along(logits, node, call, _count_of_words(logits, node))


def _word_along(
    logits: Logits, node: Node, call: dict[str, Any] | None, words: int | None = None
) -> Consumer:
    shape = tensor_of(logits.node).shape
    if call is None or not isinstance(call["dim"], int) or call["input"] is not logits.node:
        raise Refused(f"{describe(node)} is called with arguments that are not understood")
    if call["dim"] % len(shape) != logits.vocab_dim:
        raise Refused(f"{describe(node)} picks rows, not words")
    index = tensor_of(call["index"])
    expected = [1 if dim == logits.vocab_dim else size for dim, size in enumerate(shape)]
    if index.dim() != len(shape) or not all(map(same, index.shape, expected)):
        raise Refused(f"{describe(node)} picks other than one word of each row")
    return _word(logits, node, call["index"], words, keeps_dim=True)


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
        case Stage.PROBABILITIES:
            kind = ConsumerKind.PROBABILITY
        case stage:
            raise Refused(f"{describe(node)} is taken of {stage.value}")
    use = TargetUse(target, words=words)
    return Consumer(node, logits, kind, use, factor=logits.factor, **options)


def _getitem(logits: Logits, node: Node) -> Consumer | None:
    """``logits[arange(N), target]``, ``logits[range(N), target]``, and in more dimensions."""
    call = arguments(node, lambda input, index: locals())
    shape = tensor_of(logits.node).shape
    index = call and call["index"]
    if not isinstance(index, tuple) or len(index) != len(shape):
        return None
    if not all(
        isinstance(part, range | list) or isinstance(value_of(part), torch.Tensor) for part in index
    ):
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
    return _word(logits, node, target, _count_of_words(logits, node))


def _count_of_words(logits: Logits, node: Node) -> int:
    """From the end of which ``node`` counts negative words."""
    words = tensor_of(logits.node).size(logits.vocab_dim)
    if not isinstance(words, int):
        raise Refused(f"{describe(node)} may count from the end of a vocabulary of unknown size")
    return words


def _counts(part: Node | range | list[Any], dim: int, sizes: list[Any]) -> bool:
    """Whether ``part`` is 0, 1, 2 ... along dimension ``dim``, and the same along the others."""
    place = dim - len(sizes)
    if not isinstance(part, Node):
        return place == -1 and isinstance(sizes[-1], int) and [*part] == [*range(sizes[-1])]
    chain = origin(part)
    call = arguments(chain[0], lambda end, *, dtype=None, device=None, **_: locals())
    if canonical_op(chain[0]) != "arange" or call is None:
        # A slice with None gives dimensions of size 1, as unsqueeze does.
        if canonical_op(chain[0]) != "getitem" or not _only_adds_dims(chain[0].args[1]):
            return False
        chain = [*origin(chain[0].args[0]), *chain]
        call = arguments(chain[0], lambda end, *, dtype=None, device=None, **_: locals())
        if canonical_op(chain[0]) != "arange" or call is None:
            return False
    value = tensor_of(part)
    return (
        value.dim() >= -place
        and same(value.size(place), sizes[dim])
        and same(value.numel(), sizes[dim])
        and same(tensor_of(chain[0]).numel(), sizes[dim])
    )


def _only_adds_dims(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is ... or part == slice(None) for part in parts)


_SUMMED = {
    Stage.P_LOG_P: (ConsumerKind.ENTROPY, -1),
    Stage.P_LOGIT: (ConsumerKind.EXPECTED_LOGIT, 1),
    Stage.LOGITS: (ConsumerKind.MEAN_LOGIT, 1),
    Stage.LOG_PROBABILITIES: (ConsumerKind.MEAN_LOG_PROBABILITY, 1),
}
_MEANS = (ConsumerKind.MEAN_LOGIT, ConsumerKind.MEAN_LOG_PROBABILITY)


def _sum(logits: Logits, node: Node) -> Consumer | None:
    summed = summed_dims(node)
    of_target = logits.stage in (Stage.TARGET_LOGITS, Stage.TARGET_LOG_PROBABILITIES)
    if summed is None or not (of_target or logits.stage in _SUMMED):
        return None
    dim, keeps_dim = summed
    if dim is not None and (
        not isinstance(dim, int) or dim % tensor_of(logits.node).dim() != logits.vocab_dim
    ):
        raise Refused(f"{describe(node)} sums over rows")
    options: dict[str, Any] = {"keeps_dim": keeps_dim, "is_summed": dim is None}
    if of_target:
        assert logits.index is not None
        consumer = _word(logits, node, logits.index, **options)
    else:
        kind, sign = _SUMMED[logits.stage]
        consumer = Consumer(node, logits, kind, factor=sign * logits.factor, **options)
    shape = tensor_of(logits.node).shape
    words, all_of_it = shape[logits.vocab_dim], product(shape)  # Size.numel would fix the sizes
    factor = consumer.factor
    if consumer.kind in _MEANS:
        _check_mean(logits, node)
        factor *= words
    if canonical_op(node) == "mean":
        count = words if dim is not None else all_of_it
        if not isinstance(count, int):
            raise Refused(f"{describe(node)} is taken over logits of dynamic sizes")
        if count == 0:
            raise Refused(f"{describe(node)} is taken of no logits")
        factor /= count
    return replace(consumer, factor=factor)


def _check_mean(logits: Logits, node: Node) -> None:
    """Refused unless the mean logit is the mean row of the weight times the hidden states."""
    if logits.values.cap is not None or logits.values.masking:
        raise Refused(f"{describe(node)} is taken over logits after a softcap or mask")
    if not all(isinstance(size, int) for size in tensor_of(logits.node).shape):
        raise Refused(f"{describe(node)} is taken over logits of dynamic sizes")


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
        if kind is ConsumerKind.LOGSUMEXP and logits.stage is not Stage.LOGITS:
            raise Refused(f"{describe(node)} is taken of {logits.stage.value}")
        _check_order(logits, node)
        keeps_dim = call["keepdim"] or call["keepdims"]
        return Consumer(node, logits, kind, keeps_dim=keeps_dim, factor=logits.factor)

    return read_over_words


def _check_order(logits: Logits, node: Node) -> None:
    """Refused unless the largest of what is held is in the place of the largest logit."""
    alike = (Stage.LOGITS, Stage.LOG_PROBABILITIES, Stage.PROBABILITIES)
    if logits.stage not in alike or not logits.factor > 0:
        raise Refused(f"{describe(node)} is taken of {logits.stage.value}")


_CONSUMERS: dict[str | None, Callable[[Logits, Node], Consumer | None]] = {
    "gather": _gather,
    "take_along_dim": _take_along_dim,
    "getitem": _getitem,
    "sum": _sum,
    "mean": _sum,
    "logsumexp": _over_words(ConsumerKind.LOGSUMEXP),
    "argmax": _over_words(ConsumerKind.ARGMAX),
    "amax": _over_words(ConsumerKind.MAX),
}


def consumers_of_largest(logits: Logits, node: Node) -> list[Consumer] | None:
    """The consumers that ``max(dim)`` or ``topk`` is, for values and indices; None if neither."""
    if canonical_op(node) not in ("max", "topk") or not isinstance(value_of(node), tuple):
        return None
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
    _check_order(logits, node)
    if kept and call["k"] > kept[1] - kept[0]:
        raise Refused(f"{describe(node)} is taken of more words than there are")
    return [Consumer(node, logits, kind, k=call["k"], factor=logits.factor) for kind in kinds]
