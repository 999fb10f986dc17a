"""What calls over one weight hold until the backward, in bytes, beside what they save.

A call with its gradients holds one of the weight. One is what the program needs in any case, but
of many losses that end in no common sum each has its own. Where these take more than the logits
would, one call for all has to compute the gradients in the backward.
"""

from collections.abc import Container, Sequence

from torch.fx import Node

from ..graph import hint, tensor_of
from ..op import held_dtype
from .types import Match


def hold_more_than_they_save(calls: Sequence[Match], checkpointed: Container[Node]) -> bool:
    """Whether ``calls`` over one weight hold more in gradients than the program does without.

    That holds the logits of all, but for those whose head is ``checkpointed``, and then, in the
    backward, at most two gradients of the weight at once: a sum, and what is added to it.
    """
    gradient = max(_gradient_bytes(call) for call in calls)
    logits = [call.logits_bytes for call in calls]
    chunk = max(min(call.chunk_bytes, call.logits_bytes) for call in calls)
    held = len(calls) * gradient + chunk
    kept = [
        size
        for call, size in zip(calls, logits, strict=True)
        if call.logits.head.node not in checkpointed
    ]
    return held > max(sum(kept) + gradient, max(logits) + gradient, min(logits) + 2 * gradient)


def _gradient_bytes(call: Match) -> int:
    weight = tensor_of(call.logits.head.weight)
    itemsize = held_dtype(weight.dtype).itemsize if weight.requires_grad else 0
    return hint(weight.numel()) * itemsize
