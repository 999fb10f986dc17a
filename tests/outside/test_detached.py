"""A loss outside in which some of the logits have no gradient: it ends there, and nowhere else."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from .. import reference
from ..backend import rewrite
from ..returned.model import is_unread
from .test_losses import Model, batch


def times_itself(z, y):
    return (z * z.detach()).mean()


def times_its_data(z, y):
    return (z.data * z).mean() + z.float().square().mean()


def under_no_grad(z, y):
    with torch.no_grad():
        p = z.softmax(-1)
    return -(p * z.log_softmax(-1)).sum(-1).mean()


def made_of_detached(z, y):
    return (z.detach().softmax(-1).square() * z.sigmoid()).sum(-1).mean()


def straight_through(z, y):
    """The values of one function, and the gradient of another."""
    soft = z.tanh()
    return (soft + (z.clamp(-1, 1) - soft).detach()).square().mean()


def beside_a_plain_loss(z, y):
    return F.cross_entropy(z.flatten(0, 1), y.flatten()) + (z - z.detach()).abs().sum()


def all_detached(z, y):
    return z.std(-1).mean() + (z.detach() * 2).square().mean()


def views_of_detached(z, y):
    return (z[:, 1:] * z.detach()[:, :-1]).sum(-1).mean()


LOSSES = [
    *(times_itself, times_its_data, under_no_grad, made_of_detached, straight_through),
    *(beside_a_plain_loss, all_detached, views_of_detached),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_gradients(loss):
    model, (x, y) = Model(bias=True), batch()
    x.requires_grad_()

    def results(function, *inputs):
        z = function(inputs[0])
        result = loss(z, inputs[1])
        wanted = [inputs[0], *model.parameters()]
        return z, [result.detach(), *torch.autograd.grad(result, wanted)]

    _, eager = results(model, x, y)
    z, ours = results(rewrite(model), x, y)
    if loss is not views_of_detached:
        assert is_unread(z) and counters["lmhead_pass"]["rewritten"] >= 1
    exact = results(model.double(), *reference.doubles([x, y]))[1]
    reference.assert_no_worse(ours, eager, exact, torch.float32)


def test_the_same_calls_with_and_without_a_gradient():
    """What computes the one is not taken for the other."""
    model, (x, _) = Model(), batch()
    compiled = rewrite(model)
    for _ in range(2):
        for detach in (lambda t: t, torch.Tensor.detach):
            for is_recorded in (True, False):
                gradients = []
                for function in (model, compiled):
                    z = function(x)
                    with torch.set_grad_enabled(is_recorded):
                        factor = detach(z.sigmoid())
                    loss = (factor * z).sum(-1).mean()
                    gradients.append(torch.autograd.grad(loss, list(model.parameters())))
                for ours, eager in zip(*gradients, strict=True):
                    torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_leaf_made_of_them_beside_them(is_first):
    """It gets its gradient, and they get theirs."""
    model, (x, _) = Model(), batch()
    gradients = []
    for function in (model, rewrite(model)):
        z = function(x)
        leaf = z.detach().requires_grad_()
        product = leaf * z if is_first else z * leaf
        loss = (product * leaf.sin()).sum(-1).square().mean()
        gradients.append(torch.autograd.grad(loss, [leaf, *model.parameters()]))
    for eager, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, eager)
