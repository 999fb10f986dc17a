"""Random numbers are drawn once, and in the model's order."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.fx import Graph, GraphModule

from lmhead_pass.graph import draws

from ..backend import rewrite

V, N = 96, 12


def _of_rows(h, w, y):
    return F.cross_entropy(F.linear(h, w), y, reduction="none")


def targets_after_a_dropout(h, w):
    z = F.linear(h, w)
    lse = z.logsumexp(-1)
    noise = F.dropout(torch.ones(8))
    y = torch.randint(0, V, (N,))
    return F.cross_entropy(z, y, reduction="none").pow(2).mean() + lse.pow(3).mean(), noise


def sampled_targets(h, w):
    z = F.linear(h, w)
    lse = z.logsumexp(-1)
    noise = torch.rand(3)
    y = torch.multinomial(torch.ones(N, V), 1).squeeze(1)
    return F.nll_loss(z.log_softmax(-1), y) + lse.pow(2).mean(), noise


def noise_between_the_losses(h, w):
    """Of two losses that one call could serve, behind the later one."""
    y = torch.arange(N)
    first = _of_rows(h, w, y).sum()
    scaled = first * torch.rand(())
    noise = torch.rand(3)
    return first + _of_rows(h * 2, w, y).sum(), scaled.detach() + noise


def losses_with_a_dropout(h, w):
    return F.dropout(_of_rows(h, w, torch.arange(N))).sum(), torch.rand(3)


def random_weights(h, w):
    return (_of_rows(h, w, torch.arange(N)) * torch.rand(N)).sum(), torch.rand(3)


@pytest.mark.parametrize(
    "function",
    [
        targets_after_a_dropout,
        sampled_targets,
        noise_between_the_losses,
        losses_with_a_dropout,
        random_weights,
    ],
)
def test_drawn_as_without_the_pass(function):
    leaves = [torch.randn(size, 8).requires_grad_() for size in (N, V)]

    def run(step):
        torch.manual_seed(3)
        loss, noise = step(*leaves)
        return [loss.detach(), noise, *torch.autograd.grad(loss, leaves), torch.rand(2)]

    torch.testing.assert_close(run(rewrite(function)), run(function))
    assert counters["lmhead_pass"]["rewritten"] >= 1


def test_which_nodes_draw():
    graph = Graph()
    x = graph.placeholder("x")
    body = Graph()
    body.output(body.call_function(F.dropout, (body.placeholder("x"),)))
    random = [
        graph.call_function(torch.rand, (3,)),
        graph.call_function(torch.bernoulli, (x,)),
        graph.call_function(F.dropout2d, (x,)),
        graph.call_function(torch.ops.aten.rand_like.default, (x,)),
        graph.call_method("uniform_", (x,)),
        graph.call_function(
            torch.ops.higher_order.tag_activation_checkpoint, (graph.get_attr("body"), x)
        ),
    ]
    known = [
        x,
        graph.call_function(torch.add, (x, x)),
        graph.call_function(torch.ops.aten.mul.Tensor, (x, x)),
        graph.call_method("sum", (x,)),
        graph.call_function(F.cross_entropy, (x, x)),
    ]
    graph.output(x)
    GraphModule({"body": GraphModule({}, body)}, graph)
    assert all(map(draws, random))
    assert not any(map(draws, known))
