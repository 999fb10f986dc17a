"""Logits that are written to after something was made of them, as eager PyTorch allows it."""

import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ..backend import rewrite
from .test_losses import Model, V, batch


def of_two_batches(z):
    """Puts rows of one sequence beside all: no loss of the op's, so values are read."""
    return (z.softmax(-1)[:1] + z).std(-1).sum()


def product(z):
    return (z.sigmoid()[:1] + z.flatten(0, 1).view_as(z).tanh() * 3).std(-1).sum()


def of_a_view(z):
    view = z.view(-1, z.size(-1))
    return (view.exp()[:3].sum() + view.sigmoid()).std(-1).sum()


def divide(z):
    z.div_(0.7)


def without_gradient(z):
    with torch.no_grad():
        z.mul_(2)


def one_row(z):
    z[0] = 0


def a_view(z):
    z.view(-1)[3:].neg_()


def twice(z):
    z.mul_(2)
    z.add_(1)


@pytest.mark.parametrize("write", [divide, without_gradient, one_row, a_view, twice])
@pytest.mark.parametrize("loss", [of_two_batches, product, of_a_view])
def test_gradients_are_those_of_the_values_before(loss, write):
    model, (x, _) = Model(), batch()
    gradients = []
    for function in (model, rewrite(model)):
        z = function(x)
        result = loss(z)
        write(z)
        gradients.append(torch.autograd.grad(result, list(model.parameters())))
    for eager, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, eager)


def test_a_write_by_a_name_that_is_not_known():
    """Through memory that a plain tensor shares: no wrong gradient, but an error."""
    model, (x, _) = Model(), batch()
    z = rewrite(model)(x)
    result = of_two_batches(z)
    with torch.no_grad():
        plain = z.as_strided((3,), (1,))
        assert type(plain) is torch.Tensor
        plain.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation: logits that"):
        torch.autograd.grad(result, list(model.parameters()))


PARTS = {
    "few words": lambda z: z[..., 1:3],
    "one word": lambda z: z[..., 1],
    "words by name": lambda z: z.narrow(-1, 1, 2),
    "one word by name": lambda z: z.select(-1, 3),
    "rows": lambda z: z[:, 1:3],
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_write_to_a_part_is_one_to_the_logits(part, autocast):
    model, (x, _) = Model(), batch()
    found = []
    for function in (model, rewrite(model)):
        z = function(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            part(z).mul_(0.5)
        loss = (z * torch.arange(z.size(-1))).sum() + z.logsumexp(-1).sum()
        found.append([z.detach() + 0, *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(*found)


def cross_entropy(z, y):
    return F.cross_entropy(z.reshape(-1, z.size(-1)), y.reshape(-1))


def assert_as_eager(program):
    """The same loss and gradients; ``program`` takes logits and targets."""
    model, (inputs, y) = Model(), batch()
    found = []
    for function in (model, rewrite(model)):
        torch.manual_seed(3)
        loss = program(function(inputs), y)
        found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(*found)


IN_PLACE = {
    "relu": nn.ReLU(inplace=True),
    "dropout": nn.Dropout(0.5, inplace=True),
    "silu": lambda z: F.silu(z, inplace=True),
    "hardtanh": lambda z: F.hardtanh(z, -0.5, 0.5, True),
    "foreach": lambda z: torch._foreach_mul_([z, torch.ones(2)], 2.0),
    "overload": lambda z: torch.ops.aten.mul_.Tensor(z, 2.0),
    "packet": lambda z: torch.ops.aten.mul_(z, 2.0),
    "keyword": lambda z: torch.clamp_(input=z, min=0.1),
    "initialization": lambda z: nn.init.uniform_(z.data),
}


@pytest.mark.parametrize("write", IN_PLACE.values(), ids=IN_PLACE)
def test_functions_that_write(write):
    def program(z, y):
        write(z)
        return z.square().mean() + cross_entropy(z[:, :-1], y[:, 1:])

    assert_as_eager(program)


@pytest.mark.parametrize("name", ["relu", "dropout", "silu", "hardtanh"])
def test_what_a_function_that_writes_returns(name):
    assert_as_eager(lambda z, y: cross_entropy(IN_PLACE[name](z) * 2, y))


OTHER_VIEWS = {
    "ravel": lambda z: z.ravel(),
    "diagonal": lambda z: z.diagonal(dim1=1, dim2=2),
    "hsplit": lambda z: z.hsplit([3])[0],
    "unfold": lambda z: z.unfold(-1, 8, 8),
    "broadcast_to": lambda z: z.broadcast_to(z.shape),
    "adjoint": lambda z: z.adjoint(),
    "as_strided": lambda z: z.as_strided((V,), (1,)),
    "overload": lambda z: torch.ops.aten.select.int(z, 0, 1),
}


@pytest.mark.parametrize("view", OTHER_VIEWS.values(), ids=OTHER_VIEWS)
@pytest.mark.parametrize("reads", [lambda z: z, lambda z: z[:, :-1]], ids=["whole", "part"])
def test_a_write_to_another_view(view, reads):
    """Views that are not written down are plain tensors, in the same memory."""

    def program(z, y):
        view(z).mul_(3)
        part = reads(z)
        return cross_entropy(part, y[:, : part.size(1)])

    assert_as_eager(program)


@pytest.mark.parametrize("view", OTHER_VIEWS.values(), ids=OTHER_VIEWS)
def test_a_write_while_another_view_is_held(view):
    def program(z, y):
        held = view(z)
        z.mul_(3)
        return held.square().mean() + cross_entropy(z, y)

    assert_as_eager(program)


def test_a_hook_behind_a_write_to_another_view():
    seen = []

    def program(z, y):
        z.ravel().mul_(3)
        z.register_hook(lambda gradient: seen.append(gradient.clone()))
        return cross_entropy(z, y)

    assert_as_eager(program)
    torch.testing.assert_close(*seen)


@pytest.mark.parametrize("records", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda z: z.unsqueeze_(0),
        lambda z: z.transpose_(1, 2),
        lambda z: z.swapaxes_(0, 1),
        lambda z: z[:1].squeeze_(0),
        lambda z: z[0].t_(),
        lambda z: setattr(z, "data", torch.ones_like(z)),
    ],
)
def test_forms_and_data(change, records):
    model, (x, _) = Model(), batch()
    found = []
    for function in (model, rewrite(model)):
        with torch.set_grad_enabled(records):
            z = function(x)
            result = change(z)
            z = z if result is None else result
            found.append([torch.tensor(z.shape), z.detach() + 0])
            if records:
                found[-1] += torch.autograd.grad(z.exp().sum(), list(model.parameters()))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    "change",
    [
        *(lambda z: z.resize_(5), lambda z: z.as_strided_((2,), (1,))),
        lambda z: setattr(z, "data", torch.ones(3)),
    ],
)
def test_another_form_in_place(change):
    model, (x, _) = Model(), batch()
    with torch.no_grad(), pytest.raises(RuntimeError, match="cannot be given another size"):
        change(rewrite(model)(x))


OF_NUMPY = {
    "temperature": lambda z, y: cross_entropy(z / np.float64(0.7), y),
    "factor": lambda z, y: cross_entropy(z * np.float32(0.5), y),
    "slice": lambda z, y: cross_entropy(z[:, : np.int64(3)], y[:, :3]),
    "chunks": lambda z, y: cross_entropy(z.chunk(np.int64(2), 1)[0], y[:, :4]),
}


@pytest.mark.parametrize("program", OF_NUMPY.values(), ids=OF_NUMPY)
def test_numbers_of_numpy(program):
    assert_as_eager(program)


def test_the_first_argument_by_its_name():
    assert_as_eager(lambda z, y: cross_entropy(torch.mul(input=z, other=2.0), y))
    assert_as_eager(lambda z, y: F.cross_entropy(input=z.transpose(1, 2), target=y))
    assert_as_eager(lambda z, y: torch.where(condition=z > 0, input=z, other=0.1).sum())


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_added_to_all_words_shows_if_it_is_not_finite(number):
    model, (x, y) = Model(), batch()
    assert cross_entropy(rewrite(model)(x) + number, y).isnan()


def test_a_weak_reference_before_anything_else():
    held = []

    def program(z, y):
        held.append(weakref.ref(z))
        return cross_entropy(z, y)

    assert_as_eager(program)


def test_a_step_that_changes_others():
    """One optimizer for two models, whose turns follow each other."""
    actor, critic, (x, y) = Model(hidden=64), Model(hidden=64), batch((1, 4), hidden=64)
    gradients = []
    for function in (actor, rewrite(actor)):
        optimizer = torch.optim.AdamW([*actor.parameters(), *critic.parameters()])
        policy = function(x)
        cross_entropy(critic(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        cross_entropy(policy, y).backward()
        gradients.append([p.grad.clone() for p in actor.parameters()])
        optimizer.zero_grad()
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("becomes_a_leaf", [True, False])
def test_detached_in_place_after_a_reading(becomes_a_leaf):
    model, (x, _) = Model(), batch()
    found = []
    for function in (model, rewrite(model)):
        z = function(x)
        first = z.sort(-1).values.square().sum()
        z.detach_()
        assert not z.requires_grad
        if becomes_a_leaf:
            z.requires_grad_()
        loss = first + z.sort(-1).values.exp().sum()
        loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
        found[-1].append(z.grad + 0 if becomes_a_leaf else torch.tensor(z.grad is None))
        model.zero_grad()
    torch.testing.assert_close(*found)


def _after_a_write(use):
    def program(z, y):
        part = z[:, :-1]
        part.mul_(1.5)
        return use(z, F.cross_entropy(part.flatten(0, 1), y[:, 1:].flatten()))

    return program


def _kept(z, loss):
    z.retain_grad()
    loss.backward()
    return z.grad


def _hooked(z, loss):
    z.register_hook(lambda gradient: gradient * 3)
    return torch.autograd.grad(loss, z)[0]


GRADIENTS_AT_LOGITS = {
    "grad": lambda z, loss: torch.autograd.grad(loss, z)[0],
    "retain_grad": _kept,
    "hook": _hooked,
}


@pytest.mark.parametrize("use", GRADIENTS_AT_LOGITS)
def test_the_gradient_of_logits_whose_view_was_written_to(use):
    model, (x, y) = Model(), batch()
    program = _after_a_write(GRADIENTS_AT_LOGITS[use])
    ours, theirs = program(rewrite(model)(x), y), program(model(x), y)
    torch.testing.assert_close(ours * 1, theirs)


def half_of_the_gradient(z):
    z.register_hook(lambda gradient: gradient * 0.5)


@pytest.mark.parametrize("part", [lambda z: z, lambda z: z[:, -1]], ids=["all", "a view"])
@pytest.mark.parametrize("is_recorded", [True, False])
def test_a_look_at_the_gradient_of_a_loss_that_was_taken_before_a_write(part, is_recorded):
    model, (x, y) = Model(), batch()
    found = []
    for function in (rewrite(model), model):
        model.zero_grad()
        z = function(x)
        loss = F.cross_entropy(z.flatten(0, 1), y.flatten())
        half_of_the_gradient(z)
        with torch.set_grad_enabled(is_recorded):
            part(z).mul_(3)
        loss.backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("take", [lambda z: z.log_softmax(-1), lambda z: z.tanh()])
def test_gradients_of_gradients_of_what_was_taken_before_a_write(take):
    model, (x, _) = Model(), batch()
    found = []
    for function in (rewrite(model), model):
        z = function(x)
        total = take(z).logsumexp(-1).sum()
        with torch.no_grad():
            z.mul_(3)
        found.append(torch.autograd.grad(total, model.head.weight, create_graph=True))
    torch.testing.assert_close(*found)


def test_a_write_after_the_backward_copies_nothing():
    model, (x, y) = Model(), batch()
    z = rewrite(model)(x)
    F.cross_entropy(z.flatten(0, 1), y.flatten()).backward()
    with torch.no_grad():
        z.mul_(2)
    assert z._cell._original is None


@pytest.mark.parametrize("write", [lambda z, v: v.tanh_(), lambda z, v: z.tanh_()])
def test_a_hook_on_a_view_that_is_written_to_is_not_called(write):
    model, (x, y) = Model(), batch()
    found = []
    for function in (rewrite(model), model):
        model.zero_grad()
        z = function(x)
        view = z[:, :-1]
        view.register_hook(lambda gradient: gradient * 2)
        write(z, view)
        F.cross_entropy(view.flatten(0, 1), y[:, 1:].flatten()).backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found)
