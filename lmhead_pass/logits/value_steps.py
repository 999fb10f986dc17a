"""What is done to the values of logits, step by step, and the normal form that it comes down to.

``history`` is what the model does, in its order: logits that are computed later repeat it. The op
computes the normal form, ``Values``, which is always derived from the history: ``values_after``.
"""

from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch.fx import Node
from typing_extensions import assert_never


@dataclass(frozen=True)
class Cast:
    dtype: torch.dtype


@dataclass(frozen=True)
class Scale:
    """The logits are multiplied by a number, or divided by it."""

    number: float
    divides: bool = False

    @property
    def factor(self) -> float:
        return 1 / self.number if self.divides else self.number


@dataclass(frozen=True)
class AddNumber:
    number: float


@dataclass(frozen=True)
class AddTensor:
    """A number for each word of the vocabulary is added, or with ``sign`` -1 subtracted."""

    tensor: Node
    sign: int


@dataclass(frozen=True)
class Tanh:
    pass


@dataclass(frozen=True)
class Sigmoid:
    pass


@dataclass(frozen=True)
class Algebraic:
    """``x / sqrt(1 + x * x)``: a softcap, as tanh is one."""


@dataclass(frozen=True)
class Fill:
    """Some words become masked: their logits are a constant from here on, and get no gradient."""

    words: Node | tuple[int, ...] | range
    """Which: numbers of words in the tensor, or a tensor of such numbers; or a mask ``[V]``,
    perhaps with dimensions of size 1 around it."""
    value: float | Node
    """Or a tensor without a gradient: ``[]``, or with a mask one of the mask's shapes."""
    is_kept: bool = False
    """Whether the mask is True for the words that are not masked."""

    @property
    def nodes(self) -> list[Node]:
        return [part for part in (self.words, self.value) if isinstance(part, Node)]


@dataclass(frozen=True)
class KeepWords:
    """Only the words from ``start`` to ``stop`` are left in the tensor."""

    start: int
    stop: int


ValueStep = Cast | Scale | AddNumber | AddTensor | Tanh | Sigmoid | Algebraic | Fill | KeepWords


@dataclass(frozen=True)
class Bias:
    """A number for each word, added to the logits."""

    node: Node
    """``[V]``, perhaps with dimensions of size 1 around it."""
    factor: float = 1.0
    vocab_slice: tuple[int, int] | None = None
    """The part of ``node`` that is added; None: all of it."""


@dataclass(frozen=True)
class Values:
    """What becomes of each of the head's logits ``x`` (without the head's own bias):

    z = scale x + biases + shift                    or, with a cap,
    z = cap tanh(scale x + biases + inner) + shift        if ``cap_kind`` is that

    Masked words have constants instead.
    """

    scale: float = 1.0
    biases: tuple[Bias, ...] = ()
    inner: float = 0.0
    cap: float | None = None
    cap_kind: str = "tanh"
    """As the op's ``softcap_kind``."""
    shift: float = 0.0
    vocab_slice: tuple[int, int] | None = None
    """The part of the head's vocabulary that counts; None: all of it."""
    masking: tuple[ValueStep, ...] = ()
    """What gives the masked words their logits: all from the first ``Fill`` on, and where words
    were cut off before; empty if no words are masked."""


def values_after(history: tuple[ValueStep, ...], bias: Node | None, vocab_size: int) -> Values:
    """The normal form of ``history``, for a head with ``bias`` ``[vocab_size]``."""
    start = Values(biases=() if bias is None else (Bias(bias),), masking=_masking(history))
    return reduce(lambda values, step: _after(values, step, vocab_size), history, start)


def _masking(history: tuple[ValueStep, ...]) -> tuple[ValueStep, ...]:
    steps = [step for step in history if not isinstance(step, Cast)]
    first = next((place for place, step in enumerate(steps) if isinstance(step, Fill)), None)
    if first is None:
        return ()
    return (*(step for step in steps[:first] if isinstance(step, KeepWords)), *steps[first:])


def _after(values: Values, step: ValueStep, vocab_size: int) -> Values:
    """``values`` after one more ``step``, which must be one that the normal form can express."""
    match step:
        case Cast() | Fill():
            return values
        case Scale(factor=factor):
            scaled = replace(values, shift=values.shift * factor)
            if values.cap is not None:
                return replace(scaled, cap=values.cap * factor)
            biases = tuple(replace(bias, factor=bias.factor * factor) for bias in values.biases)
            return replace(scaled, scale=values.scale * factor, biases=biases)
        case AddNumber(number):
            return replace(values, shift=values.shift + number)
        case AddTensor(tensor, sign):
            return replace(values, biases=(*values.biases, Bias(tensor, float(sign))))
        case Tanh():
            return replace(values, cap=1.0, inner=values.shift, shift=0.0)
        case Algebraic():
            return replace(_after(values, Tanh(), vocab_size), cap_kind="algebraic")
        case Sigmoid():  # sigmoid(x) = tanh(x / 2) / 2 + 1 / 2
            steps: tuple[ValueStep, ...] = (Scale(0.5), Tanh(), Scale(0.5), AddNumber(0.5))
            return reduce(lambda values, step: _after(values, step, vocab_size), steps, values)
        case KeepWords(start, stop):
            return _sliced(values, start, stop, vocab_size)
        case _:
            assert_never(step)


def _sliced(values: Values, start: int, stop: int, vocab_size: int) -> Values:
    """Of the words in the tensor keep those from ``start`` to ``stop``."""
    first, last = values.vocab_slice or (0, vocab_size)
    biases = tuple(_sliced_bias(bias, start, stop, last - first) for bias in values.biases)
    return replace(values, biases=biases, vocab_slice=(first + start, min(last, first + stop)))


def _sliced_bias(bias: Bias, start: int, stop: int, count: int) -> Bias:
    first, last = bias.vocab_slice or (0, count)
    return replace(bias, vocab_slice=(first + start, min(last, first + stop)))
