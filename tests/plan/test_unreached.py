"""Losses behind a step that is not understood: none is left alone without a word."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import lmhead_pass

from .. import forms
from ..backend import rewrite

V = forms.V

LOSSES = {
    "cross_entropy": lambda z, y: F.cross_entropy(z, y),
    "nll_loss": lambda z, y: F.nll_loss(z.log_softmax(-1), y),
    "gathered": lambda z, y: -z.log_softmax(-1).gather(-1, y[:, None]).mean(),
    "indexed": lambda z, y: -z.log_softmax(-1)[torch.arange(len(y)), y].mean(),
    "one_hot": lambda z, y: -(F.one_hot(y, V) * z.log_softmax(-1)).sum(-1).mean(),
    "logsumexp": lambda z, y: (z.logsumexp(-1) - z.gather(-1, y[:, None])[:, 0]).mean(),
    "probability": lambda z, y: -(z.softmax(-1).gather(-1, y[:, None]) + 1e-9).log().mean(),
    "by_hand": lambda z, y: (z.exp().sum(-1).log() - z.gather(-1, y[:, None])[:, 0]).mean(),
    "divergence": lambda z, y: F.kl_div(
        z.log_softmax(-1), F.one_hot(y, V).float(), reduction="sum"
    ),
}
STEPS = {
    "clamp": lambda z, h: z.clamp(-30, 30),
    "dropout": lambda z, h: F.dropout(z, 0.1),
    "mul": lambda z, h: z * torch.sigmoid(h.flip(0) @ h.new_ones(h.size(-1), V)),
    "bmm": lambda z, h: torch.bmm(z[None], torch.eye(V)[None])[0],
}


def step_by(step, loss):
    def function(h, w, b, y):
        h, y = h.flatten(0, 1), y.flatten()
        return LOSSES[loss](STEPS[step](F.linear(h, w), h), y)

    return function


@pytest.mark.usefixtures("no_regions")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("step", STEPS)
def test_the_step_is_named(step, loss, caplog):
    with caplog.at_level("INFO", logger="lmhead_pass"):
        rewrite(step_by(step, loss))(*forms.inputs())
    assert counters["lmhead_pass"] == {"refused": 1}
    (line,) = (r.getMessage() for r in caplog.records if r.name == "lmhead_pass")
    assert re.search(rf"left alone: .*: .*\b{step} at \S+/test_unreached.py:\d+ `", line), line


@pytest.mark.usefixtures("no_regions")
def test_explain_names_it_too():
    explanation = lmhead_pass.explain(step_by("clamp", "gathered"), *forms.inputs())
    assert "clamp at" in explanation.refused[0]
    assert "no loss over logits" not in str(explanation)


@pytest.mark.parametrize("loss", ["gathered", "logsumexp", "probability"])
def test_logits_from_another_graph(loss):
    """A loss by hand counts as one where advice is given on graph breaks."""

    def function(h, w, b, y):
        logits = F.linear(h, w).flatten(0, 1)
        torch._dynamo.graph_break()
        return LOSSES[loss](logits, y.flatten())

    explanation = lmhead_pass.explain(function, *forms.inputs())
    assert "an input of this graph" in explanation.refused[0]
    assert "test_unreached.py" in explanation.advice[0]


def test_other_wide_layers_are_no_losses():
    def function(h, w, b, y):
        wide = F.linear(h, w)
        gated = torch.log(1 + torch.exp(wide)) * wide.clamp(-1, 1).softmax(-1)
        return F.linear(gated, w.mT).sum()

    rewrite(function)(*forms.inputs())
    assert not counters["lmhead_pass"]
