"""A node of the autograd graph that lets no gradient through: it raises.

It stands between logits that were returned without being computed and what a gradient would have
flowed to, so that whoever asks for the gradient of any of that hears of it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

SETTING = (
    "lmhead_pass.config.returned_logits (it counts when the model is compiled): 'keep' returns "
    "logits as without lmhead_pass, 'detach' returns them computed, without a gradient"
)


def refuse_gradient(tensor: Tensor, sources: Sequence[Tensor]) -> None:
    """Let ``tensor`` require a gradient, and raise a RuntimeError if one arrives that is not zero.

    To autograd it is computed from ``sources``, of which it holds the history and not the values.
    """
    if not any(source.requires_grad for source in sources):
        sources = [torch.empty(0, requires_grad=True)]
    with torch.enable_grad():
        _RefuseGradient.apply(tensor, *sources)


class _RefuseGradient(torch.autograd.Function):
    """In place, so that the caller's tensor is the one that the gradient would flow into."""

    @staticmethod
    def forward(ctx, tensor, *sources):
        ctx.mark_dirty(tensor)
        ctx.set_materialize_grads(False)
        ctx.of_sources = (None,) * len(sources)
        return tensor

    @staticmethod
    def backward(ctx, gradient):
        # Zeros, or none: from what wraps all outputs of a model, as DDP and hooks of modules do.
        if gradient is None or not gradient.any():
            return None, *ctx.of_sources
        raise RuntimeError(
            "lmhead_pass: a gradient would flow into logits that a compiled model returned without "
            "computing them, and it cannot get through to the model. Compute the loss inside the "
            "compiled model, detach() the logits if no gradient is meant, or set "
            f"{SETTING}."
        )
