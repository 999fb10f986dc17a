"""The gradient finds its way back through what Inductor makes of a graph and its buffers."""

import pytest
import torch
import torch.nn.functional as F

from .model import is_unread

pytestmark = pytest.mark.codegen

VOCAB = 96

HEADS = {
    "product of three dimensions": lambda h, w, p, b: F.linear(F.linear(h, p), w),
    "flat": lambda h, w, p, b: F.linear(h.tanh(), w).view(-1, VOCAB),
    "sliced": lambda h, w, p, b: F.linear(h.tanh(), w)[:, :-1],
    "one sequence": lambda h, w, p, b: F.linear(h.tanh(), w)[0],
    "reshaped before": lambda h, w, p, b: F.linear(h.tanh().reshape(-1, 8), w),
    "transposed": lambda h, w, p, b: F.linear(h.tanh().transpose(0, 1), w),
    "input": lambda h, w, p, b: F.linear(h, w, b),
    "weight and bias scaled": lambda h, w, p, b: F.linear(h.tanh(), w * 2, b * 2),
    "weight projected": lambda h, w, p, b: F.linear(h.tanh(), w @ p, b.view(2, -1).flatten()),
    "weight sliced": lambda h, w, p, b: F.linear(h.tanh(), w[:90], b[:90]),
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_gradients(head):
    tensors = [torch.randn(*s, requires_grad=True) for s in ((2, 20, 8), (VOCAB, 8), (8, 8), (96,))]
    found = []
    for function in (torch.compile(head), head):
        z = function(*tensors)
        assert function is head or is_unread(z)
        rows = z.reshape(-1, z.size(-1))
        loss = F.cross_entropy(rows, torch.arange(len(rows)))
        found.append(torch.autograd.grad(loss, tensors, allow_unused=True))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
