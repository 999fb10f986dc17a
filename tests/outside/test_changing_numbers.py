"""Batches of other sizes and numbers that change: traced as constants, then as symbols, no more."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from lmhead_pass.compat import symbols
from lmhead_pass.outside import fused_reader

from ..backend import rewrite
from .test_joint_gradients import entropies, policy
from .test_losses import (
    Model,
    V,
    batch,
    log_probabilities,
    shifted,
    softcapped,
    with_z_loss,
)

SIZES = ((3, 7), (3, 9), (3, 12), (3, 30), (5, 8), (2, 21), (5, 23))


def by_numbers(z, y):
    tokens = y.numel()
    return F.cross_entropy(z.view(tokens, V), y.view(tokens))


def first_tokens(z, y):
    kept = y.size(1) - 2
    return F.cross_entropy(z[:, :kept].transpose(1, 2), y[:, :kept])


def focal(z, y):
    taken = z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)
    return -((1 - taken.exp()) ** 2 * taken).mean()


def per_token(z, y):
    return (F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none") * 0.3).mean()


def spread(z, y):
    return (z.std(-1) * y).mean() + shifted(z, y)


def metrics(z, y):
    loss = shifted(z, y)
    return loss + (z.argmax(-1) == y).sum() + entropies(z.detach()).mean()


def packed(z, y):
    rows = torch.arange(0, y.numel(), 2)
    return F.cross_entropy(z.flatten(0, 1)[rows], y.flatten()[rows])


LOSSES = [
    *(shifted, log_probabilities, softcapped, with_z_loss, policy, by_numbers, first_tokens),
    *(focal, per_token, spread, metrics, packed),
]


@pytest.fixture
def traced(monkeypatch):
    """The numbers that are symbols, of each graph that is made."""
    made, rewritten = [], fused_reader.rewritten

    def count(calls, way, may_change):
        made.append([n for n, one in zip(way.numbers, may_change, strict=True) if one])
        return rewritten(calls, way, may_change)

    monkeypatch.setattr(fused_reader, "rewritten", count)
    monkeypatch.setattr(fused_reader, "_readers", type(fused_reader._readers)())
    monkeypatch.setattr(fused_reader, "_forms", type(fused_reader._forms)())
    return made


def _assert_as_eager(model, compiled, loss, inputs):
    results = []
    for one in (model, compiled):
        model.zero_grad()
        value = loss(one(inputs[0]), inputs[1])
        value.backward()
        results.append([value.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_batches_of_other_sizes(loss, traced):
    model = Model()
    compiled = rewrite(model, dynamic=True)
    counts = []
    for size in SIZES:
        _assert_as_eager(model, compiled, loss, batch(size))
        counts.append(len(traced))
    # Constants; the number of tokens a symbol; the number of sequences, too.
    assert counts[0] > 0
    assert counts[2] == counts[3], "the third number of tokens"
    assert counts[5] == counts[6], "the third number of sequences"


def tempered(z, y, number):
    return F.cross_entropy((z / number).flatten(0, 1), y.flatten())


def scaled(z, y, number):
    return (z.float() * number).log_softmax(-1).gather(-1, y[..., None]).mean()


def capped(z, y, number):
    return F.cross_entropy((number * torch.tanh(z / number)).flatten(0, 1), y.flatten())


def smoothed(z, y, number):
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), label_smoothing=number / 10)


def moved(z, y, number):
    return F.cross_entropy((z - number).flatten(0, 1), y.flatten())


def weighted(z, y, number):
    return (z * number).std(-1).mean() * number + (z.softmax(-1) ** number).sum()


def filled(z, y, number):
    return torch.where(torch.arange(V) % 3 == 0, -7.0 * number, z).std(-1).mean()


def last_tokens(z, y, number):
    number = int(4 * number) - 3
    return F.cross_entropy(z[:, number:].flatten(0, 1), y[:, number:].flatten())


def one_token(z, y, number):
    number = int(4 * number) - 4
    return F.cross_entropy(z[:, number], y[:, number])


ARE_SYMBOLS = [tempered, scaled, filled, last_tokens]
TAKE_GRAPHS = [capped, smoothed, moved, weighted, one_token]


@pytest.mark.parametrize("loss", ARE_SYMBOLS + TAKE_GRAPHS)
@pytest.mark.parametrize("kind", [float, int])
def test_numbers_that_change(loss, kind, traced):
    model, inputs = Model(), batch((3, 18))
    compiled = rewrite(model)
    for number in [1.25, 1.5, 1.75, 2.5, 3.5] if kind is float else [2, 3, 4, 1, 4]:
        _assert_as_eager(model, compiled, partial(loss, number=number), inputs)
    assert len(traced) == 2 or loss in TAKE_GRAPHS


def test_labels_at_other_places_in_memory(traced):
    model, rows = Model(), 20
    compiled, labels = rewrite(model), torch.randint(V, (8 * rows,))
    for step in range(3):
        x, y = torch.randn(rows, 16), labels[step * rows :][:rows]
        _assert_as_eager(model, compiled, F.cross_entropy, (x, y))
    assert len(traced) == 1


def test_strides_that_change(traced):
    model = Model()
    compiled = rewrite(model, dynamic=True)
    for rows in range(20, 28):
        x, y = batch((rows,))
        y = y if rows % 3 else torch.stack((y, y), 1)[:, 0]
        _assert_as_eager(model, compiled, focal, (x, y))
    assert len(traced) <= 4


def test_sizes_that_were_equal_by_chance(traced):
    model = Model()
    compiled = rewrite(model, dynamic=True)
    for size in ((7, 7), (9, 9), (9, 4), (4, 9), (1, 22), (30, 1), (16, 16)):
        _assert_as_eager(model, compiled, log_probabilities, batch(size))


def test_what_only_constants_have_is_not_told_as_refused(caplog):
    model, inputs = Model(), batch()
    compiled = rewrite(model)
    with caplog.at_level("INFO", logger="lmhead_pass"):
        for number in (20.0, 30.0, 40.0):
            _assert_as_eager(model, compiled, partial(capped, number=number), inputs)
    assert caplog.text.count("rewritten: cross_entropy") == 3
    assert "left alone" not in caplog.text


def test_without_symbols_each_size_is_traced(traced, monkeypatch):
    monkeypatch.setattr(symbols, "_found", lambda: [None] * len(symbols._NAMES))
    model = Model()
    compiled = rewrite(model, dynamic=True)
    for count, size in enumerate(SIZES, start=1):
        _assert_as_eager(model, compiled, shifted, batch(size))
        assert len(traced) == count
