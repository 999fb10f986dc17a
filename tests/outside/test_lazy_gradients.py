"""Gradients of unread logits in the hands of the user: looked at, written to, given elsewhere."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmhead_pass.returned.lazy_gradient import LazyGradient

from ..backend import rewrite
from .test_losses import Model, batch


def loss_of(z, y):
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def leaf_of(z, y):
    leaf = z.detach().requires_grad_()
    loss_of(leaf, y).backward()
    return leaf


def split_in_two(z, y):
    """As GradCache, and pipelines by hand."""
    z.backward(leaf_of(z, y).grad)


def split_by_the_engine(z, y):
    torch.autograd.backward(z, leaf_of(z, y).grad)


def given_to_another(z, y):
    (gradient,) = torch.autograd.grad(loss_of(z, y), z, retain_graph=True)
    (z * 2).backward(gradient)


def given_twice(z, y):
    (gradient,) = torch.autograd.grad(loss_of(z, y), z)
    z.backward(gradient, retain_graph=True)
    z.backward(gradient)


def zeroed(z, y):
    leaf = leaf_of(z, y)
    leaf.grad.zero_()
    return leaf.grad.abs().sum()


def zeroed_by_an_optimizer(z, y):
    leaf = leaf_of(z, y)
    torch.optim.SGD([leaf]).zero_grad(set_to_none=False)
    loss_of(leaf, y).backward()
    return leaf.grad.norm()


def clipped_by_value(z, y):
    leaf = leaf_of(z, y)
    nn.utils.clip_grad_value_([leaf], 1e-4)
    return leaf.grad.abs().max()


def clipped_by_norm(z, y):
    leaf = leaf_of(z, y)
    nn.utils.clip_grad_norm_([leaf], 1e-4)
    return leaf.grad.norm()


def added_up(z, y):
    leaf = leaf_of(z, y)
    leaf.grad.norm()
    loss_of(leaf, y).backward()
    loss_of(leaf, y).backward()
    return leaf.grad.norm()


def hooked(write):
    def use(z, y):
        z.register_hook(write)
        loss_of(z, y).backward()

    return use


def multiply(gradient):
    gradient.mul_(3)


def set_rows(gradient):
    gradient[0] = 0


def write_data(gradient):
    gradient.data.mul_(2)


def write_out(gradient):
    torch.mul(gradient, 2, out=gradient)


def look(gradient):
    gradient.norm()


def one_of_two(which, hook):
    def use(z, y):
        two = (z * 0.5).log_softmax(-1), (z * 0.3).softmax(-1)
        two[which].register_hook(hook)
        F.kl_div(*two, reduction="batchmean").backward()

    return use


USES = {
    **{
        use.__name__: use
        for use in (
            *(split_in_two, split_by_the_engine, given_to_another, given_twice, zeroed),
            *(zeroed_by_an_optimizer, clipped_by_value, clipped_by_norm, added_up),
        )
    },
    **{f"hook: {h.__name__}": hooked(h) for h in (multiply, set_rows, write_data, write_out, look)},
    "one of two as it is": one_of_two(0, lambda gradient: gradient * 1.0),
    "the other of two": one_of_two(1, lambda gradient: gradient * 2.0),
    "one of two is looked at": one_of_two(0, look),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_use(use):
    model, (x, y) = Model(bias=True), batch()
    found = []
    for function in (rewrite(model), model):
        result = use(function(x), y)
        found.append([result, *(p.grad for p in model.parameters())])
        model.zero_grad()
    torch.testing.assert_close(*([p if p is None else p + 0 for p in part] for part in found))


def test_a_hook_that_does_not_look_costs_nothing():
    model, (x, y) = Model(), batch()
    z, seen = rewrite(model)(x), []
    z.register_hook(seen.append)
    loss_of(z * 2, y).backward()
    (gradient,) = seen
    assert isinstance(gradient, LazyGradient) and gradient._seen is None
