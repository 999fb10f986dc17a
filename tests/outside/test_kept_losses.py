"""Who keeps a loss after its backward keeps a number, not what it was computed from."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

from ..backend import rewrite
from .test_joint_gradients import policy
from .test_losses import Model, batch, log_probabilities, pieces, shifted, softcapped


def reading(z, y):
    return (z[:, 1:] * 2).flatten(0, 1).cumsum(0).square().mean()


@pytest.mark.parametrize(
    "loss",
    [shifted, log_probabilities, pieces, softcapped, policy, reading],
    ids=lambda f: f.__name__,
)
def test_hidden_states_and_values_go(loss):
    model, (x, y) = Model(), batch()
    compiled = rewrite(model)
    held = []

    def step():
        logits = compiled(x)
        result = loss(logits, y)
        cell = logits._cell
        tensors = [cell.value] if cell.value is not None else [cell.source.hidden]
        held[:] = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
        return result

    kept = step()
    gc.collect()
    assert not any(one.expired() for one in held)
    kept.backward()
    gc.collect()
    assert all(one.expired() for one in held)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        kept.backward()


def cached(logits, y):
    """Gradient caching: a loss of a leaf, whose gradient is then that of the logits."""
    leaf = logits.detach().requires_grad_()
    shifted(leaf, y).backward()
    logits.backward(leaf.grad)


def retained(logits, y):
    logits.retain_grad()
    shifted(logits, y).backward()


@pytest.mark.parametrize("step", [cached, retained])
def test_a_gradient_that_nobody_reads_keeps_nothing(step):
    model, (x, y) = Model(), batch()
    logits = rewrite(model)(x)
    hidden = StorageWeakRef(logits._cell.source.hidden.untyped_storage())
    step(logits, y)
    del logits
    gc.collect()
    assert hidden.expired()


def test_a_gradient_by_logits_after_the_backward_of_another_loss():
    model, (x, y) = Model(), batch()
    results = []
    for function in (model, rewrite(model)):
        logits = function(x)
        first, second = shifted(logits, y), (logits[:, 1:] / 2).softmax(-1).square().sum(-1).mean()
        first.backward()
        results.append(torch.autograd.grad(second, logits)[0])
    torch.testing.assert_close(*results)


def test_what_saves_nothing_may_be_differentiated_again():
    """Of a leaf made of the logits: no part of eager's graph is freed either."""
    model, (x, y) = Model(), batch()
    results = []
    for function in (model, rewrite(model)):
        leaf = function(x).detach().requires_grad_()
        scaled = 1 + -leaf[:, 1:]
        for _ in range(2):
            F.cross_entropy(scaled.flatten(0, 1), y[:, 1:].flatten()).backward()
        results.append(leaf.grad + 0)
    torch.testing.assert_close(*results)
