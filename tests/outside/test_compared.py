"""Logits are compared with numbers that were taken of them before: a word's rank."""

import gc
import weakref

import pytest
import torch

from ..backend import rewrite
from ..returned.model import is_unread
from .test_losses import Model

VOCAB, ROWS = 600, (3, 70)


@pytest.fixture
def logits():
    return rewrite(Model(vocab=VOCAB))(torch.randn(*ROWS, 16))


@pytest.fixture
def words():
    return torch.randint(VOCAB, ROWS)[..., None]


def of_words(logits, words):
    return logits.gather(-1, words)


# What is taken of the logits, which is compared with what, and how these lie beside each other.
TAKEN = {
    "logit": (of_words, lambda z: z),
    "largest": (lambda z, y: z.amax(-1, keepdim=True), lambda z: z),
    "scaled": (lambda z, y: of_words(z / 0.7, y), lambda z: z / 0.7),
    "log-probability": (
        lambda z, y: of_words(z.log_softmax(-1), y),
        lambda z: z.log_softmax(-1),
    ),
    "of all but the last": (
        lambda z, y: of_words(z[:, :-1], y[:, 1:]),
        lambda z: z[:, :-1],
    ),
    "of single rows": (
        lambda z, y: z.flatten(0, 1)[torch.arange(z.shape[0] * z.shape[1]), y.flatten()][:, None],
        lambda z: z.flatten(0, 1),
    ),
    "without the dimension": (lambda z, y: of_words(z, y).squeeze(-1).unsqueeze(-1), lambda z: z),
    "detached": (lambda z, y: of_words(z, y).detach(), lambda z: z),
    "some of them": (lambda z, y: of_words(z, y)[:, 3:], lambda z: z[:, 3:]),
    "in another shape": (
        lambda z, y: of_words(z, y).transpose(0, 1),
        lambda z: z.transpose(0, 1),
    ),
}


@pytest.mark.parametrize("records", [True, False])
@pytest.mark.parametrize(("take", "compared"), TAKEN.values(), ids=TAKEN)
def test_a_word_is_as_large_as_itself(logits, words, take, compared, records):
    with torch.set_grad_enabled(records):
        taken = take(logits, words)
        assert is_unread(logits)
        rank = (compared(logits) >= taken).sum(-1)
        values = logits.detach() + 0
        assert torch.equal(rank, (compared(values) >= take(values, words)).sum(-1))


@pytest.mark.parametrize(
    "compare",
    [
        lambda z, t: (z > t).sum(-1),
        lambda z, t: torch.lt(t, z).sum(-1),
        lambda z, t: (t == z).sum(-1),
        lambda z, t: torch.where(z >= t, 1, 0).sum(-1),
        lambda z, t: z.detach().gt(t).sum(-1),
    ],
)
def test_spellings(logits, words, compare):
    found = compare(logits, of_words(logits, words))
    values = logits.detach() + 0
    assert torch.equal(found, compare(values, of_words(values, words)))


def test_a_number_that_was_written_to_is_what_it_is(logits, words):
    taken = of_words(logits, words).detach()
    taken += 100
    assert not (logits >= taken).any()


def test_words_that_were_written_to(logits, words):
    """The number is that of the words before."""
    before = words.clone()
    taken = of_words(logits, words)
    words.copy_((words + VOCAB // 2) % VOCAB)
    found = (logits > taken).sum(-1)
    expected = (logits > logits.gather(-1, before)).sum(-1)
    assert (found - expected).abs().max() <= 1


@pytest.mark.parametrize("write", [lambda z: z.mul_(2), lambda z: setattr(z, "data", z * 2)])
def test_logits_that_were_written_to(logits, words, write):
    """The number is that of the logits before."""
    with torch.no_grad():
        taken = of_words(logits, words)
        before = logits + 0
        write(logits)
        assert torch.allclose(logits, before * 2)
        found, expected = (logits > taken).sum(), (before * 2 > before.gather(-1, words)).sum()
    assert abs(found - expected) <= 3


def test_numbers_hold_nothing(words):
    """Neither the logits nor what they are computed from."""
    compiled = rewrite(Model(vocab=VOCAB))
    for is_first in (True, False):
        logits = compiled(torch.randn(*ROWS, 16))
        gone = weakref.ref(logits._cell)
        taken = of_words(logits, words).detach()
        del logits
        if is_first:
            gc.collect()  # what the first trace leaves
    assert gone() is None and taken.shape == words.shape
