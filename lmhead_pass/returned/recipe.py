"""What logits are computed from: hidden states and the head's own parameters.

And the check that keeps a late computation honest: nothing may have changed in between.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .fingerprint import fingerprint
from .gradient_refusal import SETTING


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
    steps: tuple[str, ...]
    """From the product on, in order, a word for the operation and its operands after spaces. The
    first is the cast of hidden states and weight, before the product."""
    vocab_dim: int
    """Where the vocabulary is in the logits; their other dimensions are ``rows``, in order."""
    requires_grad: bool
    """Whether a gradient would flow into the logits, were they computed in the model."""

    def like(self) -> Tensor:
        """A tensor with the logits' size, strides and dtype, on the meta device."""
        vocab_size = self.weight.size(1 if self.weight_is_transposed else 0)
        shape = (*self.hidden.shape[:-1], vocab_size)
        product = torch.empty(shape, dtype=self._product_dtype, device="meta")
        bias = None if self.bias is None else torch.empty_like(self.bias, device="meta")
        return torch.empty_like(self._after_steps(product, bias)).movedim(-1, self.vocab_dim)

    def compute(self) -> Tensor:
        """The logits, detached; RuntimeError if what they are computed from has changed."""
        self._check_unchanged()
        dtype = self._product_dtype
        with torch.no_grad(), torch.autocast(self.hidden.device.type, enabled=False):
            weight = self.weight.t() if self.weight_is_transposed else self.weight
            weight = weight.flatten(1)  # of a convolution
            fused = None if self.bias is None or "add_tensor" in self.steps else self.bias.to(dtype)
            product = F.linear(self.hidden.to(dtype), weight.to(dtype), fused)
            logits = self._after_steps(product, self.bias)
        # No view to autograd, which would allow no write to it.
        return logits.movedim(-1, self.vocab_dim).detach()

    @property
    def _product_dtype(self) -> torch.dtype:
        return getattr(torch, self.steps[0].split()[1])

    def _after_steps(self, logits: Tensor, bias: Tensor | None) -> Tensor:
        """``[*rows, V]``: what the model's own steps make of the product."""
        for step in self.steps[1:]:
            name, *operands = step.split()
            logits = _STEPS[name](logits, bias, *operands)
        return logits

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


def _fill(logits: Tensor, bias: Tensor | None, start: str, value: str) -> Tensor:
    return logits.index_fill(
        -1, torch.arange(int(start), logits.size(-1), device=logits.device), float(value)
    )


_STEPS: dict[str, Callable[..., Tensor]] = {
    "cast": lambda logits, bias, dtype: logits.to(getattr(torch, dtype)),
    "mul": lambda logits, bias, factor: logits * float(factor),
    "div": lambda logits, bias, divisor: logits / float(divisor),
    "add": lambda logits, bias, number: logits + float(number),
    "add_tensor": lambda logits, bias: logits + bias.flatten(),
    "tanh": lambda logits, bias: logits.tanh(),
    "sigmoid": lambda logits, bias: logits.sigmoid(),
    "fill": _fill,
    "words": lambda logits, bias, start, stop: logits[..., int(start) : int(stop)].contiguous(),
}


def _too_late(part: str, event: str) -> RuntimeError:
    return RuntimeError(
        f"lmhead_pass: these logits were returned without being computed, and can no longer be: "
        f"the head's {part} {event} after the model ran. Read the logits before that "
        f"(logits.clone() is enough, ahead of optimizer.step() for instance), or set {SETTING}."
    )
