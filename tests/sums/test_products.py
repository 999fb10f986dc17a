"""How many products a step takes: three where the weights of a sum are known, four otherwise."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from .. import forms
from ..backend import rewrite
from ..checks import assert_as_eager
from .known_weights import KNOWN
from .unknown_weights import UNKNOWN


def assert_form_as_eager(form, passes):
    tensors = forms.inputs()

    def function(h, w, b, y):
        return form(F.linear(h, w, b), y)

    compiled = rewrite(function)
    assert_as_eager(function, tensors, compiled)
    of_a_step = list(passes)
    results, expected = compiled(*tensors), function(*tensors)
    torch.testing.assert_close(results, expected)
    gradients = [[t.requires_grad for t in tree_leaves(values)] for values in (results, expected)]
    assert gradients[0] == gradients[1]
    return of_a_step


@pytest.mark.parametrize("name", KNOWN)
def test_three_products(name, passes):
    """One call computes the gradients, in the forward; what has none may have another."""
    of_a_step = assert_form_as_eager(KNOWN[name], passes)
    assert of_a_step.count("forward_and_gradients") == 1
    assert "backward" not in of_a_step


@pytest.mark.parametrize("name", UNKNOWN)
def test_four_products(name, passes, no_regions):
    """What a row counts for is not known in the forward, or not by the fused forms."""
    assert "backward" in assert_form_as_eager(UNKNOWN[name], passes)
