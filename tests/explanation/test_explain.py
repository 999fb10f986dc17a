"""``lmhead_pass.explain``."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._dynamo.utils import counters

import lmhead_pass

from ..forms import V, flat
from ..model import Model


@pytest.fixture
def tokens():
    return torch.randint(V, (3, 7))


def test_rewritten(tokens):
    explanation = lmhead_pass.explain(Model(), tokens)
    assert len(explanation.rewritten) == 1
    assert explanation.refused == explanation.graph_breaks == []
    text = str(explanation)
    assert "1 rewritten, 0 left alone, in 1 graph\n" in text
    assert "forms.py" in text
    assert "logits avoided" in text


def test_refused(tokens):
    class Returning(Model):
        def forward(self, tokens):
            logits = self.head(self.embedding(tokens))
            return flat(logits, tokens), logits

    with lmhead_pass.config.patch(returned_logits="keep"):
        text = str(lmhead_pass.explain(Returning(), tokens))
    assert "0 rewritten, 1 left alone" in text
    assert "returns the logits" in text


def test_head_and_loss_in_different_graphs(tokens):
    class Broken(Model):
        def forward(self, tokens):
            logits = self.head(self.embedding(tokens))
            torch._dynamo.graph_break()
            return flat(logits, tokens)

    explanation = lmhead_pass.explain(Broken(), tokens)
    assert explanation.graphs == 2
    text = str(explanation)
    assert "the logits are an input of this graph" in text
    assert "test_explain.py" in explanation.graph_breaks[0]
    assert "torch._dynamo.graph_break()" in explanation.graph_breaks[0]
    assert len(explanation.advice) == 1
    assert text.splitlines()[-1] == f"fix: {explanation.advice[0]}"


def test_no_loss(tokens):
    assert "no loss over logits reached a graph" in str(
        lmhead_pass.explain(nn.Embedding(V, 4), tokens)
    )


def test_nothing_stays(tokens):
    """No compiled code, no counters, no random numbers drawn, no recompile limit used up."""
    model = Model()
    compiled = torch.compile(model)
    state = torch.random.get_rng_state()
    for _ in range(12):
        assert len(lmhead_pass.explain(compiled, tokens).rewritten) == 1
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not counters["lmhead_pass"]
    assert not counters["graph_break"]
    compiled(tokens)
    assert counters["lmhead_pass"] == {"rewritten": 1}


def test_on_a_warm_compiled_model(tokens):
    compiled = torch.compile(Model())
    compiled(tokens)
    assert len(lmhead_pass.explain(compiled, tokens).rewritten) == 1


def test_keyword_arguments_and_functions(tokens):
    weight = torch.randn(V, 16)

    def function(tokens, *, hidden):
        return F.cross_entropy(hidden @ weight.t(), tokens[0])

    assert len(lmhead_pass.explain(function, tokens, hidden=torch.randn(7, 16)).rewritten) == 1
