"""Sums and weights that are written to in place."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from .. import forms, reference
from ..backend import rewrite
from .parts import kept, per_token


def sum_written_by_another_name(z, y):
    losses, total = per_token(z, y), torch.zeros(())
    name = total
    name += (losses * kept(y)).sum()
    clamped = name.clamp_(max=3.0)
    return clamped * 1, total.detach() * 1, losses.detach().amax()


def test_a_sum_that_is_written_by_another_name():
    def function(h, w, b, y):
        return sum_written_by_another_name(F.linear(h, w, b), y)

    tensors = forms.inputs()
    compiled = rewrite(function)
    torch.testing.assert_close(compiled(*tensors), function(*tensors))
    assert counters["lmhead_pass"]["refused"] == 0


@pytest.mark.parametrize("is_clamped", [False, True])
def test_a_sum_in_an_argument_keeps_its_gradient(is_clamped):
    """Where the caller finds it."""

    def function(h, w, b, y, total):
        total += (per_token(F.linear(h, w, b), y) * kept(y)).sum()
        if is_clamped:
            total.clamp_(max=500.0)
        return total * 2

    results = []
    tensors = forms.inputs()
    for run in (function, rewrite(function)):
        leaves, total = list(map(reference.leaf, tensors)), torch.tensor(2.0)
        run(*leaves, total)
        total.backward()
        results.append([total.detach(), *(leaf.grad for leaf in leaves[:3])])
    assert counters["lmhead_pass"]["refused"] == 0
    torch.testing.assert_close(*results)


def written_after_the_sum(losses, weights):
    total = (losses * weights).sum()
    weights.mul_(0.5)
    return total


def written_before_the_sum(losses, weights):
    weighted = losses * weights
    weights.mul_(0.5)
    return weighted.sum()


def written_between_two_sums(losses, weights):
    return written_after_the_sum(losses, weights) + (losses * (torch.arange(7) % 3)).sum()


@pytest.mark.parametrize(
    "weighted", [written_after_the_sum, written_before_the_sum, written_between_two_sums]
)
@pytest.mark.parametrize("is_joined", [False, True])
def test_weights_that_are_written_after_their_use_are_an_error_as_in_eager(weighted, is_joined):
    def function(h, w, b, y):
        z = F.linear(h, w, b)
        losses, weights = per_token(z, y), kept(y)
        if is_joined:
            return z.logsumexp(-1).mean() + weighted(losses, weights)
        return weighted(losses, weights)

    for run in (function, rewrite(function)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            run(*forms.inputs()).backward()
