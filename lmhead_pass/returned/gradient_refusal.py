"""A node of the autograd graph that raises an error instead of passing a gradient on.

It stands between logits that were returned without being computed and the tensors that their
gradient would flow to, so that whoever asks for that gradient gets the error.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SETTING = (
    "lmhead_pass.config.returned_logits (it counts when the model is compiled): 'keep' returns "
    "logits as without lmhead_pass, 'detach' returns them computed, without a gradient"
)


def refuse_gradient(tensor: Tensor, sources: Sequence[Tensor]) -> None:
    """Let ``tensor`` require a gradient, and raise a RuntimeError if one arrives that is not zero.

    To autograd ``tensor`` is computed from ``sources``. It keeps their history, not their values.
    """
    if not any(source.requires_grad for source in sources):
        sources = [torch.empty(0, requires_grad=True)]
    with torch.enable_grad():
        _RefuseGradient.apply(tensor, *sources)  # type: ignore[no-untyped-call]


class _RefuseGradient(torch.autograd.Function):
    """It works in place, so that the caller's own tensor gets the history."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *sources: Tensor) -> Tensor:
        ctx.mark_dirty(tensor)
        ctx.set_materialize_grads(False)
        ctx.of_sources = (None,) * len(sources)
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[None, ...]:
        # Zeros or None come from code that wraps all outputs of a model: DDP, hooks of modules.
        if gradient is None or not gradient.any():
            return None, *ctx.of_sources
        raise RuntimeError(
            "lmhead_pass: a gradient would flow into logits that a compiled model returned without "
            "computing them, and it cannot get through to the model. Compute the loss inside the "
            "compiled model, detach() the logits if no gradient is meant, or set "
            f"{SETTING}."
        )
