"""What unread logits hold, and for how long."""

import weakref

import pytest
import torch
from torch import nn

import lmhead_pass
from benchmarks.memory import peak_bytes

from ..backend import rewrite
from .model import Model, batch, is_unread

pytestmark = pytest.mark.codegen


class LossOnly(Model):
    def forward(self, x, y):
        return super().forward(x, y)[0]


def peak_of_training_step(model, inputs):
    compiled = torch.compile(model)
    held = []

    def step():
        output = compiled(*inputs)
        (output if isinstance(output, torch.Tensor) else output[0]).backward()
        held.append(output)

    step()
    held.clear()
    model.zero_grad()
    return peak_bytes(step)


def test_a_training_step_peaks_where_the_loss_alone_does():
    sizes = {"hidden": 32, "vocab": 8192}
    inputs = batch((1024,), **sizes)
    logits = 1024 * 8192 * 4
    with lmhead_pass.config.patch(batch_chunk_size=64):
        alone = peak_of_training_step(LossOnly(**sizes), inputs)
        assert alone < logits / 4
        for returns in (lambda logits: logits, lambda logits: logits.float()[1:]):
            assert peak_of_training_step(Model(returns, **sizes), inputs) <= 1.1 * alone
        with lmhead_pass.disabled():
            assert peak_of_training_step(Model(**sizes), inputs) >= 2 * logits


@pytest.mark.parametrize("backend", [rewrite, torch.compile])
def test_what_is_kept(model, backend):
    _, logits = backend(model)(*batch())
    recipe = logits._cell.source
    assert recipe.weight is model.head.weight and recipe.bias is model.head.bias
    assert recipe.hidden.shape == (2, 5, 16)
    assert recipe.fingerprint.shape == (2,)  # of weight and bias
    logits.tolist()
    assert logits._cell.source is None


@pytest.mark.parametrize("let_go", ["backward", "detach"])
def test_what_a_graph_before_has_saved_is_let_go(model, let_go):
    """By what lets go of it without lmhead_pass, too."""
    before = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
    x, y = batch()
    saved = []

    def pack(tensor):
        saved.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x = before(x)
    loss, logits = torch.compile(model)(x, y)
    if let_go == "backward":
        loss.backward()
    else:
        logits = logits.detach()
    known = [id(tensor) for tensor in before.parameters()]
    del loss, x
    kept = [tensor for reference in saved if (tensor := reference()) is not None]
    assert is_unread(logits) and all(id(tensor) in known for tensor in kept)
