"""Heads that are more than a linear layer: adapters, parametrizations, hooks, tensor subclasses."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.nn.utils.prune as prune
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_map

from .. import forms
from ..backend import rewrite

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


class ModulesToSave(nn.Module):
    """As PEFT has it: the original head stays, a trained copy of it is used."""

    def __init__(self):
        super().__init__()
        self.original = nn.Linear(H, V).requires_grad_(False)
        self.saved = nn.ModuleDict({"default": nn.Linear(H, V)})

    def forward(self, x):
        return self.saved["default"](x)


class ScaledAdapter(Adapter):
    """The sum, and a factor for each word: the magnitudes of DoRA."""

    def __init__(self):
        super().__init__()
        self.magnitude = nn.Parameter(torch.rand(V))

    def forward(self, x):
        return super().forward(x) * self.magnitude


def old_weight_norm():
    return nn.utils.weight_norm(nn.Linear(H, V))


def orthogonal():
    return nn.utils.parametrizations.orthogonal(nn.Linear(H, V))


def pruned():
    return prune.random_unstructured(nn.Linear(H, V), "weight", 0.3)


def weight_norm():
    return nn.utils.parametrizations.weight_norm(nn.Linear(H, V))


def spectral_norm():
    """Each forward in training changes its buffers."""
    return nn.utils.parametrizations.spectral_norm(nn.Linear(H, V))


def hooked(change):
    head = nn.Linear(H, V)
    head.register_forward_hook(lambda module, args, output: change(output))
    return head


def pre_hooked():
    head = nn.Linear(H, V)
    head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    return head


def hooked_backward(register):
    """A hook that doubles a gradient: Dynamo cuts the graph between head and loss for it."""
    head = nn.Linear(H, V)
    getattr(head, register)(lambda module, *gradients: (gradients[0][0] * 2,))
    return head


def hooked_logits(register):
    def change(logits):
        register(logits)
        return logits

    return hooked(change)


# Where a hook cuts the graph, it runs the head itself in eager.
RUNS_HEAD_IN_EAGER = torch.__version__ < "2.13"
HEADS = {
    "adapter": (Adapter, 1),
    "scaled_adapter": (ScaledAdapter, 1),
    "modules_to_save": (ModulesToSave, 1),
    "merged_adapter": (MergedAdapter, 1),
    "quantised": (Scaled, 1),
    "weight_norm": (weight_norm, 1),
    "old_weight_norm": (old_weight_norm, 1),
    "spectral_norm": (spectral_norm, 1),
    "orthogonal": (orthogonal, 1),
    "pruned": (pruned, 1),
    "hook_that_scales": (lambda: hooked(lambda z: z * 0.5), 1),
    "hook_that_clamps": (lambda: hooked(lambda z: z.clamp(-1, 1)), 1),
    "hook_that_writes": (lambda: hooked(lambda z: z.mul_(0.5)), 1),
    "pre_hook": (pre_hooked, 1),
    "backward_hook": (lambda: hooked_backward("register_full_backward_hook"), 0),
    "backward_pre_hook": (lambda: hooked_backward("register_full_backward_pre_hook"), 0),
    "hook_of_logits": (lambda: hooked_logits(lambda z: z.register_hook(lambda g: g * 2)), 0),
    "retain_grad": (lambda: hooked_logits(lambda z: z.retain_grad()), int(not RUNS_HEAD_IN_EAGER)),
    "sequence": (lambda: nn.Sequential(nn.LayerNorm(H), nn.Linear(H, V)), 1),
}


def seeded(make):
    torch.manual_seed(1)
    return make()


@pytest.mark.parametrize("name", HEADS)
def test_loss_and_gradients(name):
    make, rewritten = HEADS[name]
    head, alone = (seeded(make) for _ in range(2))
    hidden, target = torch.randn(3, 7, H, requires_grad=True), torch.randint(V, (3, 7))

    def step(head, hidden, target):
        return forms.flat(head(hidden), target)

    def leaves(head):
        return [hidden, *(p for p in head.parameters() if p.requires_grad)]

    expected = step(alone, hidden, target)
    gradients = torch.autograd.grad(expected, leaves(alone))
    loss = rewrite(step)(head, hidden, target)
    found = dict(counters["lmhead_pass"])
    # Where a module is compiled by itself, so is its head.
    assert found.pop("deferred", 0) == (name == "retain_grad" and not RUNS_HEAD_IN_EAGER)
    assert found == {"rewritten" if rewritten else "refused": 1}
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves(head)), gradients)


@pytest.mark.parametrize("keep", [lambda z: z, lambda z: z.detach(), lambda z: z.clone()])
def test_a_hook_that_keeps_the_logits(keep):
    """They leave the graph, and are what the head gives."""
    head, target = nn.Linear(H, V), torch.randint(V, (3, 7))
    hidden = torch.randn(3, 7, H, requires_grad=True)
    kept = []
    head.register_forward_hook(lambda module, args, output: kept.append(keep(output)))
    loss = rewrite(lambda h, y: forms.flat(head(h), y), then=aot_eager)(hidden, target)
    assert counters["lmhead_pass"] == {"rewritten": 1}
    expected = forms.flat(head(hidden), target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(kept[0] + 0, kept[1])
    leaves = [hidden, *head.parameters()]
    expected = torch.autograd.grad(expected, leaves)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), expected)


@pytest.mark.parametrize("tensor", ["hidden", "weight"])
def test_other_gradients_can_be_hooked(tensor):
    """A hook on what the head reads sees, and may change, the gradient that eager gives it."""

    def step(h, w, y):
        h, w = h * 2, w * 2
        (h if tensor == "hidden" else w).register_hook(lambda gradient: gradient * 3)
        return forms.flat(F.linear(h, w), y)

    leaves = [torch.randn(3, 7, H, requires_grad=True), torch.randn(V, H, requires_grad=True)]
    target = torch.randint(V, (3, 7))
    expected = torch.autograd.grad(step(*leaves, target), leaves)
    loss = rewrite(step, then=aot_eager)(*leaves, target)
    assert counters["lmhead_pass"] == {"rewritten": 1}
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), expected)


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


class Quantised(torch.Tensor):
    """As torchao has it: integers and scales, that dequantise themselves for any operation."""

    @staticmethod
    def __new__(cls, stored, scale):
        return torch.Tensor._make_wrapper_subclass(cls, stored.shape, dtype=scale.dtype)

    def __init__(self, stored, scale):
        self.stored, self.scale = stored, scale

    def __tensor_flatten__(self):
        return ["stored", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Quantised(inner["stored"], inner["scale"])

    def __repr__(self):  # pytest shows what torch logs; a fake tensor's values cannot be shown
        return f"Quantised({tuple(self.shape)})"

    def dequantised(self):
        return self.stored.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Quantised(args[0].stored, args[0].scale)
        plain = lambda leaf: leaf.dequantised() if isinstance(leaf, Quantised) else leaf  # noqa: E731
        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


@pytest.mark.parametrize(
    ("head", "result"),
    [
        (lambda x, weight: F.linear(x, weight), "refused"),
        (lambda x, weight: F.linear(x, weight.dequantised()), "rewritten"),
        (lambda x, weight: x @ weight.t(), "rewritten"),
    ],
    ids=["as it is", "dequantised", "by an operation"],
)
def test_a_quantised_weight(head, result, caplog):
    stored = torch.randint(-127, 128, (V, H), dtype=torch.int8)
    weight = nn.Parameter(Quantised(stored, torch.rand(V, 1) / 64), requires_grad=False)
    hidden, target = torch.randn(3, 7, H, requires_grad=True), torch.randint(V, (3, 7))

    def step(hidden, weight, target):
        return forms.flat(head(hidden, weight), target)

    expected = step(hidden, weight, target)
    with caplog.at_level("INFO", logger="lmhead_pass"):
        loss = rewrite(step, then=aot_eager)(hidden, weight, target)
    assert counters["lmhead_pass"] == {result: 1}
    assert ("is a Quantised, not a plain tensor" in caplog.text) == (result == "refused")
    torch.testing.assert_close(loss, expected)
    gradient = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, hidden))


@pytest.mark.parametrize("is_trained", [True, False])
def test_a_subclass_below_logits_that_are_returned(is_trained):
    head = nn.Parameter(torch.randn(V, H))
    weight = nn.Parameter(Quantised(torch.randn(H, H), torch.ones(H, 1)), is_trained)
    hidden, target = torch.randn(5, H, requires_grad=True), torch.randint(V, (5,))

    def step(hidden, weight, target):
        logits = F.linear(F.linear(hidden, weight), head)
        return F.cross_entropy(logits, target), logits

    results = []
    for function in (rewrite(step, then=aot_eager), step):
        loss, logits = function(hidden, weight, target)
        total = loss + logits.square().sum()
        leaves = [hidden, head, *([weight] if is_trained else [])]
        gradients = torch.autograd.grad(total, leaves)
        results.append((total.detach(), *(gradient + 0 for gradient in gradients)))
    assert counters["lmhead_pass"] == {"rewritten": 2}  # the loss, and the sum outside
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
