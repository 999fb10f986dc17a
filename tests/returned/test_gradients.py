"""Gradients that would flow through returned logits are refused, and no others."""

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
    "custom function": Doubled.apply,
    "with other gradients": lambda x: (x * torch.ones(VOCAB, requires_grad=True)).sum(),
    "written": lambda x: x.mul_(2).sum(),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("backend", [rewrite, torch.compile])
def test_a_gradient_is_refused(model, use, backend):
    inputs = batch()
    loss, logits = backend(model)(*inputs)
    second = use(logits)
    plain = use(model(*inputs)[1]).detach()
    torch.testing.assert_close(second.detach(), plain, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match=SETTING):
        (loss + second).backward()
    loss, logits = backend(model)(*inputs)
    with pytest.raises(RuntimeError, match=SETTING):
        torch.autograd.grad(loss + use(logits), model.head.weight)


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


@pytest.mark.parametrize("cls", [Model, Frozen, Cut, Written, Tied, Checkpointed])
@pytest.mark.parametrize("backend", [rewrite, torch.compile])
def test_a_gradient_is_refused_whatever_it_is_asked_of(cls, backend):
    model, (_, y) = cls(), batch()
    embedded, scale = torch.randn(2, 5, 16, requires_grad=True), torch.ones(1, requires_grad=True)
    compiled = backend(model)
    leaves = [leaf for leaf in (*model.parameters(), embedded, scale) if leaf.requires_grad]
    for use in (lambda logits: logits.logsumexp(-1).mean(), Doubled.apply):
        for asked in (*leaves, "scaled", "hidden states"):
            scaled = embedded * scale
            hidden = scaled + 1
            inputs = {"scaled": scaled, "hidden states": hidden}.get(asked, asked)
            loss, logits = compiled(hidden, y)
            with pytest.raises(RuntimeError, match=SETTING):
                torch.autograd.grad(loss + use(logits), inputs)
            # Autograd knows no other way from here to there than through the logits.
            _, logits = compiled(hidden, y)
            del loss, hidden
            with pytest.raises(RuntimeError, match=SETTING):
                torch.autograd.grad(scale.sum() + use(logits), inputs)


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
