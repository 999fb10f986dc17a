"""Heads and losses in regions of torch.utils.checkpoint, together or apart."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import lmhead_pass

from .. import forms, reference
from ..backend import rewrite
from ..checks import assert_as_eager, check


def kept(function, *args):
    return checkpoint(function, *args, use_reentrant=False)


def body(h):
    return torch.relu(h * 2)


def body_and_head(h, w):
    return F.linear(body(h), w)


def head_and_loss(h, w, y):
    return forms.flat(F.linear(h, w), y)


def everything(h, w, y):
    return forms.flat(body_and_head(h, w) / 0.7, y)


def loss_and_logits(h, w, y):
    logits = F.linear(h, w)
    return forms.flat(logits, y), logits


FORMS = {
    "head": lambda h, w, y: forms.flat(kept(F.linear, body(h), w), y),
    "body_and_head": lambda h, w, y: forms.flat(kept(body_and_head, h, w) * 2, y),
    "loss": lambda h, w, y: kept(forms.flat, F.linear(body(h), w), y),
    "loss_and_nothing_else": lambda h, w, y: kept(
        F.cross_entropy, F.linear(body(h), w).flatten(0, 1), y.flatten()
    ),
    "head_and_loss_together": lambda h, w, y: kept(head_and_loss, body(h), w, y),
    "head_and_loss_apart": lambda h, w, y: kept(forms.flat, kept(F.linear, body(h), w), y),
    "everything": lambda h, w, y: kept(everything, h, w, y),
    "log_probabilities": lambda h, w, y: (
        -kept(forms.LOG_PROBABILITIES["gather"], F.linear(body(h), w), y).mean()
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(name):
    hidden, weight, _, target = forms.inputs()
    check(FORMS[name], (hidden, weight, target))


@pytest.mark.codegen
@pytest.mark.parametrize("name", ["body_and_head", "head_and_loss_together"])
def test_inductor(name):
    hidden, weight, _, target = forms.inputs()
    check(FORMS[name], (hidden, weight, target), torch.compile(FORMS[name]))


def test_nothing_is_computed_twice():
    """In its region, the loss would come with its gradients, and again in the backward."""
    hidden, weight, _, target = forms.inputs()
    loss = torch.compile(FORMS["head_and_loss_together"])(hidden, weight, target)
    with torch.profiler.profile() as profile:
        loss.backward()
    assert not any("lmhead_pass" in event.name for event in profile.events())


def test_returned_logits_of_a_region():
    hidden, weight, _, target = forms.inputs()
    graphs = []
    loss, logits = rewrite(lambda h, w, y: kept(loss_and_logits, h, w, y), graphs)(
        hidden, weight, target
    )
    assert counters["lmhead_pass"] == {"rewritten": 1}
    torch.testing.assert_close(logits.detach(), F.linear(hidden, weight).detach())
    torch.testing.assert_close(loss, forms.flat(F.linear(hidden, weight), target))


def write(h, w, y):
    z = F.linear(h, w)
    with torch.no_grad():
        z = z * 1
    return z


def many_readers(z, y):
    return forms.flat(z, y) + 0 * z.detach().std()


@pytest.mark.parametrize(
    "function",
    [
        lambda h, w, y: forms.flat(kept(write, h, w, y), y) + 0 * w.sum(),
        lambda h, w, y: kept(many_readers, F.linear(h, w), y),
        lambda h, w, y: forms.flat(kept(F.linear, h, w).relu(), y),
    ],
    ids=["another mode", "a user in the region", "a user behind the region"],
)
def test_what_is_not_rewritten_stays_in_its_region(function):
    hidden, weight, _, target = forms.inputs()
    graphs = []
    expected = reference.run(function, [reference.leaf(t) for t in (hidden, weight, target)])
    results = reference.run(rewrite(function, graphs), (hidden, weight, target))
    assert counters["lmhead_pass"]["rewritten"] == 0
    assert graphs[0] == graphs[1]
    torch.testing.assert_close(results, expected)


def attention(h, qkv, w_up):
    q, k, v = F.linear(h, qkv).chunk(3, dim=-1)
    h = h + F.scaled_dot_product_attention(q, k, v)
    return F.relu(F.linear(h, w_up), inplace=True)[..., : h.size(-1)] + h


def test_wide_layers_of_a_block_are_no_heads():
    """They go into an attention, which may draw, and are written in place."""
    hidden, weight, _, target = forms.inputs()
    size = hidden.size(-1)
    qkv, up = (torch.randn(words, size, requires_grad=True) for words in (3 * size, 256))
    check(
        lambda h, qkv, up, w, y: kept(head_and_loss, kept(attention, h, qkv, up), w, y),
        (hidden, qkv, up, weight, target),
    )


def pieces(h, w, y):
    parts = zip(h.chunk(2), [w, w], y.chunk(2), strict=True)
    return sum(kept(head_and_loss, *part) for part in parts)


def test_losses_of_several_regions_share_a_call(caplog):
    """Inductor shows the pass each region before the graph that calls them."""
    hidden, weight, _, target = forms.inputs()
    with caplog.at_level("INFO", "lmhead_pass"):
        assert_as_eager(pieces, (hidden, weight, target), torch.compile(pieces))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert all("in one call with others" in line for line in told)


def in_another_mode(h, w, y):
    loss = head_and_loss(h, w, y)
    with torch.no_grad():
        h.sum()
    return loss


@pytest.mark.parametrize("compiler", [rewrite, torch.compile])
def test_a_region_that_must_stay_whole_is_rewritten_inside(compiler):
    function = partial(kept, in_another_mode)
    hidden, weight, _, target = forms.inputs()
    check(function, (hidden, weight, target), compiler(function))
    assert counters["lmhead_pass"] == {"rewritten": 1}


@pytest.mark.parametrize("function", [FORMS["head_and_loss_together"], pieces])
def test_explain_counts_each_loss_once(function):
    hidden, weight, _, target = forms.inputs()
    explanation = lmhead_pass.explain(function, hidden, weight, target)
    assert len(explanation.rewritten) == (2 if function is pieces else 1)
    assert not explanation.refused
