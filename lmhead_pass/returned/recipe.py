"""The recipe of logits that are not computed yet: hidden states, head, and the steps from there on.

A late computation is right only if nothing has changed since the model ran: a fingerprint
(``op/fingerprints.py``) tells, a number for each tensor that changes when its contents do.
"""

import enum
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import assert_never

from ..compat.kernels import can_check_on_device, check_on_device
from ..compat.lazy_tensors import is_fake, version_of
from ..op import fingerprint

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
    """``fingerprint_of`` hidden states, weight and bias when the model ran."""
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
        if is_fake(self.hidden):  # Its sizes may be symbols, which have no hash.
            metas = (torch.empty_like(tensor, device="meta") for tensor in self.tensors)
            like = _logits(self._form, *metas)
        else:
            looks = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in self.tensors)
            size, strides, dtype = _look(self._form, looks)
            like = torch.empty_strided(size, strides, dtype=dtype, device="meta")
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
            logits = _logits(self._form, hidden, weight, bias)
        if self.strides and logits.stride() != self.strides:
            logits = logits.new_empty_strided(logits.shape, self.strides).copy_(logits)
        return logits

    @property
    def is_linear(self) -> bool:
        """Whether nothing but casts follows the product and the bias."""
        return all(step.kind is StepKind.CAST for step in _decoded(self.steps))

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype of the product's operands."""
        (dtype,) = _decoded(self.steps)[0].operands
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def _form(self) -> "_Form":
        return self.weight_is_transposed, self.steps, self.vocab_dim

    def check_unchanged(self, at_once: bool = True) -> None:
        """RuntimeError if what the logits are computed from is not what it was.

        If not ``at_once``, a GPU may raise it when it gets there, and nobody waits for that.
        """
        parts = dict(zip(("hidden states", "weight", "bias"), self.tensors, strict=False))
        for name, tensor in parts.items():
            if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
                raise _too_late(name, "was freed")
            if tensor.device != self.fingerprint.device:
                raise _too_late(name, "was moved to another device")
        now, before = fingerprint_of(self.tensors), self.fingerprint
        if not at_once and can_check_on_device(now.device):
            error = _too_late("hidden states, weight or bias", "were changed")
            check_on_device((now == before).all(), str(error))
            return
        if torch.equal(now, before):
            return
        watched = [*parts][_first_watched(now.device) :]
        for name, differs in zip(watched, (now != before).tolist(), strict=True):
            if differs:
                raise _too_late(name, "was changed")


def fingerprint_of(tensors: Sequence[Tensor]) -> Tensor:
    """``[1 to 3]``: the fingerprint of those among hidden states, weight and bias that may change
    without anybody being told."""
    return fingerprint(tensors[_first_watched(tensors[0].device) :])


def _first_watched(device: torch.device) -> int:
    # Hidden states have memory of their own, to which nobody writes but the next run of a CUDA
    # graph (``rewrite/emit_returned.py``).
    return 1 if device.type == "cpu" else 0


_Form = tuple[bool, tuple[str, ...], int]
"""``weight_is_transposed``, ``steps`` and ``vocab_dim`` of a recipe."""
_Look = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""A tensor's size, strides and dtype."""


def _logits(form: _Form, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    weight_is_transposed, encoded, vocab_dim = form
    cast, *steps = _decoded(encoded)
    (dtype,) = cast.operands
    matrix = (weight.t() if weight_is_transposed else weight).flatten(1)
    is_apart = Step(StepKind.ADD_BIAS) in steps
    fused = None if bias is None or is_apart else bias.to(dtype)
    logits = F.linear(hidden.to(dtype), matrix.to(dtype), fused)
    for step in steps:
        logits = step.apply(logits, bias)
    return logits.movedim(-1, vocab_dim) if vocab_dim != logits.dim() - 1 else logits


@functools.lru_cache(maxsize=64)
def _look(form: _Form, looks: tuple[_Look, ...]) -> _Look:
    """Of logits, from those of hidden states, weight and bias."""
    logits = _logits(
        form,
        *(
            torch.empty_strided(size, strides, dtype=dtype, device="meta")
            for size, strides, dtype in looks
        ),
    )
    return logits.shape, logits.stride(), logits.dtype


@functools.lru_cache(maxsize=64)
def _decoded(steps: tuple[str, ...]) -> tuple[Step, ...]:
    return tuple(map(Step.decode, steps))


def _too_late(part: str, event: str) -> RuntimeError:
    return RuntimeError(
        f"lmhead_pass: these logits were returned without being computed, and can no longer be: "
        f"the head's {part} {event} after the model ran. Read the logits before that "
        f"(logits.clone() is enough, ahead of optimizer.step() for instance), or set {SETTING}."
    )
