"""Several parts of the same logits are returned."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from ..backend import rewrite
from .model import VOCAB, Model, batch, is_unread

APART = {
    "first and others": lambda z: (z[:, 0], z[:, 1:]),
    "others and last": lambda z: (z[:, :-1], z[:, -1]),
    "from both ends": lambda z: (z[:, :2], z[:, 2:]),
    "sequences": lambda z: (z[0], z[1]),
    "pieces": lambda z: z.split(2, dim=1),
    "unbound": lambda z: z.unbind(0),
    "flat before": lambda z: (z.flatten(0, 1)[:3], z.flatten(0, 1)[3:].view(-1, VOCAB)),
}
OVERLAPPING = {
    "by one": lambda z: (z[:, :3], z[:, 2:]),
    "from different ends": lambda z: (z[:, :4], z[:, -1]),
    "every other": lambda z: (z[:, ::2], z[:, 1::2]),
    "another shape": lambda z: (z[:, 0], z.view(-1, VOCAB)[1:]),
}


@pytest.mark.parametrize("backend", [rewrite, torch.compile])
@pytest.mark.parametrize("returns", APART.values(), ids=APART)
def test_parts_without_common_rows(returns, backend):
    model, (x, y) = Model(returns), batch()
    found = []
    for function in (backend(model), model):
        model.zero_grad()
        loss, parts = function(x, y)
        assert function is model or all(map(is_unread, parts))
        (loss + sum(part.logsumexp(-1).square().mean() for part in parts)).backward()
        found.append([*(p.detach() + 0 for p in parts), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*found)


def test_writes_to_one_part_leave_the_other():
    model, (x, y) = Model(lambda z: (z[:, 0], z[:, 1:])), batch()
    (_, (first, others)), (_, expected) = rewrite(model)(x, y), model(x, y)
    with torch.no_grad():
        first.mul_(2)
        expected[0].mul_(2)
    torch.testing.assert_close([first + 0, others + 0], [part + 0 for part in expected])


@pytest.mark.parametrize("returns", OVERLAPPING.values(), ids=OVERLAPPING)
def test_parts_that_may_overlap_are_computed(returns):
    model, inputs = Model(returns), batch()
    _, parts = rewrite(model)(*inputs)
    assert not any(map(is_unread, parts))
    assert not counters["lmhead_pass"]["rewritten"]


def test_any_number_of_tokens():
    model = Model(lambda z: (z[:, 0], z[:, 1:]))
    compiled = rewrite(model)
    for length in (5, 7, 2, 9):
        x, y = batch((2, length))
        _, parts = compiled(x, y)
        assert all(map(is_unread, parts))
        loss = F.cross_entropy(parts[1].flatten(0, 1), y[:, 1:].flatten())
        expected = F.cross_entropy(model(x, y)[1][1].flatten(0, 1), y[:, 1:].flatten())
        torch.testing.assert_close(loss, expected)
