"""``lmhead_pass.explain``."""

import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._dynamo.utils import counters

import lmhead_pass
from lmhead_pass import compat
from lmhead_pass.graph_pass import the_pass

from ..forms import V, flat
from ..model import Model
from ..process import output_of


@pytest.fixture
def tokens():
    return torch.randint(V, (3, 7))


def test_before_anything_is_compiled():
    """Looking for the pass imports Inductor, which registers the pass."""
    code = """
        import torch, torch.nn.functional as F
        import lmhead_pass

        def loss(hidden, weight, target):
            return F.cross_entropy(hidden @ weight.t(), target)

        weight = torch.randn(5000, 16, requires_grad=True)
        print(lmhead_pass.explain(loss, torch.randn(8, 16), weight, torch.arange(8)))
    """
    assert "lmhead_pass: 1 rewritten, 0 left alone" in output_of(code, is_fresh=True)


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

    with lmhead_pass.config.patch(returned_logits="keep"):
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


def other_pass(graph):
    """Somebody else's."""


def test_another_backend_runs_no_pass(tokens):
    for compiled in (torch.compile(Model(), backend="aot_eager"), Model()):
        if not hasattr(compiled, "_orig_mod"):
            compiled.compile(backend="eager")
        explanation = lmhead_pass.explain(compiled, tokens)
        assert explanation.rewritten == []
        assert "backend other than Inductor" in explanation.refused[0]


def test_options_that_replace_the_passes(tokens):
    options = {"pre_grad_custom_pass": compat.pass_setting([other_pass])}
    explanation = lmhead_pass.explain(torch.compile(Model(), options=options), tokens)
    assert explanation.rewritten == []
    assert "replaces the registered passes" in explanation.refused[0]
    options = {"pre_grad_custom_pass": compat.pass_setting([other_pass, the_pass()])}
    assert lmhead_pass.explain(torch.compile(Model(), options=options), tokens).rewritten
    assert lmhead_pass.explain(torch.compile(Model(), mode="max-autotune"), tokens).rewritten


def test_without_registration(tokens):
    lmhead_pass.unregister()
    try:
        for model in (Model(), torch.compile(Model())):
            explanation = lmhead_pass.explain(model, tokens)
            assert explanation.rewritten == []
            assert "lmhead_pass.register() adds it again" in explanation.refused[0]
    finally:
        lmhead_pass.register()
    with lmhead_pass.disabled():
        assert not lmhead_pass.explain(Model(), tokens).rewritten


def test_places_are_the_users(tokens):
    """Not the line of this package that calls the function."""
    model = nn.Sequential(nn.Embedding(V, 8), nn.Linear(8, V), nn.Flatten(0, 1), nn.LogSoftmax(-1))
    explanation = lmhead_pass.explain(model, tokens)
    assert not re.search(r"explanation.explain\.py", str(explanation)), explanation
    criterion = torch.compile(nn.CrossEntropyLoss())
    explanation = lmhead_pass.explain(criterion, torch.randn(3, V), tokens[:, 0])
    assert "an input of this graph" in str(explanation)
    assert not re.search(r"explanation.explain\.py", str(explanation)), explanation
