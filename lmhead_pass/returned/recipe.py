"""The recipe of logits that are not computed yet: hidden states, head, and the steps from there on.

A late computation is right only if nothing has changed since the model ran. A fingerprint tells:
a number for each tensor that changes when its contents do. ``Tensor._version`` would be cheaper,
but fused optimizers and writes through ``.data`` do not count it up, and a step that changes
nothing (at a learning rate of 0) does. Here the tensor's bits, as 64-bit integers, are multiplied
by numbers for their rows and columns and summed: it is read once and never copied. The order of
such a sum does not matter, so the number never differs while the contents are the same. That a
change goes unseen, or that values change places unseen, takes a coincidence of 64 bits.
"""

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import assert_never

from ..compat.lazy_tensors import version_of
from ..compat.library import add_fake_kernel, define

SETTING = (
    "lmhead_pass.config.returned_logits (it counts when the model is compiled): 'keep' returns "
    "logits as without lmhead_pass, 'detach' returns them computed, without a gradient"
)


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
    """``[*rows, H]``: nobody else writes to it."""
    weight: Tensor
    """``[V, H]``, or ``[H, V]`` if ``weight_is_transposed``: the parameter itself, no copy."""
    weight_is_transposed: bool
    bias: Tensor | None
    """``[V]``"""
    fingerprint: Tensor
    """``[2 or 3]``: of hidden states, weight and bias when the model ran."""
    steps: tuple[str, ...]
    """The steps in order, each encoded. The first is the cast of hidden states and weight before
    the product, the others follow the product."""
    vocab_dim: int
    """The vocabulary's dimension in the logits; their other dimensions are ``rows``, in order."""
    strides: tuple[int, ...]
    """Of the logits in the model; empty if it has dynamic sizes."""
    requires_grad: bool
    """Whether a gradient would flow into the logits, were they computed in the model."""
    wanted: tuple[bool, ...]
    """Of each of ``tensors``, whether a gradient would flow to it. What the compiled function
    computes itself has its history only once that function has returned."""

    @property
    def tensors(self) -> list[Tensor]:
        """Hidden states, weight, and the bias if there is one."""
        return [self.hidden, self.weight, *([] if self.bias is None else [self.bias])]

    @property
    def versions(self) -> list[tuple[int, int]]:
        """Which tensors these are, and how often each was written to."""
        return [(id(tensor), version_of(tensor)) for tensor in self.tensors[1:]]

    def lacks_history(self, made: "Recipe") -> bool:
        """Whether a gradient would not find its way back. ``made`` is this one without a history: a
        parameter is the same there, and may have been frozen since."""
        pairs = zip(self.tensors, made.tensors, self.wanted, strict=True)
        return any(w and t is not kept and not t.requires_grad for t, kept, w in pairs)

    def without_history(self) -> "Recipe":
        """The same, which keeps nothing of the graph of the compiled function that makes it."""
        # What that computes itself may have no history yet, and will have it.
        is_parameter = [tensor.is_leaf and tensor.requires_grad for tensor in self.tensors]
        pairs = zip(self.tensors, is_parameter, strict=True)
        hidden, weight, *bias = (t if is_one else t.detach() for t, is_one in pairs)
        return replace(self, hidden=hidden, weight=weight, bias=bias[0] if bias else None)

    def like(self) -> Tensor:
        """A tensor with the logits' size, strides and dtype, on the meta device."""
        like = self._apply(*(torch.empty_like(tensor, device="meta") for tensor in self.tensors))
        if self.strides and like.stride() != self.strides:
            like = torch.empty_strided(like.shape, self.strides, dtype=like.dtype, device="meta")
        return like

    def compute(self) -> Tensor:
        """The logits, detached; RuntimeError if what they are computed from has changed."""
        self.check_unchanged()
        with torch.no_grad():
            # Not a view, to which autograd would allow no write.
            return self.apply(*self.tensors).detach()

    def apply(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The logits of other tensors than the recipe's, with the strides of the model's."""
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self._apply(hidden, weight, bias)
        if self.strides and logits.stride() != self.strides:
            logits = logits.new_empty_strided(logits.shape, self.strides).copy_(logits)
        return logits

    def _apply(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        dtype = self.product_dtype
        matrix = (weight.t() if self.weight_is_transposed else weight).flatten(1)
        is_apart = Step(StepKind.ADD_BIAS) in self._decoded
        fused = None if bias is None or is_apart else bias.to(dtype)
        logits = F.linear(hidden.to(dtype), matrix.to(dtype), fused)
        for step in self._decoded[1:]:
            logits = step.apply(logits, bias)
        return logits.movedim(-1, self.vocab_dim) if self.vocab_dim != logits.dim() - 1 else logits

    @property
    def is_linear(self) -> bool:
        """Whether nothing but casts follows the product and the bias."""
        return all(step.kind is StepKind.CAST for step in self._decoded)

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype of the product's operands."""
        (dtype,) = self._decoded[0].operands
        assert isinstance(dtype, torch.dtype)
        return dtype

    @cached_property
    def _decoded(self) -> tuple[Step, ...]:
        return tuple(map(Step.decode, self.steps))

    def check_unchanged(self) -> None:
        """RuntimeError if what the logits are computed from is not what it was."""
        parts = dict(zip(("hidden states", "weight", "bias"), self.tensors, strict=False))
        for name, tensor in parts.items():
            if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
                raise _too_late(name, "was freed")
            if tensor.device != self.fingerprint.device:
                raise _too_late(name, "was moved to another device")
        differ = (fingerprint(self.tensors) != self.fingerprint).tolist()
        for name, differs in zip(parts, differ, strict=True):
            if differs:
                raise _too_late(name, "was changed")


def _too_late(part: str, event: str) -> RuntimeError:
    return RuntimeError(
        f"lmhead_pass: these logits were returned without being computed, and can no longer be: "
        f"the head's {part} {event} after the model ran. Read the logits before that "
        f"(logits.clone() is enough, ahead of optimizer.step() for instance), or set {SETTING}."
    )


_BLOCK = 1 << 16

# Bits of the golden ratio: multiplied by them, numbers that follow each other come far apart.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensors: Sequence[Tensor]) -> Tensor:
    """``[len(tensors)]`` int64, on the device of the first; waits for no device."""
    return cast(Tensor, torch.ops.lmhead_pass.fingerprint(list(tensors)))


def _fingerprint(tensors: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.stack([_of_one(tensor.detach()) for tensor in tensors])


def _of_one(tensor: Tensor) -> Tensor:
    """``[]`` int64: each element times a number for its row and one for its column, summed."""
    bits = _as_integers(tensor)
    rows, columns = (_weights(size, bits) for size in bits.shape)
    total = bits.new_zeros((), dtype=torch.int64)
    # A block at a time, so that its products stay in the cache.
    step = max(1, _BLOCK // max(1, bits.size(1))) if bits.is_cpu else max(1, len(bits))
    for block, of_block in zip(torch.split(bits, step), torch.split(rows, step), strict=True):
        products = block * columns
        # Else two flips of highest bits would cancel out, whatever they are multiplied by.
        products ^= products >> 32
        total += (products.sum(1) * of_block).sum()
    return total


def _weights(size: int, like: Tensor) -> Tensor:
    """``[size]`` odd numbers, so that every change of one element shows, each another one."""
    numbers = torch.arange(1, size + 1, device=like.device)
    mixed = (numbers ^ numbers << 13) * _GOLDEN
    return (mixed ^ mixed >> 29) * _GOLDEN | 1


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
    "fingerprint", lambda tensors: tensors[0].new_empty([len(tensors)], dtype=torch.int64)
)
