"""Several losses of the same logits, outside: their gradients are computed together."""

import pytest
import torch
import torch.nn.functional as F

import lmhead_pass
from benchmarks.memory import peak_bytes

from ..backend import rewrite
from ..products import multiplications
from .test_losses import H, Model, V, batch, shifted

WEIGHT = torch.linspace(0.5, 1.5, V)


def plain(z, y):
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def z_loss(z, y):
    return 1e-2 * z.logsumexp(-1).square().mean()


def weighted(z, y):
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), weight=WEIGHT)


def warmer(z, y):
    return F.cross_entropy((z / 2).flatten(0, 1), y.flatten(), label_smoothing=0.1)


def likelihoods(z, y):
    return z.log_softmax(-1).gather(-1, y[..., None]).sin().mean()


def distilled(z, y):
    teacher = torch.linspace(-1, 1, z.numel()).reshape(z.shape)
    return F.kl_div(z.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")


SEVERAL = [
    *((plain, z_loss), (plain, weighted), (plain, warmer), (weighted, warmer, z_loss)),
    *((plain, plain), (likelihoods, plain), (plain, likelihoods), (plain, shifted)),
    *((plain, distilled), (distilled, plain), (plain, weighted, warmer, z_loss, likelihoods)),
]


def gradients(function, model, losses, x, y):
    model.zero_grad()
    z = function(x)
    found = [loss(z, y) * (n + 1) for n, loss in enumerate(losses)]
    sum(found).backward()
    return [*(loss.detach() for loss in found), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("losses", SEVERAL, ids=lambda losses: "-".join(f.__name__ for f in losses))
def test_values_and_gradients(losses):
    """In the first step, in the next ones, and where there is one of them alone."""
    model = Model(bias=True)
    compiled = rewrite(model)
    for which in (losses, losses, losses, losses[:1], losses[:1], losses[1:], losses):
        x, y = batch()
        ours = gradients(compiled, model, which, x, y)
        torch.testing.assert_close(ours, gradients(model, model, which, x, y))


@pytest.mark.parametrize("learned", [False, True])
def test_one_backward_after_the_other(learned):
    model = Model()
    compiled = rewrite(model)
    for _ in range(1 + learned):
        x, y = batch()
        found = []
        for function in (compiled, model):
            model.zero_grad()
            z = function(x)
            first, second = plain(z, y), weighted(z, y)
            second.backward(retain_graph=True)
            between = [p.grad.clone() for p in model.parameters()]
            first.backward()
            found.append([*between, *(p.grad.clone() for p in model.parameters())])
        torch.testing.assert_close(*found)


def test_targets_may_be_written_to_once_both_are_taken():
    """The gradients that the first has let go are those of its targets then."""
    model, (x, y) = Model(), batch()
    compiled = rewrite(model)
    for _ in range(3):
        found = []
        for function in (compiled, model):
            target = y.expand(2, *y.shape)[0] if function is model else y.clone()
            model.zero_grad()
            z = function(x)
            loss = plain(z, target) + z_loss(z, target)
            if function is compiled:
                target.zero_()
            loss.backward()
            found.append([p.grad.clone() for p in model.parameters()])
        torch.testing.assert_close(*found)


def products(compiled, model, losses, count):
    for _ in range(count):
        gradients(compiled, model, losses, *batch((8, 8)))
    found = multiplications(lambda: gradients(compiled, model, losses, *batch((8, 8))))
    return round(found / (64 * H * V))


def test_as_many_products_as_losses_and_three():
    model = Model()
    compiled = rewrite(model)
    assert products(compiled, model, (plain, weighted), 3) == 5
    # What takes no tensors comes with the first.
    assert products(compiled, model, (plain, z_loss), 3) == 4
    # One alone has its gradients with it, once nobody expects another.
    assert products(compiled, model, (plain,), 2) == 3


@pytest.mark.parametrize("losses", [(plain, z_loss), (warmer, plain, z_loss), (likelihoods, plain)])
def test_a_single_gradient_of_the_weight(losses):
    """Few rows and many features: such a gradient is far larger than the logits."""
    hidden, vocab, rows = 128, 4096, (4, 8)
    model, (x, y) = Model(hidden, vocab), batch(rows, hidden, vocab)
    compiled = rewrite(model)
    peaks = []
    with lmhead_pass.config.patch(batch_chunk_size=8):
        for function in (compiled, model):

            def step(function=function):
                model.zero_grad()
                z = function(x)
                sum(loss(z, y) for loss in losses).backward()

            step()
            peaks.append(peak_bytes(step))
    ours, eager = peaks
    assert ours <= eager + model.head.weight.nbytes / 4
