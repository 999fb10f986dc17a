"""The recipe of logits that are not computed yet: hidden states, head, and the steps from there on.

A late computation is right only if nothing has changed since the model ran. A fingerprint tells:
two numbers for each tensor that change when its contents do. ``Tensor._version`` would be cheaper,
but fused optimizers and writes through ``.data`` do not count it up, and a step that changes
nothing (at a learning rate of 0) does. Here all bits are summed as 64-bit integers: the tensor is
read twice and never copied. The order of such sums does not matter, so the numbers never differ
while the contents are the same. A change of one element always shows. Several changes go unseen
only if they cancel out twice, in sums over rows and over columns, modulo 2**64: that takes flips of
nothing but sign bits, an even number of them in each row and in each column.
"""

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import assert_never

from ..compat.library import add_fake_kernel, define
from .gradient_refusal import SETTING


class StepKind(enum.Enum):
    """What a step does to the logits. The values are the words of the op's schema."""

    CAST = "cast"  # to a dtype
    MULTIPLY = "mul"  # by a number
    DIVIDE = "div"  # by a number
    ADD = "add"  # a number
    ADD_BIAS = "add_tensor"
    TANH = "tanh"
    SIGMOID = "sigmoid"
    FILL = "fill"  # the words of the vocabulary from a start to a stop, with a value
    TAKE_WORDS = "words"  # of the vocabulary, from a start to a stop


_OPERANDS: dict[StepKind, tuple[Callable[[str], Any], ...]] = {
    StepKind.CAST: (lambda name: getattr(torch, name),),
    **dict.fromkeys((StepKind.MULTIPLY, StepKind.DIVIDE, StepKind.ADD), (float,)),
    StepKind.FILL: (int, int, float),
    StepKind.TAKE_WORDS: (int, int),
}


@dataclass(frozen=True)
class Step:
    """One step from the hidden states to the logits."""

    kind: StepKind
    operands: tuple[Any, ...] = ()

    def encode(self) -> str:
        """The step as ``return_lazily`` takes it: its word, and its operands after spaces."""
        operands = (str(operand).removeprefix("torch.") for operand in self.operands)
        return " ".join((self.kind.value, *operands))

    @classmethod
    def decode(cls, text: str) -> "Step":
        word, *operands = text.split()
        readers = _OPERANDS.get(kind := StepKind(word), ())
        return cls(kind, tuple(read(part) for read, part in zip(readers, operands, strict=True)))

    def apply(self, logits: Tensor, bias: Tensor | None) -> Tensor:
        """``[*rows, V]``: the result of the step for ``logits`` ``[*rows, V]``."""
        match self.kind:
            case StepKind.CAST:
                return logits.to(*self.operands)
            case StepKind.MULTIPLY:
                return torch.mul(logits, *self.operands)
            case StepKind.DIVIDE:
                return torch.div(logits, *self.operands)
            case StepKind.ADD:
                return torch.add(logits, *self.operands)
            case StepKind.ADD_BIAS:
                assert bias is not None
                return logits + bias.flatten()
            case StepKind.TANH:
                return logits.tanh()
            case StepKind.SIGMOID:
                return logits.sigmoid()
            case StepKind.FILL:
                start, stop, value = self.operands
                words = torch.arange(start, stop, device=logits.device)
                return logits.index_fill(-1, words, value)
            case StepKind.TAKE_WORDS:
                return logits[..., slice(*self.operands)].contiguous()
            case _:
                assert_never(self.kind)


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
    """``[2 or 3, 2]``: of hidden states, weight and bias when the model ran."""
    steps: tuple[str, ...]
    """The steps in order, each encoded. The first is the cast of hidden states and weight before
    the product, the others follow the product."""
    vocab_dim: int
    """The vocabulary's dimension in the logits; their other dimensions are ``rows``, in order."""
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
            is_apart = Step(StepKind.ADD_BIAS) in self._decoded
            fused = None if self.bias is None or is_apart else self.bias.to(dtype)
            product = F.linear(self.hidden.to(dtype), weight.to(dtype), fused)
            logits = self._after_steps(product, self.bias)
        # Not a view, to which autograd would allow no write.
        return logits.movedim(-1, self.vocab_dim).detach()

    @cached_property
    def _decoded(self) -> tuple[Step, ...]:
        return tuple(map(Step.decode, self.steps))

    @property
    def _product_dtype(self) -> torch.dtype:
        (dtype,) = self._decoded[0].operands
        assert isinstance(dtype, torch.dtype)
        return dtype

    def _after_steps(self, logits: Tensor, bias: Tensor | None) -> Tensor:
        """``[*rows, V]``: the result of the model's own steps after the product."""
        for step in self._decoded[1:]:
            logits = step.apply(logits, bias)
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


def _too_late(part: str, event: str) -> RuntimeError:
    return RuntimeError(
        f"lmhead_pass: these logits were returned without being computed, and can no longer be: "
        f"the head's {part} {event} after the model ran. Read the logits before that "
        f"(logits.clone() is enough, ahead of optimizer.step() for instance), or set {SETTING}."
    )


# The weight of a position is a multiple of these bits of the golden ratio.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensors: Sequence[Tensor]) -> Tensor:
    """``[len(tensors), 2]`` int64, on the device of the first; waits for no device."""
    return cast(Tensor, torch.ops.lmhead_pass.fingerprint(list(tensors)))


def _fingerprint(tensors: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.stack([_of_one(tensor.detach()) for tensor in tensors])


def _of_one(tensor: Tensor) -> Tensor:
    """``[2]`` int64: a number for the sums of rows, and one for the sums of columns."""
    bits = _as_integers(tensor)
    sums = bits.sum(1, dtype=torch.int64), bits.sum(0, dtype=torch.int64)
    return torch.stack([(s * _weights(s)).sum() for s in sums])


def _weights(sums: Tensor) -> Tensor:
    """Odd, so that every change of one sum shows, and different, so that exchanged sums show."""
    return torch.arange(1, len(sums) + 1, device=sums.device) * _GOLDEN | 1


def _as_integers(tensor: Tensor) -> Tensor:
    """The same memory as a matrix of integers, of 64 bits if they divide its rows."""
    if tensor.dim() == 2 and tensor.stride(0) == 1:
        tensor = tensor.t()
    tensor = tensor.contiguous()
    matrix = tensor.reshape(-1, tensor.size(-1)) if tensor.dim() else tensor.reshape(1, 1)
    if matrix.size(1) * matrix.element_size() % 8 == 0 and matrix.data_ptr() % 8 == 0:
        return matrix.view(torch.int64)
    return matrix.view(_INTEGERS[matrix.element_size()])


define("fingerprint(Tensor[] tensors) -> Tensor", _fingerprint)
add_fake_kernel(
    "fingerprint", lambda tensors: tensors[0].new_empty([len(tensors), 2], dtype=torch.int64)
)
