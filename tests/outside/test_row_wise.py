"""Losses without a fused form, taken outside of logits that a compiled model returned."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import lmhead_pass
from benchmarks.memory import peak_bytes
from lmhead_pass.op.kernels import row_loop

from .. import reference
from ..backend import rewrite
from ..returned.model import is_unread
from .test_losses import Model as Returning
from .test_losses import V, batch


def focal(logits, y, z):
    p = logits.softmax(-1).gather(-1, y[..., None]).squeeze(-1)
    return (-((1 - p) ** 2) * p.log()).mean()


def entropy(logits, y, z):
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean() + F.cross_entropy(
        logits.flatten(0, 1), y.flatten()
    )


def distillation(logits, y, z):
    log_p, p = F.log_softmax(logits / 2, -1), F.softmax(z / 2, -1)
    return 4 * F.kl_div(log_p, p, reduction="batchmean")


def spread(logits, y, z):
    return (logits[:, :-1].std(-1) * (y[:, 1:] > 9)).sum() + logits.square().mean()


def soft_targets(logits, y, z):
    return F.cross_entropy(logits.flatten(0, 1), z.softmax(-1).flatten(0, 1))


def squared(logits, y, z):
    return logits.sin().pow(2).sum(-1).mean() + logits.sigmoid().std(-1).mean()


def of_several_labels(logits, y, z):
    return F.binary_cross_entropy_with_logits(logits, (z > 0).to(logits.dtype))


LOSSES = [focal, entropy, distillation, spread, soft_targets, squared, of_several_labels]


def results(model, function, loss, tensors):
    x, *others = tensors
    logits = function(x)
    loss = loss(logits, *others)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return logits, [loss.detach(), *gradients]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_loss_without_a_fused_form(loss, dtype):
    model = Returning(bias=True).to(dtype)
    tensors = [*batch(), torch.randn(3, 7, V)]
    tensors = [t.to(dtype) if t.is_floating_point() else t for t in tensors]
    _, eager = results(model, model, loss, tensors)
    with lmhead_pass.config.patch(batch_chunk_size=5):
        logits, ours = results(model, rewrite(model), loss, tensors)
    assert is_unread(logits)
    assert counters["lmhead_pass"]["rewritten"] >= 1
    exact = results(model.double(), model, loss, reference.doubles(tensors))[1]
    reference.assert_no_worse(ours, eager, exact, dtype)


def test_what_mixes_rows_reads_the_logits():
    model, (x, _) = Returning(), batch()
    logits = rewrite(model)(x)
    torch.testing.assert_close((logits.exp() / 2).std(1).mean(), (model(x).exp() / 2).std(1).mean())
    assert not is_unread(logits)


def test_memory(monkeypatch):
    monkeypatch.setitem(row_loop._BLOCK_BYTES, "cpu", 8192 * 4 * 8)  # as at larger sizes
    hidden, vocab, rows = 32, 8192, 1024
    model, (x, y) = Returning(hidden, vocab), batch((rows,), hidden, vocab)
    compiled = rewrite(model)

    def step():
        model.zero_grad()
        logits = compiled(x)
        p = logits.softmax(-1).gather(-1, y[..., None]).squeeze(-1)
        (-((1 - p) ** 2) * p.log()).mean().backward()

    with lmhead_pass.config.patch(batch_chunk_size=64):
        step()
        assert peak_bytes(step) <= 4 * rows * vocab / 4 + 4 * hidden * vocab
