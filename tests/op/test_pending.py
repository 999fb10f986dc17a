"""The product that waits for the backward: the whole op on a GPU's loop, run by the interpreter."""

import pytest
import torch
import torch.nn.functional as F

import lmhead_pass
from lmhead_pass.op import holding
from lmhead_pass.op.kernels import dispatch

from .. import reference
from ..device import DEVICE, SUITE

triton_loop = pytest.importorskip("lmhead_pass.op.kernels.triton_loop")

HIDDEN, VOCAB = 16, 301
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), *SUITE]


@pytest.fixture(autouse=True)
def _hopper(monkeypatch):
    monkeypatch.setattr(holding, "_is_hopper", lambda device: True)
    monkeypatch.setattr(dispatch, "loop_for", lambda device: triton_loop)


def _inputs(tokens, dtype=torch.bfloat16):
    target = torch.randint(VOCAB, (tokens,), device=DEVICE)
    target[::5] = -100
    leaves = [torch.randn(size, HIDDEN, device=DEVICE).to(dtype) for size in (tokens, VOCAB)]
    return *(leaf.requires_grad_() for leaf in leaves), target


def _head(hidden, weight, target):
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def _results(function, hidden, weight, target, factor=1.0):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (hidden, weight)]
    loss = function(*leaves, target)
    (factor * loss).backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def _assert_right(function, inputs, factor=1.0):
    *leaves, target = inputs
    exact = _results(_head_in_fp64, *leaves, target, factor)
    unfused = _results(_head, *leaves, target, factor)
    reference.assert_no_worse(
        _results(function, *leaves, target, factor), unfused, exact, leaves[0].dtype
    )


def _head_in_fp64(hidden, weight, target):
    return F.cross_entropy(F.linear(hidden.double(), weight.double()), target)


@pytest.mark.parametrize("factor", [1.0, 1 / 3, 2.0**16])
@pytest.mark.parametrize("rows", [4, 64], ids=["chunks", "one_chunk"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_upstream_gradient_is_multiplied_before_rounding(dtype, rows, factor):
    def op(hidden, weight, target):
        return torch.ops.lmhead_pass.linear_cross_entropy(
            *(hidden, weight, None, target, *[None] * 5, "mean"),
            *(-100, 0.0, 1.0, None, "tanh", dtype, rows),
        )

    _assert_right(op, _inputs(13, dtype), factor)


def test_backward_twice():
    hidden, weight, target = _inputs(13)
    with lmhead_pass.config.patch(batch_chunk_size=4):
        loss = torch.compile(_head)(hidden, weight, target)
    first, second = (
        torch.autograd.grad(loss, weight, torch.tensor(factor, device=DEVICE), retain_graph=True)[0]
        for factor in (1.0, 2.0)
    )
    torch.testing.assert_close(second, 2 * first, rtol=0, atol=0)


def test_no_tokens():
    hidden, weight, target = _inputs(0)
    loss, *gradients = _results(torch.compile(_head), hidden, weight, target)
    assert loss.isnan()
    assert not any(gradient.any() for gradient in gradients)
    assert torch._dynamo.utils.counters["lmhead_pass"]["rewritten"] == 1


@pytest.mark.parametrize("rows", [8, 64])
def test_any_number_of_chunks_is_one_graph(rows):
    compiled = torch.compile(_head, dynamic=None)
    torch._dynamo.reset()
    counts = torch._dynamo.utils.counters
    with lmhead_pass.config.patch(batch_chunk_size=rows):
        for tokens in (20, 33, 8, 7, 65, 128):  # the second is compiled for any
            inputs = _inputs(tokens)
            _assert_right(compiled, inputs)
    assert counts["stats"]["unique_graphs"] == 2
    assert counts["lmhead_pass"]["rewritten"] == 2


@pytest.mark.parametrize("tokens", [0, 4, 13])
@pytest.mark.parametrize("needed", [[True, True, False], [True, False, False]])
def test_fake_results_are_like_real_ones(tokens, needed):
    hidden, weight, target = _inputs(tokens)
    problem = (hidden.detach(), weight.detach(), None, target, *[None] * 5)
    problem += ("mean", -100, 0.0, 1.0, None, "tanh", torch.bfloat16, 4)
    checks = ("test_schema", "test_faketensor")
    ops = torch.ops.lmhead_pass
    for measures in ([], ["logsumexp"], ["max"]):
        arguments = (*problem, needed, measures)
        torch.library.opcheck(ops._forward_and_gradients.default, arguments, test_utils=checks)
    _, _, total, _, *pending = ops._forward_and_gradients(*problem, needed, [])
    if needed[1]:
        given = (total, *pending, torch.ones((), device=DEVICE), VOCAB, torch.bfloat16)
        torch.library.opcheck(ops._finish_weight_gradient.default, given, test_utils=checks)
