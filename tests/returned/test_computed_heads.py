"""Returned logits of a head whose weight or bias the compiled function computes itself."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ..backend import rewrite
from .model import is_unread

HIDDEN, VOCAB, ROWS = 8, 96, 40


class Model(nn.Module):
    """``head(model, hidden)`` are its logits."""

    def __init__(self, head):
        super().__init__()
        self.body = nn.Linear(HIDDEN, HIDDEN)
        self.weight = nn.Parameter(torch.randn(VOCAB, HIDDEN))
        self.more = nn.Parameter(torch.randn(VOCAB, HIDDEN // 2))
        self.bias = nn.Parameter(torch.randn(VOCAB))
        self.head = head

    def forward(self, x):
        return self.head(self, self.body(x))


def joined(model, hidden):
    """As MobileBERT does it."""
    weight = torch.cat([model.weight[:, : HIDDEN // 2].t(), model.more.t()])
    return hidden.matmul(weight) + model.bias


def of_half_precision(model, hidden):
    half = [t.bfloat16() for t in (hidden, model.weight, model.bias)]
    return F.linear(*half)


def transposed_under_no_grad(model, hidden):
    with torch.no_grad():
        weight = model.weight.t()
    return hidden @ weight + model.bias


def cut_under_no_grad(model, hidden):
    with torch.no_grad():
        hidden = hidden[2:]
    return F.linear(hidden, model.weight)


def under_autocast(model, hidden):
    with torch.autocast("cpu", torch.bfloat16):
        return F.linear(hidden, model.weight, model.bias)


HEADS = {
    "weight scaled": lambda m, h: F.linear(h, m.weight * 2, m.bias),
    "weight joined": joined,
    "weight normalized": lambda m, h: h @ F.normalize(m.weight).t(),
    "weight padded": lambda m, h: F.linear(h, F.pad(m.weight, (0, 0, 0, 32))),
    "weight sliced": lambda m, h: F.linear(h, m.weight[:72], m.bias[:72]),
    "weight rounded": lambda m, h: F.linear(h, m.weight.bfloat16().float()),
    "weight detached": lambda m, h: F.linear(h, m.weight.detach(), m.bias),
    "hidden detached": lambda m, h: F.linear(h.detach(), m.weight * 2, m.bias),
    "all detached but the bias": lambda m, h: F.linear(h.detach(), m.weight.detach(), m.bias * 2),
    "bias scaled": lambda m, h: F.linear(h, m.weight, m.bias * 2),
    "bias viewed": lambda m, h: F.linear(h, m.weight, m.bias.view(-1)),
    "bias detached": lambda m, h: F.linear(h, m.weight, m.bias.detach()),
    "bias added afterwards": lambda m, h: F.linear(h, m.weight) + m.bias.tanh(),
    "one tensor for two": lambda m, h: F.linear(h, (w := m.weight * 2), w[:, 0]),
    "weight transposed under no_grad": transposed_under_no_grad,
    "hidden states cut under no_grad": cut_under_no_grad,
    "half precision": of_half_precision,
    "autocast": under_autocast,
}

USES = {
    "a loss outside": lambda z: F.cross_entropy(z, torch.arange(len(z))),
    "values": lambda z: z.float().std(),
    "pieces": lambda z: sum(F.cross_entropy(p, torch.arange(len(p))) for p in z.split(10)),
}


def gradients(function, model, use, x):
    logits = function(x)
    loss = use(logits)
    loss.backward()
    found = [None if p.grad is None else p.grad.clone() for p in (*model.parameters(), x)]
    model.zero_grad()
    x.grad = None
    return logits, [loss.detach(), *found]


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_gradients(head, use):
    model, x = Model(head), torch.randn(ROWS, HIDDEN, requires_grad=True)
    logits, found = gradients(torch.compile(model), model, use, x)
    assert is_unread(logits) == (use is not USES["values"])
    _, expected = gradients(model, model, use, x)
    # Inductor may drop a cast to BF16 and back, with the pass and without.
    is_rounded = logits.dtype == torch.bfloat16 or head is HEADS["weight rounded"]
    close = {"rtol": 0.05, "atol": 0.05} if is_rounded else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found, expected, **close)


class WithLoss(Model):
    def forward(self, x):
        logits = super().forward(x)
        return F.cross_entropy(logits, torch.arange(len(logits))), logits


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_a_second_loss(head):
    def use(results):
        loss, logits = results
        return loss + logits.logsumexp(-1).square().mean()

    model, x = WithLoss(head), torch.randn(ROWS, HIDDEN, requires_grad=True)
    (_, logits), found = gradients(rewrite(model), model, use, x)
    assert is_unread(logits)
    _, expected = gradients(model, model, use, x)
    close = {"rtol": 0.05, "atol": 0.05} if logits.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found, expected, **({"rtol": 1e-4, "atol": 1e-5} | close))


def test_the_parameter_may_change_before_they_are_read():
    model, x = Model(joined), torch.randn(ROWS, HIDDEN)
    expected = model(x).detach()
    logits = rewrite(model)(x)
    model.weight.data.zero_()
    assert is_unread(logits)
    torch.testing.assert_close(logits.detach() + 0, expected)


def test_a_weight_larger_than_the_logits_is_not_kept():
    model, x = Model(joined), torch.randn(HIDDEN, HIDDEN)
    assert not is_unread(rewrite(model)(x))


def test_a_weight_that_is_frozen_before_the_loss():
    model, x = Model(HEADS["bias scaled"]), torch.randn(ROWS, HIDDEN)
    found = []
    for function in (rewrite(model), model):
        model.weight.requires_grad_(True)
        logits = function(x)
        model.weight.requires_grad_(False)
        F.cross_entropy(logits, torch.arange(ROWS)).backward()
        found.append([p.grad for p in model.parameters() if p is not model.weight])
        model.zero_grad()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


UNCHANGED = {
    "to": lambda t: t.to(t.dtype),
    "float": lambda t: t.float(),
    "contiguous": lambda t: t.contiguous(),
    "type_as": lambda t: t.type_as(t),
    "device": lambda t: t.to(t.device),
}


@pytest.mark.parametrize("returns_weight", [False, True])
@pytest.mark.parametrize("which", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("name", UNCHANGED)
def test_what_is_returned_as_it_was_given_keeps_its_gradient(name, which, returns_weight):
    """A cast to the dtype that a parameter has is that parameter."""

    def program(hidden, weight, bias):
        given = {"hidden": hidden, "weight": weight, "bias": bias}
        given[which] = UNCHANGED[name](given[which])
        logits = F.linear(*given.values())
        return (logits, given["weight"]) if returns_weight else (logits,)

    leaves = [torch.randn(size).requires_grad_() for size in ((5, 16), (160, 16), (160,))]
    results = []
    for function in (program, rewrite(program)):
        logits, *_ = function(*leaves)
        loss = logits.logsumexp(-1).square().mean()
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert is_unread(logits)
    torch.testing.assert_close(*results)
