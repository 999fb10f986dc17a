"""Logits that are written to after something was made of them, as eager PyTorch allows it."""

import pytest
import torch

from ..backend import rewrite
from .test_losses import Model, batch


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
