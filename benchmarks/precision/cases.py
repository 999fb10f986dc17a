"""Inputs on which a linear cross entropy could go wrong."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


class Inputs(NamedTuple):
    hidden: Tensor
    """``[N, H]`` floating point."""
    weight: Tensor
    """``[V, H]`` floating point."""
    bias: Tensor
    """``[V]`` floating point."""
    target: Tensor
    """``[N]`` int64."""

    def to(self, dtype: torch.dtype) -> "Inputs":
        """Rounded to ``dtype``: fresh leaves that require gradients."""
        *leaves, target = self
        return Inputs(*(leaf.detach().to(dtype).requires_grad_() for leaf in leaves), target)


Sizes = tuple[int, int, int]
"""Tokens, hidden size, words."""
Maker = Callable[[Sizes, Generator], Inputs]


@dataclass(frozen=True)
class Case:
    name: str
    sizes: Sizes
    make: Maker
    chunks: int = 8
    """Of tokens, for all that goes through them in chunks."""
    by_row: bool = False
    """Whether each row of a gradient counts by itself: rows differ by orders of magnitude."""
    first_word: int = 0
    """Gradients of weight and bias are looked at from this word on."""

    @property
    def rows(self) -> int:
        """Tokens in a chunk."""
        return self.sizes[0] // self.chunks

    def inputs(self, dtype: torch.dtype) -> Inputs:
        """The same at each call, up to the rounding to ``dtype``."""
        return self.make(self.sizes, Generator().manual_seed(0)).to(dtype)


def ordinary(sizes: Sizes, generator: Generator) -> Inputs:
    """Random logits with a standard deviation of 2, whatever the hidden size."""
    tokens, hidden_size, words = sizes
    hidden, weight, bias = (
        torch.randn(shape, generator=generator)
        for shape in ((tokens, hidden_size), (words, hidden_size), (words,))
    )
    target = torch.randint(words, (tokens,), generator=generator)
    return Inputs(hidden, weight * (2 / math.sqrt(hidden_size)), bias, target)


def large(sizes: Sizes, generator: Generator) -> Inputs:
    """Logits up to about 1e4: one word has all of each row, and it is rarely the target."""
    inputs = ordinary(sizes, generator)
    factor = math.sqrt(1e4 / F.linear(inputs.hidden, inputs.weight).abs().max())
    return inputs._replace(hidden=inputs.hidden * factor, weight=inputs.weight * factor)


def nearly_one_hot(sizes: Sizes, generator: Generator) -> Inputs:
    """The target's logit leads by 8 to 32, and all but 1e-1 to 1e-11 of the probability is its.

    Logits are whole eighths, which every dtype holds: an error is one of the softmax.
    """
    tokens, hidden_size, words = sizes
    target = torch.arange(tokens) % hidden_size
    lead = torch.linspace(64, 256, tokens).round() / 8
    hidden = F.one_hot(target, hidden_size) * lead.unsqueeze(1)
    return Inputs(hidden, torch.eye(words, hidden_size), torch.zeros(words), target)


def dominating(sizes: Sizes, generator: Generator) -> Inputs:
    """Nine of ten targets are one word, and its probability is about that everywhere."""
    inputs = ordinary(sizes, generator)
    tokens, _, words = sizes
    inputs.target[torch.rand(tokens, generator=generator) < 0.9] = 7
    inputs.bias[7] = math.log(9 * words) + 2.5  # of the others exp(logit) is exp(2.5) in the mean
    inputs.weight[7] = 0
    return inputs


RARE_WORDS = 8


def rare_words(sizes: Sizes, generator: Generator) -> Inputs:
    """The last 8 words are improbable, and the target of one token each. Only they are shown."""
    inputs = ordinary(sizes, generator)
    tokens, _, words = sizes
    rare = torch.arange(words)[-RARE_WORDS:]
    inputs.target[:] = torch.randint(words - RARE_WORDS, (tokens,), generator=generator)
    inputs.target[torch.randperm(tokens, generator=generator)[:RARE_WORDS]] = rare
    inputs.bias[rare] = -8
    return inputs


def cancelling(sizes: Sizes, generator: Generator) -> Inputs:
    """Hidden states much alike, words of about one probability, and targets in order.

    What the few chunks with a word as target add to its gradient, the others nearly take away.
    """
    tokens, _, words = sizes
    hidden, weight, bias, _ = ordinary(sizes, generator)
    hidden = 0.1 * hidden + hidden[:1]
    return Inputs(hidden, 0.02 * weight, 0.02 * bias, torch.arange(tokens) * words // tokens)


def steep(sizes: Sizes, generator: Generator) -> Inputs:
    """Logits with a standard deviation of 10, and so many small probabilities."""
    inputs = ordinary(sizes, generator)
    return inputs._replace(weight=5 * inputs.weight)


def wide(sizes: Sizes, generator: Generator) -> Inputs:
    """Ordinary logits, of weights up to about 1000 and hidden states as much smaller."""
    inputs = ordinary(sizes, generator)
    return inputs._replace(hidden=inputs.hidden / 1024, weight=1024 * inputs.weight)


_SIZES = (128, 64, 4096)
NEARLY_ONE_HOT = Case("nearly one-hot", _SIZES, nearly_one_hot, by_row=True)
DOMINATING = Case("one word dominates", _SIZES, dominating)
RARE = Case("rare words", (100_000, 16, 1024), rare_words, by_row=True, first_word=-RARE_WORDS)
STEEP = Case("steep logits, few tokens", (32, 64, 4096), steep)
WIDE = Case("wide weights", (4096, 64, 1024), wide)

CASES = [
    Case("ordinary logits", _SIZES, ordinary),
    Case("logits to 1e4", _SIZES, large),
    NEARLY_ONE_HOT,
    DOMINATING,
    RARE,
    *(Case(f"{k}k words", (128, 64, k << 10), ordinary) for k in (1, 32, 256)),
    *(Case(f"hidden size {size}", (128, size, 2048), ordinary) for size in (64, 1024, 8192)),
    *(Case(f"chunks: {n}", (4096, 64, 1024), ordinary, n) for n in (1, 4, 16, 64)),
    *(Case(f"cancelling, chunks: {n}", (4096, 64, 1024), cancelling, n) for n in (1, 64)),
]
"""Whose errors are measured."""

LOSS_SCALED = [STEEP, WIDE, NEARLY_ONE_HOT, DOMINATING, RARE]
"""Whose entries out of FP16's range are counted."""
