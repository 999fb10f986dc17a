"""Weighted sums in narrow dtypes and under autocast."""

import pytest
import torch
import torch.nn.functional as F

from .. import forms, reference
from ..backend import rewrite
from ..checks import assert_as_eager
from .known_weights import KNOWN


def test_weights_in_a_product_are_not_rounded_by_autocast():
    """The call may be in one, where the product was not."""
    tensors = forms.inputs()

    def function(h, w, b, y):
        losses = F.cross_entropy(F.linear(h, w, b).mT, y, reduction="none")
        with torch.autocast("cpu", torch.bfloat16):
            weights = torch.linspace(0.013, 1.7, 21, dtype=h.dtype).view(7, 3) * 1.01
        return (losses @ weights).sum() / 3, losses.detach().amax()

    assert_as_eager(function, tensors, rewrite(function))


def test_z_loss_in_float16(passes):
    tensors = forms.inputs(torch.float16)

    def function(h, w, b, y):
        return KNOWN["z_loss"](F.linear(h, w, b), y)

    expected = reference.run(function, list(map(reference.leaf, tensors)))
    results = reference.run(rewrite(function), tensors)
    assert passes == ["forward_and_gradients"]
    torch.testing.assert_close(results, expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_sum_that_is_divided_is_rounded_as_often_as_a_mean(dtype):
    def mean(h, w, b, y):
        return forms.flat(F.linear(h, w, b), y, ignore_index=3)

    def divided(h, w, b, y):
        total = forms.flat(F.linear(h, w, b), y, ignore_index=3, reduction="sum")
        return total / (y != 3).sum()

    tensors = forms.inputs(dtype)
    results = (
        reference.run(rewrite(function), list(map(reference.leaf, tensors)))
        for function in (mean, divided)
    )
    for expected, result in zip(*results, strict=True):
        assert torch.equal(expected, result)
