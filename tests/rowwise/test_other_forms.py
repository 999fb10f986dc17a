"""What the fused forms refuse: run in chunks or left alone, it is as exact as it was."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import lmhead_pass

from .. import forms, reference
from ..backend import rewrite
from ..logits import test_caps, test_consumers, test_masks
from ..plan.test_refusals import REFUSED
from ..plan.test_unreached import LOSSES, step_by


def check(function, tensors):
    leaves = [reference.leaf(tensor) for tensor in tensors]
    torch.manual_seed(1)
    theirs = _run(function, leaves)
    torch.manual_seed(1)
    with lmhead_pass.config.patch(batch_chunk_size=5):
        ours = _run(rewrite(function), tensors)
    assert counters["lmhead_pass"]["failed"] == 0
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(
                a, b, equal_nan=True, rtol=2e-3 if a.dtype == torch.float16 else 1e-4, atol=2e-5
            )


def _run(function, tensors):
    result = function(*tensors)
    losses = result if isinstance(result, tuple) else (result,)
    if losses[0].requires_grad:
        losses[0].backward()
    return [losses[0].detach(), *(tensor.grad for tensor in tensors)]


# Eager rounds logits of some thousands to FP16, and chunks do not.
@pytest.mark.parametrize("name", [name for name in REFUSED if name != "scaled_in_float16"])
def test_refused_by_fused_forms(name):
    tensors = forms.inputs()
    if name.startswith("write_to_hidden"):  # eager autograd would refuse it too
        tensors = [tensor.detach() for tensor in tensors]
    check(REFUSED[name][0], tensors)


@pytest.mark.parametrize("step", ["clamp", "mul"])
@pytest.mark.parametrize("loss", LOSSES)
def test_behind_a_step_without_fused_form(loss, step):
    check(step_by(step, loss), forms.inputs())


@pytest.mark.parametrize("name", test_caps.REFUSED)
def test_what_is_no_softcap(name):
    chain, _ = test_caps.REFUSED[name]
    check(lambda h, w, b, y: forms.flat(chain(F.linear(h, w, b)), y), forms.inputs())


@pytest.mark.parametrize("name", test_masks.REFUSED)
def test_what_is_no_mask(name):
    chain, _ = test_masks.REFUSED[name]
    check(lambda h, w, b, y: forms.flat(chain(F.linear(h, w), y, b), y), forms.inputs())


@pytest.mark.parametrize("name", test_consumers.REACHED)
def test_measures_that_a_gradient_reaches(name):
    def function(h, w, b, y):
        z = F.linear(h, w, b)
        return forms.flat(z, y) + test_consumers.REACHED[name](z, y).sum()

    check(function, forms.inputs())


def test_a_piece_of_one_row():
    """Its index is one of its row, not the same for all rows."""

    def function(h, w, b, y):
        logits = F.linear(h, w, b).flatten(0, 1)
        assert logits.size(0) % 2 == 1
        pairs = zip(logits.split(2), y.flatten().split(2), strict=True)
        losses = [z.log_softmax(1).square().gather(1, words[:, None]).mean() for z, words in pairs]
        return sum(losses) + logits.std(-1).mean()

    check(function, forms.inputs())
