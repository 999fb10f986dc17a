"""A head that is written to between a loss outside and its backward, or before the loss."""

import pytest
import torch
import torch.nn.functional as F

from lmhead_pass.returned import recipe

from ..backend import rewrite
from ..returned.model import is_unread
from .test_losses import Model, V, batch, log_probabilities, pieces, shifted


def plain_gradient(logits, y):
    """Of their values, since it mixes rows: the logits get a gradient of their own size."""
    return logits.flatten(0, 1).cumsum(0).std(-1).sum()


def gradients(function, model, loss, x, y, write):
    result = loss(function(x), y)
    with torch.no_grad():
        write(model.head)
    result.backward()
    found = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("loss", [shifted, plain_gradient], ids=lambda f: f.__name__)
def test_a_bias_may_be_written_to(loss):
    model, (x, y) = Model(bias=True), batch()
    expected = gradients(model, model, loss, x, y, lambda head: None)
    found = gradients(rewrite(model), model, loss, x, y, lambda head: head.bias.mul_(2))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss", [shifted, plain_gradient], ids=lambda f: f.__name__)
def test_a_weight_may_be_written_to_behind_frozen_hidden_states(loss):
    """No gradient needs it then, without the pass either."""
    model, (x, y) = Model(), batch()
    model.body.requires_grad_(False)
    results = [
        gradients(function, model, loss, x, y, lambda head: head.weight.add_(0.0))
        for function in (model, rewrite(model))
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "loss", [log_probabilities, pieces, plain_gradient], ids=lambda f: f.__name__
)
def test_a_weight_that_a_gradient_needs_may_not(loss):
    model, (x, y) = Model(), batch()
    for function in (model, rewrite(model)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(function, model, loss, x, y, lambda head: head.weight.mul_(2))


def test_targets_of_a_piece_may_be_written_to():
    """The backward computes its logits again, and eager PyTorch keeps a copy of these targets."""
    model, (x, y) = Model(), batch()
    results = []
    for function in (model, rewrite(model)):
        target = y.clone()
        loss = F.cross_entropy(function(x)[:, :2].transpose(1, 2), target[:, :2])
        target.zero_()
        results.append(torch.autograd.grad(loss, list(model.parameters())))
    for pair in zip(*results, strict=True):
        torch.testing.assert_close(*pair)


@pytest.mark.parametrize("loss", [log_probabilities, pieces], ids=lambda f: f.__name__)
def test_nor_in_a_way_that_nobody_counts(loss):
    """Autograd would not see it, and take the logits of another head than the loss was of."""
    model, (x, y) = Model(), batch()
    with pytest.raises(RuntimeError, match="weight was changed"):
        gradients(rewrite(model), model, loss, x, y, lambda head: head.weight.data.mul_(2))


def test_a_loss_that_has_its_gradients_minds_no_such_write():
    model, (x, y) = Model(), batch()
    expected = gradients(model, model, shifted, x, y, lambda head: None)
    found = gradients(rewrite(model), model, shifted, x, y, lambda head: head.weight.data.mul_(2))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss", [shifted, log_probabilities], ids=lambda f: f.__name__)
@pytest.mark.parametrize("checks_on_device", [False, True])
def test_a_write_that_nobody_counts_raises_at_the_loss(loss, checks_on_device, monkeypatch):
    """On a GPU the device raises it, and nothing waits for that."""
    model, (x, y) = Model(), batch()
    compiled = rewrite(model)
    loss(compiled(x), y)
    if checks_on_device:
        # A CPU can do it as well, at once.
        monkeypatch.setattr(recipe, "can_check_on_device", lambda device: True)
        monkeypatch.setattr(torch, "equal", None)  # it would wait
        loss(compiled(x), y)
    logits = compiled(x)
    model.head.weight.data.mul_(2)
    with pytest.raises(RuntimeError, match=r"the head's .*weight.* changed after the model ran"):
        loss(logits, y)


@pytest.mark.parametrize("loss", [shifted, log_probabilities], ids=lambda f: f.__name__)
@pytest.mark.parametrize("touch", [lambda z: None, lambda z: z.view(-1)], ids=["new", "used"])
def test_a_loss_after_the_step(loss, touch):
    """It has the values and gradients of the forward, where eager PyTorch raises an error."""
    model = Model()
    x, y = torch.randn(16, 20, 16), torch.randint(V, (16, 20))
    expected = gradients(model, model, loss, x, y, lambda head: None)
    optimizer = torch.optim.SGD([model.head.weight], 0.1)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    logits = rewrite(model)(x)
    touch(logits)
    optimizer.step()
    optimizer.zero_grad()
    result = loss(logits, y)
    assert is_unread(logits)
    result.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)


def test_gradients_of_gradients_do_not_need_the_bias():
    model, (x, y) = Model(bias=True), batch()
    results = []
    for function in (model, rewrite(model)):
        x = x.detach().requires_grad_()
        loss = F.cross_entropy(function(x).flatten(0, 1), y.flatten())
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), list(model.parameters())))
    torch.testing.assert_close(*results)
