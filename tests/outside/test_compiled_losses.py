"""Logits enter another compiled function: a loss compiled apart, or what a graph break leaves."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters

import lmhead_pass
from benchmarks.memory import peak_bytes
from lmhead_pass.rewrite import lazy_inputs

from .. import reference
from ..backend import rewrite
from ..returned.model import is_unread
from .test_losses import LOSSES, H, Model, V, batch, log_probabilities, run, shifted, under_autocast


class Broken(nn.Module):
    """A model with a graph break between its head and its loss."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, x, y):
        logits = self.model(x)
        torch._dynamo.graph_break()
        return self.loss(logits, y), logits


def assert_no_worse(model, loss, eager, results, inputs):
    double = model.double()
    _, exact = run(double, double, loss, (inputs[0].double(), inputs[1]))
    model.float()
    dtype = torch.bfloat16 if loss is under_autocast else torch.float32
    reference.assert_no_worse(results, eager, exact, dtype)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_loss_that_is_compiled_apart_is_fused(loss):
    model, inputs = Model(), batch()
    _, eager = run(model, model, loss, inputs)
    compiled, compiled_loss = rewrite(model), rewrite(loss)
    for _ in range(2):
        logits, results = run(model, compiled, compiled_loss, inputs)
        assert is_unread(logits)
    assert counters["lmhead_pass"]["deferred"] == 1 and not counters["lmhead_pass"]["refused"]
    assert_no_worse(model, loss, eager, results, inputs)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_loss_after_a_graph_break_is_fused(loss):
    model, inputs = Model(), batch()
    _, eager = run(model, model, loss, inputs)
    compiled = rewrite(Broken(model, loss))
    for _ in range(2):
        result, logits = compiled(*inputs)
        assert is_unread(logits)
        results = [result.detach(), *torch.autograd.grad(result, list(model.parameters()))]
    assert counters["lmhead_pass"]["deferred"] == 1 and not counters["lmhead_pass"]["refused"]
    assert_no_worse(model, loss, eager, results, inputs)


@pytest.mark.parametrize("backend", [rewrite, torch.compile])
def test_a_whole_step_with_breaks(backend):
    """Dynamo runs the backward, too: it compiles none of this package's own functions."""

    def step(x, y):
        logits = model(x)
        torch._dynamo.graph_break()
        loss = shifted(logits, y)
        loss.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        return loss.detach(), *gradients

    model, inputs = Model(), batch()
    compiled = backend(step)
    for _ in range(3):
        torch.testing.assert_close(compiled(*inputs), step(*inputs))
    assert counters["lmhead_pass"]["deferred"] == 1 and not counters["lmhead_pass"]["refused"]
    assert counters["stats"]["unique_graphs"] <= 3


def doing_more(logits, y):
    return shifted(logits, y) + torch.ones(400, 40).matmul(torch.ones(40)).sum()


def reading_more(logits, y):
    return shifted(logits, y) + logits.sin().sum()


COMPILED = {
    "does more": (doing_more, {}),
    "reads more": (reading_more, {}),
    "one graph": (shifted, {"fullgraph": True}),
}


@pytest.mark.parametrize(("loss", "options"), COMPILED.values(), ids=COMPILED)
def test_what_stays_compiled_reads_the_logits(loss, options):
    model, inputs = Model(), batch()
    _, eager = run(model, model, loss, inputs)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled, compiled_loss = rewrite(model), rewrite(loss, then=counter, **options)
    for _ in range(2):
        logits, results = run(model, compiled, compiled_loss, inputs)
        assert not is_unread(logits)
    assert counter.frame_count == 1
    torch.testing.assert_close(results, eager, rtol=1e-5, atol=1e-5)


def test_a_failure_in_the_pass_leaves_the_function_compiled(monkeypatch, caplog):
    def fail(edit):
        raise AssertionError("a fault")

    model, inputs = Model(), batch()
    _, eager = run(model, model, shifted, inputs)
    logits = rewrite(model)
    monkeypatch.setattr(lazy_inputs, "prepare", fail)
    with lmhead_pass.config.patch(strict=False):
        _, results = run(model, logits, rewrite(shifted, then=aot_eager), inputs)
    torch.testing.assert_close(results, eager, rtol=1e-5, atol=1e-5)
    assert counters["lmhead_pass"]["failed"] == 1 and "a fault" in caplog.text
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"config\.strict"):
        run(model, logits, rewrite(shifted), inputs)


def test_other_logits_may_follow():
    """A function that was left to eager takes whatever it is given."""
    model, inputs = Model(), batch()
    compiled, compiled_loss = rewrite(model), rewrite(log_probabilities)
    _, eager = run(model, model, log_probabilities, inputs)
    for function in (compiled, model, compiled):
        torch.testing.assert_close(run(model, function, compiled_loss, inputs)[1], eager)


def halved(z, name):
    z.div_(2.0)
    return name.sum(-1)


NAMES = {
    "a view": lambda z: z.view(-1, V),
    "a piece": lambda z: z[:, 1:],
    "itself": lambda z: z,
    "values": lambda z: z.as_strided((V,), (1,)),
}


@pytest.mark.parametrize("backend", [rewrite, torch.compile])
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_names_of_the_same_memory_stay_so(name, backend):
    model, (x, _) = Model(), batch((8, 4))
    with torch.no_grad():
        z, expected = backend(model)(x), model(x)
        torch.testing.assert_close(
            backend(halved)(z, name(z)), halved(expected, name(expected)), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(z + 0, expected)


@pytest.mark.codegen
@pytest.mark.parametrize("is_broken", [False, True], ids=["compiled apart", "after a break"])
def test_memory(is_broken):
    hidden, vocab, rows = 32, 8192, 1024
    model, (x, y) = Model(hidden, vocab), batch((rows,), hidden, vocab)
    if is_broken:
        compiled = torch.compile(Broken(model, F.cross_entropy))
    else:
        parts = torch.compile(model), torch.compile(F.cross_entropy)
        compiled = lambda x, y: [parts[1](parts[0](x), y)]  # noqa: E731

    def step():
        model.zero_grad()
        compiled(x, y)[0].backward()

    logits = 4 * rows * vocab
    gradients = 4 * hidden * vocab
    with lmhead_pass.config.patch(batch_chunk_size=64):
        step()
        assert peak_bytes(step) <= 0.15 * logits + gradients


assert H < V / 6  # or the head would not be deferred
