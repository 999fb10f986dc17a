"""What logits are computed from: hidden states and the head's own parameters.

And the checks that keep a late computation honest: nothing may have changed in between, and no
gradient may flow into what it gives.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .fingerprint import fingerprint

_SETTING = (
    "lmhead_pass.config.returned_logits (it counts when the model is compiled): 'keep' returns "
    "logits as without lmhead_pass, 'detach' returns them computed, without a gradient"
)


@dataclass(frozen=True)
class Recipe:
    """Logits that are not computed yet."""

    hidden: Tensor
    """``[*rows, H]``"""
    weight: Tensor
    """``[V, H]``, or ``[H, V]`` if ``weight_is_transposed``: the parameter itself, no copy."""
    weight_is_transposed: bool
    bias: Tensor | None
    """``[V]``"""
    fingerprint: Tensor
    """Of ``tensors`` when the model ran."""
    dtypes: tuple[torch.dtype, ...]
    """The product's, then those that the logits are cast to, in order."""
    vocab_dim: int
    """Where the vocabulary is in the logits; their other dimensions are ``rows``, in order."""
    requires_grad: bool
    """Whether a gradient would flow into the logits, were they computed in the model."""

    def like(self) -> Tensor:
        """A tensor with the logits' size, strides and dtype, on the meta device."""
        vocab_size = self.weight.size(1 if self.weight_is_transposed else 0)
        shape = (*self.hidden.shape[:-1], vocab_size)
        return torch.empty(shape, dtype=self.dtypes[-1], device="meta").movedim(-1, self.vocab_dim)

    def compute(self) -> Tensor:
        """The logits; RuntimeError if what they are computed from has changed."""
        self._check_unchanged()
        dtype = self.dtypes[0]
        with torch.no_grad(), torch.autocast(self.hidden.device.type, enabled=False):
            weight = self.weight.t() if self.weight_is_transposed else self.weight
            bias = None if self.bias is None else self.bias.to(dtype)
            logits = F.linear(self.hidden.to(dtype), weight.to(dtype), bias)
            for dtype in self.dtypes[1:]:
                logits = logits.to(dtype)
        logits = logits.detach()  # no view to autograd, which would allow no write to it
        if self.requires_grad:
            refuse_gradient(logits, self.weight)
        is_last = self.vocab_dim == logits.dim() - 1
        return logits if is_last else logits.movedim(-1, self.vocab_dim)

    def _check_unchanged(self) -> None:
        parts = {"hidden states": self.hidden, "weight": self.weight}
        if self.bias is not None:
            parts["bias"] = self.bias
        for name, tensor in parts.items():
            if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
                raise _too_late(name, "was freed")
            if tensor.device != self.fingerprint.device:
                raise _too_late(name, "was moved to another device")
        now = fingerprint(list(parts.values()))
        differ = (now != self.fingerprint).any(1).tolist()
        for name, differs in zip(parts, differ, strict=True):
            if differs:
                raise _too_late(name, "was changed")


def _too_late(part: str, event: str) -> RuntimeError:
    return RuntimeError(
        f"lmhead_pass: these logits were returned without being computed, and can no longer be: "
        f"the head's {part} {event} after the model ran. Read the logits before that "
        f"(logits.clone() is enough, ahead of optimizer.step() for instance), or set {_SETTING}."
    )


def refuse_gradient(tensor: Tensor, source: Tensor) -> None:
    """Let ``tensor`` require a gradient, and raise a RuntimeError if one arrives.

    To autograd it is computed from ``source``: who asks for the gradient of nothing but the head's
    weight is to hear of it too.
    """
    if not source.requires_grad:
        source = torch.empty(0, requires_grad=True)
    with torch.inference_mode(False), torch.enable_grad():
        _RefuseGradient.apply(source, tensor)


class _RefuseGradient(torch.autograd.Function):
    """In place, so that the caller's tensor is the one that the gradient would flow into."""

    @staticmethod
    def forward(ctx, source, tensor):
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError(
            "lmhead_pass: a gradient would flow into logits that a compiled model returned without "
            "computing them, and it cannot get through to the model. Compute the loss inside the "
            "compiled model, detach() the logits if no gradient is meant, or set "
            f"{_SETTING}."
        )
