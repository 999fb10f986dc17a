"""A compiled model returns its logits, and the loss is taken of them outside: it is fused."""

import logging
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import lmhead_pass
from benchmarks.memory import peak_bytes
from lmhead_pass.outside import fused_reader

from .. import reference
from ..backend import rewrite
from ..returned.model import is_unread

V, H = 160, 16


class Model(nn.Module):
    """A body and a head, whose logits it returns."""

    def __init__(self, hidden=H, vocab=V, bias=False, after=lambda logits: logits):
        super().__init__()
        self.body, self.head = nn.Linear(hidden, hidden), nn.Linear(hidden, vocab, bias=bias)
        self.after = after

    def forward(self, x):
        return self.after(self.head(self.body(x).tanh()))


def batch(rows=(3, 7), hidden=H, vocab=V):
    return torch.randn(*rows, hidden), torch.randint(vocab, rows)


def shifted(logits, y):
    return F.cross_entropy(logits[:, :-1].float().reshape(-1, V), y[:, 1:].reshape(-1))


def log_probabilities(logits, y):
    per_token = torch.log_softmax(logits / 1.3, -1).gather(-1, y[..., None]).squeeze(-1)
    return (per_token * torch.linspace(-1, 1, y.size(1))).sum()


def pieces(logits, y):
    parts = zip(logits.reshape(-1, V).split(5), y.reshape(-1).split(5), strict=True)
    losses = [F.cross_entropy(part, of_part, reduction="none") for part, of_part in parts]
    return torch.cat(losses).mean()


def softcapped(logits, y):
    return F.cross_entropy((30 * torch.tanh(logits / 30)).flatten(0, 1), y.flatten())


def with_z_loss(logits, y):
    return shifted(logits, y) + 1e-2 * logits.logsumexp(-1).square().mean()


def ignored(logits, y):
    y = y.masked_fill(torch.arange(y.size(1)) < 2, -100)
    return F.cross_entropy(logits.transpose(1, 2), y, label_smoothing=0.1)


def under_autocast(logits, y):
    with torch.autocast("cpu", torch.bfloat16):
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())


LOSSES = {
    function.__name__: function
    for function in (
        *(shifted, log_probabilities, pieces, softcapped, with_z_loss, ignored, under_autocast),
    )
}


def run(model, function, loss, inputs):
    x, y = inputs
    logits = function(x)
    result = loss(logits, y)
    gradients = torch.autograd.grad(result, list(model.parameters()))
    return logits, [result.detach(), *gradients]


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("bias", [False, True])
def test_a_loss_outside_is_fused(loss, bias):
    model, inputs = Model(bias=bias), batch()
    _, eager = run(model, model, loss, inputs)
    logits, results = run(model, rewrite(model), loss, inputs)
    assert is_unread(logits)
    assert counters["lmhead_pass"]["deferred"] == 1 and counters["lmhead_pass"]["rewritten"] >= 1
    double = model.double()
    _, exact = run(double, double, loss, (inputs[0].double(), inputs[1]))
    model.float()
    dtype = torch.bfloat16 if loss is under_autocast else torch.float32
    reference.assert_no_worse(results, eager, exact, dtype)


def test_inductor():
    model, inputs = Model(), batch()
    _, eager = run(model, model, with_z_loss, inputs)
    logits, results = run(model, torch.compile(model), with_z_loss, inputs)
    assert is_unread(logits)
    torch.testing.assert_close(results, eager, rtol=1e-4, atol=1e-6)


METRICS = {
    "argmax": lambda logits, y: (logits.argmax(-1) == y).float().mean(),
    "amax": lambda logits, y: logits.amax(-1),
    "log-probability": lambda logits, y: logits.log_softmax(-1).gather(-1, y[..., None]),
}


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_metrics_without_a_gradient(metric):
    model, (x, y) = Model(), batch((20, 2))
    compiled = rewrite(model)
    with torch.no_grad():
        logits = compiled(x)
        torch.testing.assert_close(metric(logits, y), metric(model(x), y))
        assert is_unread(logits)


def test_a_metric_beside_the_loss_of_a_training_step():
    model, (x, y) = Model(), batch()
    logits = rewrite(model)(x)
    shifted(logits, y).backward()
    with torch.no_grad():
        assert torch.equal(logits.argmax(-1), model(x).argmax(-1))
    assert is_unread(logits)


def test_the_same_way_of_use_is_traced_once(monkeypatch):
    model, traced = Model(), []
    rewritten = fused_reader.rewritten
    monkeypatch.setattr(fused_reader, "rewritten", lambda *a: traced.append(1) or rewritten(*a))
    for name in ("_readers", "_forms"):
        monkeypatch.setattr(fused_reader, name, type(fused_reader._readers)())
    monkeypatch.setattr(fused_reader, "_MOST", 4)
    compiled = rewrite(model, dynamic=True)
    for _ in range(3):
        x, y = batch()
        shifted(compiled(x), y).backward()
    assert len(traced) == 1
    for rows in range(4, 4 + 2 * fused_reader._MOST):
        x, y = batch((2, rows))
        shifted(compiled(x), y)
    assert len(fused_reader._readers) == fused_reader._MOST
    assert len(fused_reader._forms) == 1


def test_a_reset_forgets_ways_of_use():
    model, inputs = Model(), batch()
    for _ in range(2):
        torch.compiler.reset()
        counters.clear()
        run(model, rewrite(model), shifted, inputs)
        assert counters["lmhead_pass"] == {"deferred": 1, "rewritten": 1}


def test_targets_of_another_call_are_those_of_that_call():
    model, (x, _) = Model(), batch()
    compiled = rewrite(model)
    for _ in range(2):
        y = torch.randint(V, (3, 7))
        torch.testing.assert_close(shifted(compiled(x), y), shifted(model(x), y))


def test_what_is_written_down_is_of_the_time_it_was_called():
    model, (x, y) = Model(), batch()
    logits, factor = rewrite(model)(x), torch.tensor(2.0)
    scaled = logits * factor
    factor.zero_()
    torch.testing.assert_close(
        F.cross_entropy(scaled.flatten(0, 1), y.flatten()),
        F.cross_entropy((model(x) * 2.0).flatten(0, 1), y.flatten()),
    )


def masked(logits):
    logits[..., V - 10 :] = -1e4
    return logits


def test_a_loss_of_logits_with_masked_words():
    """Found by generated programs: a mask of words that is a step of the head's."""
    model, (x, y) = Model(after=masked), batch()
    inputs = x, y.clamp(max=V - 11)
    _, eager = run(model, model, shifted, inputs)
    _, results = run(model, rewrite(model), shifted, inputs)
    torch.testing.assert_close(results, eager)


def scaled_by_row(logits, y):
    return shifted(logits / torch.linspace(1, 2, logits.size(1))[:, None], y)


@pytest.mark.parametrize("loss", [shifted, scaled_by_row], ids=lambda f: f.__name__)
def test_a_loss_in_a_checkpoint(loss):
    """What is done for the first use of its kind is not counted as saved."""
    model, inputs = Model(), batch()
    checkpointed = partial(checkpoint, loss, use_reentrant=False)
    _, eager = run(model, model, loss, inputs)
    logits, results = run(model, rewrite(model), checkpointed, inputs)
    assert is_unread(logits)
    torch.testing.assert_close(results, eager)


@pytest.mark.parametrize("is_inside", [False, True], ids=["after", "inside"])
def test_logits_are_read_beside_a_loss_in_a_checkpoint(is_inside):
    """Found by generated programs: in the backward the region has to find them unread again."""

    def region(logits, y):
        loss = shifted(logits, y)
        return loss, logits.double()[:, 1:].sin().sum() if is_inside else loss

    def loss(logits, y):
        loss, more = checkpoint(region, logits, y, use_reentrant=False)
        return loss + more + logits.sin().sum()

    model, inputs = Model(), batch()
    _, eager = run(model, model, loss, inputs)
    _, results = run(model, rewrite(model), loss, inputs)
    torch.testing.assert_close(results, eager, rtol=1e-5, atol=1e-4)


def test_hidden_states_that_are_an_input_may_be_written_to():
    head, (x, y) = nn.Linear(H, V), batch()
    x.requires_grad_()
    results = []
    for function in (rewrite(head), head):
        head.weight.requires_grad_(False)
        logits = function(x)
        with torch.no_grad():
            before = x.clone()
            x.zero_()
        loss = shifted(logits, y)
        results.append([loss.detach(), *torch.autograd.grad(loss, x)])
        with torch.no_grad():
            x.copy_(before)
    torch.testing.assert_close(*results)


def test_an_out_of_range_target_is_an_error():
    model, (x, y) = Model(), batch()
    with pytest.raises(IndexError):
        shifted(rewrite(model)(x), y + V)


def test_a_changed_weight_is_an_error():
    model, (x, y) = Model(), batch()
    logits = rewrite(model)(x)
    model.head.weight.data += 1
    with pytest.raises(RuntimeError, match="weight was changed"):
        shifted(logits, y)


def test_the_log_tells_of_deferred_heads_losses_and_readings(caplog):
    model, (x, y) = Model(), batch()
    with caplog.at_level(logging.INFO, logger="lmhead_pass"):
        logits = rewrite(model)(x)
        F.cross_entropy(logits.flatten(0, 1), y.flatten(), label_smoothing=0.2)
        logits.tolist()
    deferred, rewritten, read = (record.getMessage() for record in caplog.records)
    assert deferred.startswith("deferred: linear") and "losses that are taken of them" in deferred
    assert rewritten.startswith("rewritten: cross_entropy") and __file__ in rewritten
    assert "`F.cross_entropy(logits.flatten" in rewritten
    assert read.startswith("read: tolist at") and "`logits.tolist()`" in read


NOT_DEFERRED = {
    "a projection": (Model(vocab=4 * H, hidden=H), torch.enable_grad, (3, 7)),
    "a few tokens to generate": (Model(), torch.no_grad, (3, 1)),
    "log-probabilities": (Model(after=lambda z: z.log_softmax(-1)), torch.enable_grad, (3, 7)),
}


@pytest.mark.parametrize(("model", "mode", "rows"), NOT_DEFERRED.values(), ids=NOT_DEFERRED)
def test_what_is_returned_as_it_is(model, mode, rows):
    with mode():
        result = rewrite(model)(torch.randn(*rows, H))
    assert type(result) is torch.Tensor and not counters["lmhead_pass"]


@pytest.mark.codegen
def test_memory():
    hidden, vocab, rows = 32, 8192, 1024
    model, (x, y) = Model(hidden, vocab), batch((rows,), hidden, vocab)
    compiled = torch.compile(model)

    def step():
        model.zero_grad()
        F.cross_entropy(compiled(x), y).backward()

    logits = 4 * rows * vocab
    gradients = 4 * hidden * vocab
    with lmhead_pass.config.patch(batch_chunk_size=64):
        step()
        assert peak_bytes(step) <= 0.15 * logits + gradients


def test_memory_of_a_second_loss():
    """Two gradients, and the logits of a chunk: none is held a third time while it is scaled."""
    hidden, vocab, rows = 32, 8192, 1024
    model, (x, y) = Model(hidden, vocab), batch((rows,), hidden, vocab)
    weight = torch.rand(vocab)

    def with_loss(x, y):
        logits = model(x)
        return F.cross_entropy(logits, y), logits

    compiled = rewrite(with_loss)

    def step():
        model.zero_grad()
        loss, logits = compiled(x, y)
        ((loss + F.cross_entropy(logits, y, weight=weight)) / 3).backward()

    logits = 4 * rows * vocab
    gradients = 4 * hidden * vocab
    with lmhead_pass.config.patch(batch_chunk_size=64):
        step()
        assert peak_bytes(step) <= 0.15 * logits + gradients


def test_pieces_hold_no_gradient_of_the_weight_each():
    hidden, vocab, rows = 64, 4096, 512
    model, (x, y) = Model(hidden, vocab), batch((rows,), hidden, vocab)
    peaks = {}
    for name, compiled in (("ours", rewrite(model)), ("eager", model)):

        def step(compiled=compiled):
            model.zero_grad()
            parts = zip(compiled(x).split(32), y.split(32), strict=True)
            sum(F.cross_entropy(part, of_part) for part, of_part in parts).backward()

        step()
        peaks[name] = peak_bytes(step)
    assert peaks["ours"] <= 1.1 * peaks["eager"]


def test_a_head_that_alone_is_trained_and_is_frozen_before_the_loss():
    model, (x, y) = Model(), batch()
    model.body.requires_grad_(False)
    found = []
    for function in (rewrite(model), model):
        model.head.requires_grad_(True)
        z = function(x)
        model.head.requires_grad_(False)
        loss = shifted(z, y)
        assert z.requires_grad and loss.requires_grad
        loss.backward()
        assert model.head.weight.grad is None
        found.append(loss.detach())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("part", [lambda z: z[-1:, :, :3], lambda z: z])
def test_a_count_of_words_beside_a_loss(part):
    """Autograd sends no gradient through it."""
    model, (x, _) = Model(), batch()
    found = []
    for function in (rewrite(model), model):
        model.zero_grad()
        z = function(x)
        (part(z).norm(0, -1).sum() + z.logsumexp(-1).mean()).backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found)


def test_no_rows(caplog):
    model = Model(after=lambda logits: logits[:, 1:])
    compiled = rewrite(model)
    for rows in ((3, 7), (2, 9), (5, 1)):
        x, _ = batch(rows)
        total = compiled(x).sum(-1)
        torch.testing.assert_close(total + 0, model(x).sum(-1))
        total.sum().backward()
    assert "failed" not in caplog.text
