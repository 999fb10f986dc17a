"""Gradients through returned logits, and of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..backend import rewrite
from .model import SETTING, VOCAB, Model, batch


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (2 * x).sum()

    @staticmethod
    def backward(ctx, gradient):
        return torch.ones(2, 5, VOCAB)


USES = {
    "second loss": lambda x: F.cross_entropy(x.view(-1, VOCAB), torch.arange(10)),
    "sum": lambda x: x.sum(),
    "view": lambda x: x[:, -1].float().sum(),
    "cast": lambda x: x.double().sum(),
    "custom function": lambda x: Doubled.apply(x.clone()),
    "with other gradients": lambda x: (x * torch.ones(VOCAB, requires_grad=True)).sum(),
    "written": lambda x: x.mul_(2).sum(),
}


def assert_gradients(model, compiled, use, inputs, more=()):
    """Of the loss and ``use(logits)``, as of the model uncompiled."""
    leaves = [leaf for leaf in (*model.parameters(), *more) if leaf.requires_grad]
    results = []
    for function in (compiled, model):
        loss, logits = function(*inputs)
        total = loss + use(logits)
        results.append((total.detach(), *torch.autograd.grad(total, leaves)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("backend", [rewrite, torch.compile])
def test_a_gradient_through_returned_logits(model, use, backend):
    assert_gradients(model, backend(model), use, batch())


class Frozen(Model):
    """Its head is frozen."""

    def __init__(self):
        super().__init__()
        self.head.requires_grad_(False)


class Cut(Model):
    """Its head is in a graph of its own."""

    def forward(self, x, y):
        x = self.body(x)
        torch._dynamo.graph_break()
        return Model.forward(self, x, y)


class Written(Model):
    """Its hidden states have no other edge from what they are made of than a write."""

    def forward(self, x, y):
        h = torch.zeros(x.shape)
        h[:, 1:] = x[:, 1:] * 2
        return super().forward(h, y)


class Tied(Model):
    """Its embedding has the head's weight, and may not be taken for a writer; nor its norm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x, y):
        x = x + F.embedding(y, self.head.weight)
        return super().forward(self.norm(x.transpose(1, 2)).transpose(1, 2), y)


class Checkpointed(Model):
    """What its gradients go through is recomputed in the backward."""

    def forward(self, x, y):
        x = checkpoint(lambda x: self.body(x).sin(), x, use_reentrant=False)
        return super().forward(x, y)


class ViewOfInput(Model):
    """Its hidden states are a view of an input, and those it returns are its own."""

    def forward(self, x, y):
        logits = self.head(x.view(-1, 16)[1:])
        return F.cross_entropy(logits, y.view(-1)[1:]) + x.sum() * 0, logits


class InPlace(Model):
    """An input's own values are changed on the way."""

    def forward(self, x, y):
        x.mul_(2)
        return super().forward(x, y)


MODELS = [Model, Frozen, Cut, Written, Tied, Checkpointed, ViewOfInput, InPlace]


@pytest.mark.parametrize("cls", MODELS)
@pytest.mark.parametrize("backend", [rewrite, torch.compile])
def test_a_gradient_whatever_it_is_asked_of(cls, backend):
    model, (_, y) = cls(), batch()
    compiled = backend(model)
    for use in (lambda logits: logits.logsumexp(-1).mean(), lambda logits: logits.square().mean()):
        embedded = torch.randn(2, 5, 16, requires_grad=True)
        results = []
        for function in (compiled, model):
            hidden = embedded * 1.5 + 1
            loss, logits = function(hidden, y)
            leaves = [leaf for leaf in (*model.parameters(), embedded) if leaf.requires_grad]
            results.append(torch.autograd.grad(loss + use(logits), leaves, allow_unused=True))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_hooks_and_gradients_of_the_logits(model):
    inputs, seen = batch(), []
    uses = (
        lambda logits: F.cross_entropy(logits.view(-1, VOCAB), inputs[1].view(-1)),
        lambda logits: logits.log_softmax(-1)[:, 1:].gather(-1, inputs[1][:, 1:, None]).mean(),
        lambda logits: logits.logsumexp(-1).square().sum() + logits.square().sum(),
    )
    for use in uses:
        results = []
        for function in (rewrite(model), model):
            logits = function(*inputs)[1]
            logits.register_hook(lambda gradient: seen.append(gradient + 0))
            (gradient,) = torch.autograd.grad(use(logits), logits, retain_graph=True)
            leaf = logits.detach().requires_grad_()
            use(leaf).backward()
            use(leaf).backward()
            logits.retain_grad()
            use(logits).backward()
            results.append((gradient + 0, leaf.grad + 0, logits.grad + 0, *seen))
            seen.clear()
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)


def test_a_custom_function_of_what_was_returned_refuses_a_gradient(model):
    _, logits = torch.compile(model)(*batch())
    with pytest.raises(RuntimeError, match=rf"logits\.clone\(\).*{SETTING}"):
        Doubled.apply(logits).backward()


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_two_backwards(model, use):
    inputs, results = batch(), []
    for function in (rewrite(model), model):
        loss, logits = function(*inputs)
        use(logits).backward(retain_graph=True)
        loss.backward()
        results.append([parameter.grad for parameter in model.parameters()])
        model.zero_grad()
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_second_derivatives(model):
    inputs, results = batch(), []
    for function in (rewrite(model), model):
        logits = function(*inputs)[1]
        loss = F.cross_entropy(logits.view(-1, VOCAB), inputs[1].view(-1))
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), model.head.weight)[0])
    torch.testing.assert_close(*results)


def test_no_gradient_twice_without_retain_graph(model):
    inputs = batch()
    logits = rewrite(model)(*inputs)[1]
    loss = F.cross_entropy(logits.view(-1, VOCAB), inputs[1].view(-1))
    loss.backward(retain_graph=True)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("is_late", [False, True])
def test_a_head_that_has_changed_has_no_gradient_for_old_logits(model, is_late):
    """As in eager, which says the same and no setting, where the backward needs it."""
    inputs = batch()

    def change():
        with torch.no_grad():
            model.head.weight.add_(1)

    for function, told in ((rewrite(model), rf"inplace operation.*{SETTING}"), (model, "inplace")):
        model.zero_grad()
        logits = function(*inputs)[1]
        if is_late and function is not model:
            optimizer = torch.optim.SGD([model.head.weight], lr=1.0)
            model.head.weight.grad = torch.ones_like(model.head.weight)
            optimizer.step()
        # Neither is computed with its gradients: one as a piece, the other of values.
        loss = F.cross_entropy(logits[0], inputs[1][0]) if not is_late else logits.cumsum(0).std()
        if not is_late or function is model:
            change()
        with pytest.raises(RuntimeError, match=told):
            loss.backward()


def test_a_gradient_that_does_not_flow_through_logits_is_not_refused():
    other = nn.Linear(16, 16)

    def function(x, y):
        loss, logits = model(x, y)
        return loss + other(x).square().mean(), logits

    model, inputs = Model(), batch()
    loss, logits = rewrite(function)(*inputs)
    second = logits.logsumexp(-1).mean()
    (gradient,) = torch.autograd.grad(loss + second, other.weight)
    (expected,) = torch.autograd.grad(function(*inputs)[0], other.weight)
    torch.testing.assert_close(gradient, expected)


def test_no_gradient_is_refused_where_none_is_meant(returned, model):
    other = nn.Linear(VOCAB, 1)
    logits, _ = returned()
    other(logits.detach()).sum().backward()
    with torch.no_grad():
        read = logits.softmax(-1)
    other(read).sum().backward()
    with torch.no_grad():
        other(returned()[0])


class Passed(torch.autograd.Function):
    """What wraps all outputs of a model, as hooks of modules do: zeros come back for the unused."""

    @staticmethod
    def forward(ctx, *tensors):
        return tensors

    @staticmethod
    def backward(ctx, *gradients):
        return gradients


class Cloned(torch.autograd.Function):
    """As DistributedDataParallel does with unused parameters: nothing comes back for the unused."""

    @staticmethod
    def forward(ctx, *tensors):
        ctx.set_materialize_grads(False)
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        return gradients


NO_GRADIENT = {
    "passed": lambda loss, logits: Passed.apply(loss, logits)[0],
    "cloned": lambda loss, logits: Cloned.apply(loss, logits)[0],
    "times zero": lambda loss, logits: loss + 0 * logits.logsumexp(-1).sum(),
    "stacked": lambda loss, logits: torch.stack([loss, logits.float().sum()])[0],
}


@pytest.mark.parametrize("use", NO_GRADIENT.values(), ids=NO_GRADIENT)
def test_a_gradient_of_zeros_is_none(model, use):
    inputs = batch()
    leaves = list(model.parameters())
    expected = torch.autograd.grad(use(*model(*inputs)), leaves)
    gradients = torch.autograd.grad(use(*rewrite(model)(*inputs)), leaves)
    torch.testing.assert_close(gradients, expected)


def test_a_frozen_model_returns_logits_without_a_gradient(returned, model):
    model.requires_grad_(False)
    logits, plain = returned()
    assert not logits.requires_grad and not plain.requires_grad
    nn.Linear(VOCAB, 1)(logits).sum().backward()


@pytest.mark.parametrize("make", [lambda z: z.detach(), lambda z: z.detach()[:, 1:]])
def test_a_leaf_made_of_logits_is_not_written(model, make):
    for function in (rewrite(model), model):
        leaf = make(function(*batch())[1]).requires_grad_()
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used"):
            leaf.add_(1)
        with pytest.raises(RuntimeError, match="a view of a leaf Variable that requires grad is"):
            leaf[0].add_(1)


def test_a_write_to_logits_of_which_a_piece_is_held(returned):
    """Found by generated programs: autograd has no history for such a piece any more."""
    results = []
    for logits in returned():
        piece = logits.unbind(0)[0]
        total = piece.logsumexp(-1).sum() + logits[0].logsumexp(-1).sum()
        logits.mul_(2)
        with pytest.raises(RuntimeError, match="view"):
            piece.sum().backward()
        results.append(logits.detach() + 0)
        assert total.requires_grad
    torch.testing.assert_close(*results)
