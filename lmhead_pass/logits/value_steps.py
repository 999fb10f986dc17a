"""What is done to the values of logits, step by step, and the normal form that it comes down to.

``history`` is what the model does, in its order: logits that are computed later repeat it. The op
computes the normal form, ``Values``, which is always derived from the history: ``values_after``.
"""

from dataclasses import dataclass, field, replace
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
class FillMasked:
    """The logits of the words where ``mask`` is True become ``fill``."""

    mask: Node
    fill: float


@dataclass(frozen=True)
class FillTail:
    """The logits of the words from ``start`` on become ``fill``."""

    start: int
    fill: float


@dataclass(frozen=True)
class KeepWords:
    """Only the words from ``start`` to ``stop`` are left in the tensor."""

    start: int
    stop: int


ValueStep = (
    Cast | Scale | AddNumber | AddTensor | Tanh | Sigmoid | FillMasked | FillTail | KeepWords
)


@dataclass(frozen=True)
class Bias:
    """A number for each word, added to the logits."""

    node: Node
    """``[V]``, perhaps with dimensions of size 1 around it; a mask if there is a ``fill``."""
    factor: float = 1.0
    fill: float | None = None
    """What is added where the mask ``node`` is True; 0 is added elsewhere."""
    vocab_slice: tuple[int, int] | None = None
    """The part of ``node`` that is added; None: all of it."""


@dataclass(frozen=True)
class Values:
    """What becomes of each of the head's logits ``x`` (without the head's own bias):

    z = scale x + biases + shift                    or, with a cap,
    z = cap tanh(scale x + biases + inner) + shift
    """

    scale: float = 1.0
    biases: tuple[Bias, ...] = ()
    inner: float = 0.0
    cap: float | None = None
    shift: float = 0.0
    vocab_slice: tuple[int, int] | None = None
    """The part of the head's vocabulary that counts; None: all of it."""
    tail: float | None = field(default=None, compare=False)
    """What the tensor holds for words behind those that count: so little that they count for
    nothing. None: there are no such words in the tensor."""

    @property
    def fills(self) -> list[float]:
        """What masked words are set to."""
        fills = [bias.fill * bias.factor for bias in self.biases if bias.fill is not None]
        return fills if self.tail is None else [*fills, self.tail]


def values_after(history: tuple[ValueStep, ...], bias: Node | None, vocab_size: int) -> Values:
    """The normal form of ``history``, for a head with ``bias`` ``[vocab_size]``."""
    start = Values(biases=() if bias is None else (Bias(bias),))
    return reduce(lambda values, step: _after(values, step, vocab_size), history, start)


def _after(values: Values, step: ValueStep, vocab_size: int) -> Values:
    """``values`` after one more ``step``, which must be one that the normal form can express."""
    match step:
        case Cast():
            return values
        case Scale(factor=factor):
            tail = None if values.tail is None else values.tail * factor
            scaled = replace(values, shift=values.shift * factor, tail=tail)
            if values.cap is not None:
                return replace(scaled, cap=values.cap * factor)
            biases = tuple(replace(bias, factor=bias.factor * factor) for bias in values.biases)
            return replace(scaled, scale=values.scale * factor, biases=biases)
        case AddNumber(number):
            tail = None if values.tail is None else values.tail + number
            return replace(values, shift=values.shift + number, tail=tail)
        case AddTensor(tensor, sign):
            bias = Bias(tensor, float(sign), vocab_slice=_counted(values))
            return replace(values, biases=(*values.biases, bias))
        case Tanh():
            return replace(values, cap=1.0, inner=values.shift, shift=0.0)
        case Sigmoid():  # sigmoid(x) = tanh(x / 2) / 2 + 1 / 2
            steps: tuple[ValueStep, ...] = (Scale(0.5), Tanh(), Scale(0.5), AddNumber(0.5))
            return reduce(lambda values, step: _after(values, step, vocab_size), steps, values)
        case FillMasked(mask, fill):
            bias = Bias(mask, 1.0, fill, _counted(values))
            return replace(values, biases=(*values.biases, bias))
        case FillTail(start, fill):
            return replace(_sliced(values, 0, start, vocab_size), tail=fill)
        case KeepWords(start, stop):
            first, last = values.vocab_slice or (0, vocab_size)
            tail = values.tail if first + stop > last else None
            return replace(_sliced(values, start, stop, vocab_size), tail=tail)
        case _:
            assert_never(step)


def _sliced(values: Values, start: int, stop: int, vocab_size: int) -> Values:
    """Of the words in the tensor let only those from ``start`` to ``stop`` count."""
    first, last = values.vocab_slice or (0, vocab_size)
    kept = (first + start, min(last, first + stop))
    if kept == (first, last):
        return values
    biases = tuple(_sliced_bias(bias, start, stop, last - first) for bias in values.biases)
    return replace(values, biases=biases, vocab_slice=kept)


def _sliced_bias(bias: Bias, start: int, stop: int, count: int) -> Bias:
    first, last = bias.vocab_slice or (0, count)
    return replace(bias, vocab_slice=(first + start, min(last, first + stop)))


def _counted(values: Values) -> tuple[int, int] | None:
    """The part that counts of a tensor with a number for each word in the logits; None: all."""
    if values.tail is None or values.vocab_slice is None:
        return None
    return 0, values.vocab_slice[1] - values.vocab_slice[0]
