"""Any sequence of operations on returned logits and what came of them, on unread and plain ones."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmhead_pass.returned.lazy_logits import LazyLogits

from ..backend import rewrite


def last_set(x):
    x[..., -1] = 3
    return x


DERIVED = {
    "first": lambda x: x[0],
    "tail": lambda x: x[..., 1:],
    "flat": lambda x: x.reshape(-1),
    "transposed": lambda x: x.transpose(0, -1),
    "expanded": lambda x: x.expand(2, *x.shape),
    "unsqueezed": lambda x: x.unsqueeze(0).flatten(0, 1),
    "contiguous": lambda x: x.contiguous(),
    "float": lambda x: x.float(),
    "bfloat16": lambda x: x.to(torch.bfloat16),
    "copy": lambda x: x.to(x.dtype, copy=True),
    "detached": lambda x: x.detach(),
    "data": lambda x: x.data,
    "float without gradient": torch.no_grad()(lambda x: x.float()),
}
READING = {
    "cloned": lambda x: x.clone(),
    "doubled": lambda x: x * 2,
    "fused": lambda x: torch.cat([x, x]),
    "argmax": lambda x: x.argmax(-1),
}
WRITING = {
    "added to": lambda x: x.add_(1),
    "doubled behind": lambda x: x.detach().mul_(2),
    "set": last_set,
    "set without gradient": torch.no_grad()(last_set),
    "cleared without gradient": torch.no_grad()(lambda x: x.zero_()),
    "of a gradient": lambda x: x.detach().requires_grad_(),
}
OPERATIONS = DERIVED | READING | WRITING


def result(operation, x):
    try:
        return operation(x)
    except (RuntimeError, IndexError) as error:
        return error


def known(x):
    return x.shape, x.dtype, x.stride(), x.requires_grad, x.is_leaf


def gradient(x, weight):
    """Zeros if none gets from ``x`` to ``weight``; a RuntimeError if eager has none."""
    none = torch.zeros_like(weight)
    if not (x.requires_grad and x.is_floating_point()):
        return none
    try:
        (found,) = torch.autograd.grad(x.sum(), weight, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        return error
    return none if found is None else found


@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_views_and_gradients(dtype, needs_gradient):
    weight = torch.randn(96, 4, dtype=dtype, requires_grad=needs_gradient)
    hidden, y = torch.randn(2, 3, 4, dtype=dtype), torch.randint(96, (2, 3))

    def function(hidden, weight, y):
        logits = F.linear(hidden, weight)
        return F.cross_entropy(logits.float().flatten(0, 1), y.flatten()), logits

    compiled = rewrite(function)
    step = st.tuples(st.integers(0, 9), st.sampled_from(sorted(OPERATIONS)))

    @hypothesis.seed(0)
    @hypothesis.settings(max_examples=300, database=None, deadline=None)
    @hypothesis.given(st.lists(step, max_size=9))
    def check(steps):
        pairs = [(compiled(hidden, weight, y)[1], function(hidden, weight, y)[1])]
        assert isinstance(pairs[0][0], LazyLogits)
        for number, name in steps:
            lazy, plain = (result(OPERATIONS[name], x) for x in pairs[number % len(pairs)])
            assert isinstance(plain, Tensor) == isinstance(lazy, Tensor), (plain, lazy)
            if isinstance(plain, Tensor):
                pairs.append((lazy, plain))
        for lazy, plain in pairs:
            assert known(lazy) == known(plain)
            expected = gradient(plain, weight)
            if isinstance(expected, Tensor):
                tolerance = {"rtol": 5e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {}
                torch.testing.assert_close(gradient(lazy, weight), expected, **tolerance)
        for lazy, plain in pairs:
            torch.testing.assert_close(lazy.detach().clone(), plain.detach())

    check()
