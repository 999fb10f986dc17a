"""Losses outside of the rows that a mask picks: how many these are changes from step to step."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from ..backend import rewrite
from ..returned.model import is_unread
from .test_changing_numbers import traced  # noqa: F401
from .test_losses import Model, batch


def masked(z, y, mask):
    return F.cross_entropy(z[mask], y[mask])


def with_a_slice(z, y, mask):
    return F.cross_entropy(z[mask, :].float(), y[mask])


def of_flat(z, y, mask):
    mask = mask.flatten()
    return F.cross_entropy(z.flatten(0, 1)[mask], y.flatten()[mask])


def shifted(z, y, mask):
    mask = mask[:, 1:]
    return F.cross_entropy(z[:, :-1][mask], y[:, 1:][mask], reduction="sum")


def of_sequences(z, y, mask):
    mask = mask.any(1)
    return F.cross_entropy(z[mask].flatten(0, 1), y[mask].flatten())


def entropy(z, y, mask):
    lp = z[mask].log_softmax(-1)
    return -(lp.exp() * lp).sum(-1).mean()


def gathered(z, y, mask):
    return -z[mask].log_softmax(-1).gather(-1, y[mask].unsqueeze(-1)).mean()


def words(z, y, mask):
    return -z.log_softmax(-1)[mask, y[mask]].mean()


def by_places(z, y, mask):
    places = mask.nonzero(as_tuple=True)
    return F.cross_entropy(z[places], y[places])


LOSSES = [words, by_places, masked, with_a_slice, of_flat, shifted, of_sequences, entropy, gathered]


def _assert_as_eager(model, compiled, loss, x, y, mask):
    results = []
    for one in (model, compiled):
        model.zero_grad()
        z = one(x)
        value = loss(z, y, mask)
        value.backward()
        results.append([value.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6, equal_nan=True)
    return z


@pytest.mark.parametrize("loss", LOSSES)
def test_of_other_numbers_of_rows(loss, traced):  # noqa: F811
    model = Model()
    compiled = rewrite(model, dynamic=True)
    for length in (7, 9, 9, 12, 8, 10):
        x, y = batch((3, length))
        z = _assert_as_eager(model, compiled, loss, x, y, torch.rand(3, length) < 0.6)
        assert is_unread(z)
    assert 1 <= len(traced) <= 4


def test_none_and_all():
    model, (x, y) = Model(), batch()
    compiled = rewrite(model)
    for mask in (torch.zeros_like(y), torch.ones_like(y), y * 0 + torch.tensor([1, 0] * 3 + [0])):
        _assert_as_eager(model, compiled, masked, x, y, mask.bool())
    assert counters["lmhead_pass"]["rewritten"] >= 1


def test_others_are_as_in_eager():
    model, (x, _) = Model(), batch()
    z, expected = rewrite(model)(x), model(x)
    for mask in (expected > 0, torch.ones(2, 7).bool(), torch.ones(3).bool(), torch.tensor(True)):
        for index in (mask, (mask, None), (..., mask)):
            try:
                right = expected[index]
            except IndexError:
                with pytest.raises(IndexError):
                    z[index]
                continue
            torch.testing.assert_close(z[index] * 1, right)


def test_what_is_picked_is_a_copy():
    model, (x, y) = Model(), batch()
    z, expected = rewrite(model)(x), model(x)
    mask = y % 2 == 0
    some, right = z[mask], expected[mask]
    some.mul_(2)
    torch.testing.assert_close(some * 1, right * 2)
    torch.testing.assert_close(z * 1, expected)
