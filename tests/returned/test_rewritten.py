"""Which returned logits are lazy, which are left alone, and the setting."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lmhead_pass
from lmhead_pass import compat
from lmhead_pass.returned.lazy_logits import LazyLogits

from ..backend import rewrite
from ..reference import assert_no_worse
from .model import (
    RETURNS,
    VOCAB,
    Model,
    assert_same,
    batch,
    is_unread,
    leaves,
    looks,
    run_and_read_log,
)


@pytest.mark.parametrize("returns", RETURNS.values(), ids=RETURNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [rewrite, torch.compile])
def test_chains_that_end_in_a_returned_tensor(returns, dtype, backend):
    model = Model(returns).to(dtype)
    x, y = batch()
    x = x.to(dtype)
    _, result = backend(model)(x, y)
    _, plain = model(x, y)
    assert all(map(is_unread, leaves(result)))
    for logits, unfused in zip(leaves(result), leaves(plain), strict=True):
        assert looks(logits)[:12] == looks(unfused)[:12]
        tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
        torch.testing.assert_close(logits.detach().clone(), unfused.detach(), **tolerance)


@pytest.mark.parametrize("backend", [rewrite, torch.compile])
def test_under_autocast_the_weight_is_cast_when_read(model, backend):
    inputs = batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits = backend(model)(*inputs)
        plain = model(*inputs)[1]
    assert is_unread(logits) and logits.dtype == plain.dtype == torch.bfloat16
    recipe = logits._cell.roots[0].source
    assert recipe.weight is model.head.weight or recipe.weight.data_ptr() == (
        model.head.weight.data_ptr()
    )
    exact = copy.deepcopy(model).double()(inputs[0].double(), inputs[1])[1]
    loss.backward()
    assert_no_worse([logits.detach() + 0], [plain.detach()], [exact.detach()], torch.bfloat16)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, VOCAB), nn.Linear(16, 70, bias=False)

    def forward(self, x, y):
        first, second = self.first(x), x @ self.second.weight.t()
        loss = F.cross_entropy(first.flatten(0, 1), y.flatten())
        return loss + F.cross_entropy(second.flatten(0, 1), y.flatten() % 70), first, second


@pytest.mark.parametrize("backend", [rewrite, torch.compile])
def test_two_heads(backend):
    model, inputs = TwoHeads(), batch()
    loss, *logits = backend(model)(*inputs)
    assert all(map(is_unread, logits))
    loss.backward()
    expected = model(*inputs)
    torch.testing.assert_close([loss, *(x.detach() + 0 for x in logits)], list(expected))


def transposed(hidden, weight, y):
    logits = hidden @ weight
    return F.cross_entropy(logits, y), logits


def cast_weight(hidden, weight, y):
    logits = F.linear(hidden.bfloat16(), weight.t().bfloat16())
    return F.cross_entropy(logits.float(), y), logits


@pytest.mark.parametrize("function", [transposed, cast_weight])
def test_no_copy_of_the_weight_is_kept(function):
    hidden, weight = torch.randn(7, 16), nn.Parameter(torch.randn(16, VOCAB))
    y = torch.randint(VOCAB, (7,))
    _, logits = torch.compile(function)(hidden, weight, y)
    assert logits._cell.roots[0].source.weight is weight
    plain = function(hidden, weight, y)[1]
    torch.testing.assert_close(logits.detach() + 0, plain.detach())


def scaled_weight(hidden, weight, y):
    logits = F.linear(hidden, weight * 2)
    return F.cross_entropy(logits, y), logits


def rounded_weight(hidden, weight, y):
    logits = F.linear(hidden, weight.bfloat16().float())
    return F.cross_entropy(logits, y), logits


def subtracted_bias(hidden, weight, y):
    logits = F.linear(hidden, weight) - torch.arange(float(VOCAB))
    return F.cross_entropy(logits, y), logits


def weight_permuted_to_itself(hidden, weight, y):
    logits = F.linear(hidden, weight.permute(0, 1))
    return F.cross_entropy(logits, y), logits


def writes_hidden(hidden, weight, y):
    logits = F.linear(hidden, weight)
    loss = F.cross_entropy(logits, y)
    hidden.mul_(2)
    return loss, logits


def returns_log_probabilities(hidden, weight, y):
    log_probabilities = F.linear(hidden, weight).log_softmax(-1)
    return F.nll_loss(log_probabilities, y), log_probabilities


def returns_two_views(hidden, weight, y):
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits, y), (logits[:4], logits[2:])


def returns_a_view_without_gradient(hidden, weight, y):
    logits = F.linear(hidden, weight)
    with torch.no_grad():
        view = logits.view(-1, VOCAB)
    return F.cross_entropy(logits, y), view


LEFT_ALONE = {
    "view under no_grad": (returns_a_view_without_gradient, "makes a view of them under no_grad"),
    "weight computed": (scaled_weight, "weight is computed in the graph.*'detach'"),
    "bias subtracted": (subtracted_bias, "returned after a second bias"),
    "weight rounded": (rounded_weight, "computed in the graph .by bfloat16"),
    "weight permuted to itself": (weight_permuted_to_itself, "computed in the graph .by permute"),
    "hidden written": (writes_hidden, "mul_ may change the head's input.*'detach'"),
    "two views": (returns_two_views, "two views of the same logits.*'detach'"),
    "log-probabilities": (returns_log_probabilities, "returns log-probabilities"),
}


@pytest.mark.parametrize(("function", "reason"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_what_cannot_be_lazy_is_left_alone(function, reason, caplog):
    weight, y = nn.Parameter(torch.randn(VOCAB, 16)), torch.randint(VOCAB, (7,))
    hidden = torch.randn(7, 16, requires_grad=True)
    (_, logits), log = run_and_read_log(function, caplog, hidden.clone(), weight, y)
    assert not any(isinstance(leaf, LazyLogits) for leaf in leaves(logits))
    assert_same(logits, function(hidden.clone(), weight, y)[1])
    assert re.search(f"left alone.*{reason}", log), log


def linear_and_loss(hidden, weight, y):
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits, y), logits


class LinearAndLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, y):
        ctx.save_for_backward(hidden)
        return linear_and_loss(hidden, weight, y)

    @staticmethod
    def backward(ctx, grad_loss, grad_logits):
        (hidden,) = ctx.saved_tensors
        return grad_logits.sum() * torch.ones_like(hidden), None, None


def in_a_branch(hidden, weight, y):
    with torch.no_grad():
        inputs = (hidden, weight, y)
        return torch.cond(hidden.sum() > 0, linear_and_loss, linear_and_loss, inputs)


@pytest.mark.parametrize("function", [LinearAndLoss.apply, in_a_branch])
def test_a_part_of_a_graph_returns_plain_logits(function):
    weight, y = nn.Parameter(torch.randn(VOCAB, 16)), torch.randint(VOCAB, (7,))
    hidden = torch.randn(7, 16, requires_grad=True)
    results = [f(hidden, weight, y)[1] for f in (torch.compile(function), function)]
    assert type(results[0]) is torch.Tensor
    assert_same(*results)
    if results[0].requires_grad:
        gradients = [torch.autograd.grad(logits.sum(), hidden)[0] for logits in results]
        assert torch.equal(*gradients)


def test_a_part_of_ddp_returns_nothing_behind_lazy_logits(model, monkeypatch, caplog):
    """What it returns is miscounted there. tests/end_to_end/parallel_step.py has the real thing."""
    monkeypatch.setattr("lmhead_pass.plan.returned_plan.is_part_of_ddp", lambda: True)
    (_, logits), log = run_and_read_log(model, caplog, *batch())
    assert is_unread(logits) == compat.DDP_PARTS_RETURN_SUBCLASSES == ("rewritten" in log)
    (logits, _), log = run_and_read_log(lambda *inputs: model(*inputs)[::-1], caplog, *batch())
    assert not isinstance(logits, LazyLogits)
    assert "torch._dynamo.config.optimize_ddp = False" in log


def test_keep_leaves_the_model_alone_and_says_how_not_to(model, caplog):
    inputs = batch()
    with lmhead_pass.config.patch(returned_logits="keep"):
        (loss, logits), log = run_and_read_log(model, caplog, *inputs)
    assert type(logits) is torch.Tensor
    assert log.count("config.returned_logits is 'keep'") == 1
    (loss + logits.sum()).backward()


@pytest.mark.parametrize("returns", RETURNS.values(), ids=RETURNS)
@pytest.mark.parametrize("autocast", [False, True])
def test_detach_returns_plain_tensors_without_a_gradient(returns, autocast, caplog):
    model, inputs = Model(returns), batch()
    with (
        lmhead_pass.config.patch(returned_logits="detach"),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        (loss, result), log = run_and_read_log(model, caplog, *inputs)
        plain_loss, plain = model(*inputs)
    assert "logits are returned computed, without a gradient" in log
    for logits, unfused in zip(leaves(result), leaves(plain), strict=True):
        assert type(logits) is torch.Tensor and not logits.requires_grad
        assert torch.equal(logits, unfused.detach())
    loss.backward()
    gradient, model.head.weight.grad = model.head.weight.grad, None
    plain_loss.backward()
    tolerance = {"rtol": 3e-2, "atol": 3e-3} if autocast else {}
    torch.testing.assert_close(gradient, model.head.weight.grad, **tolerance)


def test_the_log_says_that_logits_are_lazy(model, caplog):
    _, log = run_and_read_log(model, caplog, *batch())
    assert "rewritten" in log and "logits are returned lazily, computed if they are read" in log
