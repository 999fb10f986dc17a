"""Heads that are more than a linear layer: adapters, parametrizations, hooks, tensor subclasses."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.testing._internal.two_tensor import TwoTensor

from . import forms
from .backend import rewrite

V, H = forms.V, 16


class Adapter(nn.Module):
    """As PEFT has it: the head's own output, and that of two small layers."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(H, V, bias=False).requires_grad_(False)
        self.a, self.b = nn.Linear(H, 4, bias=False), nn.Linear(4, V, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x)) * 0.5


class MergedAdapter(Adapter):
    def forward(self, x):
        return F.linear(x, self.base.weight + self.b.weight @ self.a.weight * 0.5)


class Scaled(nn.Module):
    """A weight that is stored in integers, as in quantised heads."""

    def __init__(self):
        super().__init__()
        self.register_buffer("stored", torch.randint(-127, 128, (V, H), dtype=torch.int8))
        self.scale = nn.Parameter(torch.rand(V, 1) / 64)

    def forward(self, x):
        return F.linear(x, self.stored.to(x.dtype) * self.scale)


def weight_norm():
    return nn.utils.parametrizations.weight_norm(nn.Linear(H, V))


def spectral_norm():
    return nn.utils.parametrizations.spectral_norm(nn.Linear(H, V)).eval()


def hooked(change):
    head = nn.Linear(H, V)
    head.register_forward_hook(lambda module, args, output: change(output))
    return head


def pre_hooked():
    head = nn.Linear(H, V)
    head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    return head


HEADS = {
    "adapter": (Adapter, 0),
    "merged_adapter": (MergedAdapter, 1),
    "quantised": (Scaled, 1),
    "weight_norm": (weight_norm, 1),
    "spectral_norm": (spectral_norm, 1),
    "hook_that_scales": (lambda: hooked(lambda z: z * 0.5), 1),
    "hook_that_clamps": (lambda: hooked(lambda z: z.clamp(-1, 1)), 0),
    "pre_hook": (pre_hooked, 1),
    "sequence": (lambda: nn.Sequential(nn.LayerNorm(H), nn.Linear(H, V)), 1),
}


@pytest.mark.parametrize("name", HEADS)
def test_loss_and_gradients(name):
    make, rewritten = HEADS[name]
    head, target = make(), torch.randint(V, (3, 7))
    hidden = torch.randn(3, 7, H, requires_grad=True)
    leaves = [hidden, *(p for p in head.parameters() if p.requires_grad)]

    def step(hidden, target):
        return forms.flat(head(hidden), target)

    expected = step(hidden, target)
    gradients = torch.autograd.grad(expected, leaves)
    loss = rewrite(step)(hidden, target)
    assert counters["lmhead_pass"]["rewritten"] == rewritten
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), gradients)


def test_a_weight_that_is_a_subclass_is_refused_by_name(caplog):
    weight = nn.Parameter(TwoTensor(torch.randn(V, H), torch.randn(V, H)))
    hidden, target = torch.randn(5, H), torch.randint(V, (5,))

    def step(hidden, target):
        return F.cross_entropy(F.linear(hidden, weight), target)

    with caplog.at_level("INFO", logger="lmhead_pass"):
        loss = rewrite(step)(hidden, target)
    assert counters["lmhead_pass"] == {"refused": 1}
    assert "is a TwoTensor, not a plain tensor" in caplog.text
    torch.testing.assert_close(loss, step(hidden, target))
