"""Several results of the same logits, taken outside: their gradients take the logits once more."""

import pytest
import torch
import torch.nn.functional as F

from .. import reference
from ..backend import rewrite
from ..products import multiplications
from ..returned.model import is_unread
from .test_losses import H, Model, V, batch


def log_probabilities(z, y):
    return z.log_softmax(-1).gather(-1, y[..., None]).squeeze(-1)


def entropies(z):
    log_p = z.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def policy(z, y):
    """As GRPO: a ratio of probabilities, and a bonus for entropy."""
    ours = log_probabilities(z, y)
    advantage = torch.linspace(-1, 1, y.size(1), dtype=ours.dtype)
    return -((ours - ours.detach()).exp() * advantage).mean() - 0.1 * entropies(z).mean()


def with_z_loss(z, y):
    losses = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none")
    return (losses * torch.linspace(0, 1, y.numel())).sum() + 0.1 * z.logsumexp(-1).square().mean()


def three(z, y):
    largest = z.amax(-1)
    return policy(z, y) + (largest * torch.linspace(0, 1, y.size(1))).sum()


def one_multiplies_the_other(z, y):
    return (log_probabilities(z, y) * entropies(z)).sum()


def of_other_rows(z, y):
    of_some = F.cross_entropy(z[:, :-1].transpose(1, 2), y[:, 1:], reduction="none")
    return of_some.square().mean() + entropies(z).square().mean()


def beside_a_mean(z, y):
    return F.cross_entropy(z.flatten(0, 1), y.flatten()) + policy(z, y)


def beside_values(z, y):
    """The last one mixes rows, and reads the logits: their gradient has their size."""
    return policy(z, y) + z.flatten(0, 1).cumsum(0).square().mean()


LOSSES = [
    *(policy, with_z_loss, three, one_multiplies_the_other, of_other_rows, beside_a_mean),
    beside_values,
]


def gradients(function, model, loss, x, y, steps=1):
    for _ in range(steps):  # the second runs what the first has traced
        model.zero_grad()
        loss_of = loss(function(x), y)
        loss_of.backward()
    return [loss_of.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_values_and_gradients(loss, dtype):
    x, y = batch()
    model = Model().to(dtype)
    x = x.to(dtype)
    results = gradients(rewrite(model), model, loss, x, y, steps=2)
    unfused = gradients(model, model, loss, x, y)
    exact = Model().double()
    exact.load_state_dict(model.state_dict())
    expected = gradients(exact, exact, loss, x.double(), y)
    reference.assert_no_worse(results, unfused, expected, dtype)


def products_of_backward(function, model, loss, x, y):
    """In those of the head; the model's own layer is a tenth of its size."""
    gradients(function, model, loss, x, y, steps=3)
    result = loss(function(x), y)
    return multiplications(result.backward) // (y.numel() * H * V)


@pytest.mark.parametrize("loss", [policy, with_z_loss, three, one_multiplies_the_other])
def test_the_backward_takes_three_products(loss):
    model, (x, y) = Model(), batch((16, 16))
    assert products_of_backward(model, model, loss, x, y) == 2
    assert products_of_backward(rewrite(model), model, loss, x, y) == 3


def test_each_apart_if_the_graph_is_kept():
    model, (x, y) = Model(), batch()
    compiled = rewrite(model)
    results = []
    for function in (model, compiled):
        logits = function(x)
        loss = policy(logits, y)
        loss.backward(retain_graph=True)
        loss.backward()
        results.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    torch.testing.assert_close(*results)
    assert is_unread(logits)


def test_results_whose_gradients_come_in_two_backwards():
    model, (x, y) = Model(), batch()
    results = []
    for function in (model, rewrite(model)):
        logits = function(x)
        ours, bonus = log_probabilities(logits, y), entropies(logits)
        (ours.sum() + bonus.square().sum()).backward(retain_graph=True)
        (ours.square().sum() - bonus.sum()).backward()
        results.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "write", [lambda model, y: y.zero_(), lambda model, y: model.head.weight.mul_(2)]
)
def test_what_was_read_may_not_be_written_to(write):
    for compiles in (False, True):
        model, (x, y) = Model(), batch()
        loss = policy((rewrite(model) if compiles else model)(x), y)
        with torch.no_grad():
            write(model, y)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_only_the_head_is_trained():
    model, (x, y) = Model(), batch()
    model.body.requires_grad_(False)
    results = []
    for function in (model, rewrite(model)):
        policy(function(x), y).backward()
        results.append(model.head.weight.grad.clone())
        model.zero_grad()
    torch.testing.assert_close(*results)


def test_second_derivatives():
    model, (x, y) = Model(), batch((2, 3))
    results = []
    for function in (model, rewrite(model)):
        loss = one_multiplies_the_other(function(x), y)
        (first,) = torch.autograd.grad(loss, model.head.weight, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), model.body.weight)[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_two_models():
    """One result is of a student alone, one of it and its teacher."""
    student, teacher, (x, y) = Model(), Model(), batch()
    teacher.requires_grad_(False)
    results = []
    for of_student, of_teacher in ((student, teacher), (rewrite(student), rewrite(teacher))):
        z, target = of_student(x), of_teacher(x).softmax(-1)
        per_token = F.kl_div(z.log_softmax(-1), target, reduction="none").sum(-1)
        (per_token.square().sum() + log_probabilities(z, y).square().sum()).backward()
        results.append([p.grad.clone() for p in student.parameters()])
        student.zero_grad()
    torch.testing.assert_close(*results)
