"""Losses that no fused form serves, against the unfused model and FP64."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import lmhead_pass

from .. import reference
from ..backend import rewrite
from .losses import LOSSES, entropy_bonus, given_teacher, jensen_shannon, shifted, squared_ratio

B, T, H, V = 3, 7, 16, 128


def inputs(dtype=torch.float32, batch=B, length=T):
    rows = batch, length
    h, w, h2, w2 = (torch.randn(*size, H).to(dtype) for size in (rows, (V,), rows, (V,)))
    y, z = torch.randint(V, rows), torch.randn(*rows, V).to(dtype)
    return h.requires_grad_(), w.requires_grad_(), y, h2.requires_grad_(), w2.requires_grad_(), z


def gradients(function, tensors):
    """The result, and the gradients of those tensors that have one."""
    result = function(*tensors)
    wanted = [t for t in tensors if t.requires_grad]
    found = torch.autograd.grad(result, wanted, allow_unused=True)
    return [result.detach(), *(gradient for gradient in found if gradient is not None)]


def worst_of_orders(function, tensors, exact):
    """Each result of ``function`` as far from the exact one as the order of the hidden dimension
    takes it: where terms cancel, errors of one order say little of those of another."""

    def ordered(tensor, order):
        if tensor.dim() == 0 or tensor.size(-1) != H:
            return tensor
        return tensor.detach()[..., order].requires_grad_(tensor.requires_grad)

    draws = []
    for order in (torch.arange(H), torch.randperm(H), torch.randperm(H), torch.randperm(H)):
        found = gradients(function, [ordered(t, order) for t in tensors])
        draws.append([ordered(result, order.argsort()) for result in found])
    return [
        max(results, key=lambda result: reference.errors([result], [right]))
        for *results, right in zip(*draws, exact, strict=True)
    ]


def check(function, tensors, dtype, unfused=None):
    """Run ``function`` in chunks, and compare with ``unfused``; returns the code of the graph.

    Inductor takes some operations apart: what it compiles is compared with what it compiles.
    """
    graphs = []
    with lmhead_pass.config.patch(batch_chunk_size=5):
        ours = gradients(rewrite(function, graphs), tensors)
    torch._dynamo.reset()
    exact = gradients(function, reference.doubles(tensors))
    with lmhead_pass.disabled():
        unfused = worst_of_orders(unfused or function, tensors, exact)
    assert len(ours) == len(unfused) == len(exact)
    # Of FP64 the exact values have as many roundings themselves.
    roundings = 16 if dtype == torch.float64 else 4
    reference.assert_no_worse(ours, unfused, exact, dtype, roundings)
    assert counters["lmhead_pass"] == {"rewritten": 1}
    assert "linear" not in graphs[1].replace("lmhead_pass.linear", "")
    return graphs[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", LOSSES, ids=lambda f: f.__name__)
def test_loss(function, dtype):
    check(function, inputs(dtype), dtype)


@pytest.mark.parametrize(("batch", "length"), [(1, 7), (7, 1)])
@pytest.mark.parametrize(
    "function", [f for f in LOSSES if f is not shifted], ids=lambda f: f.__name__
)
def test_dimensions_of_size_one(function, batch, length):
    check(function, inputs(batch=batch, length=length), torch.float32)


@pytest.mark.parametrize("function", [given_teacher, entropy_bonus, jensen_shannon])
def test_sums_have_their_gradients_in_the_forward(function):
    assert "lmhead_pass.rowwise_sum" in check(function, inputs(), torch.float32)


def test_results_used_freely_have_theirs_in_the_backward():
    code = check(squared_ratio, inputs(), torch.float32)
    assert "lmhead_pass.rowwise.default" in code
    assert "rowwise_sum" not in code


def test_a_rounding_that_is_none():
    def function(h, w, *_):
        return torch.div(F.linear(h, w), 2.0, rounding_mode=None).std(-1).mean()

    check(function, inputs(), torch.float32)


def rounded(h, w, y, *_):
    """As a head in FP8."""
    z = (F.linear(h, w) / 4).to(torch.float8_e4m3fn).float()
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def test_logits_in_eight_bits_keep_their_rounding():
    tensors = inputs()
    ours, theirs = gradients(rewrite(rounded), tensors), gradients(rounded, tensors)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert counters["lmhead_pass"] == {"rewritten": 1}


@pytest.mark.parametrize("function", [given_teacher, entropy_bonus, squared_ratio])
def test_dynamic_batch(function):
    compiled = rewrite(function)
    for batch in (3, 5, 6):
        h, w, y, h2, w2, z = inputs()
        h, y, h2, z = (t.detach()[:1].repeat(batch, *[1] * (t.dim() - 1)) for t in (h, y, h2, z))
        tensors = h.requires_grad_(), w, y, h2.requires_grad_(), w2, z
        ours, theirs = gradients(compiled, tensors), gradients(function, tensors)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
    assert counters["lmhead_pass"] == {"rewritten": 2}  # the second graph is for any batch


def test_autocast():
    h, w, y, *_ = inputs()

    def function(h, w, y):
        with torch.autocast("cpu", torch.bfloat16):
            logits = F.linear(h, w)
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        return loss + logits.float().std(-1).mean()

    compiled = rewrite(function)
    ours, unfused = gradients(compiled, (h, w, y)), gradients(function, (h, w, y))
    exact = gradients(lambda *t: entropy_free(*t), reference.doubles((h, w, y)))
    assert [t.dtype for t in ours] == [t.dtype for t in unfused]
    reference.assert_no_worse(ours, unfused, exact, torch.bfloat16)


def entropy_free(h, w, y):
    logits = F.linear(h, w)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten()) + logits.std(-1).mean()


def test_frozen_weight_and_no_gradient():
    h, w, y, *_ = inputs()
    frozen = w.detach()

    def function(h, y):
        return F.linear(h, frozen).softmax(-1).square().sum(-1).mean()

    compiled = rewrite(function)
    for ours, theirs in zip(gradients(compiled, (h, y)), gradients(function, (h, y)), strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(compiled(h, y), function(h, y))


def test_minus_infinity_and_nan_are_those_of_eager():
    h, w, y, *_ = inputs()

    def function(h, w, y):
        logits = F.linear(h, w)
        logits = torch.where((y == y[0, 0])[..., None], -torch.inf, logits)
        return logits.softmax(-1).square().sum(-1)

    with lmhead_pass.config.patch(batch_chunk_size=5):
        compiled = rewrite(function)
        ours = compiled(h, w, y)
    theirs = function(h, w, y)
    assert ours.isnan().any()
    assert not ours.isnan().all()
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    upstream = torch.where(theirs.isnan(), 0.0, 1.0)
    for a, b in zip(
        torch.autograd.grad(ours, (h, w), upstream),
        torch.autograd.grad(theirs, (h, w), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_second_derivative_is_an_error():
    h, w, *_ = inputs()
    loss = rewrite(lambda h, w: F.linear(h, w).std(-1).mean())(h, w)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, h, create_graph=True)


def test_empty_batch():
    _, w, *_ = inputs()
    h = torch.randn(0, H, requires_grad=True)
    compiled = rewrite(lambda h, w: F.linear(h, w).std(-1).sum())
    loss = compiled(h, w)
    loss.backward()
    assert loss.item() == 0
    assert h.grad.shape == (0, H)
    assert not w.grad.any()


def test_log_says_what_it_is(caplog):
    with caplog.at_level("INFO", "lmhead_pass"):
        rewrite(given_teacher)(*inputs())
    (line,) = caplog.messages
    assert "chunked: " in line
    assert " operations on each row" in line


def same_twice(h, w):
    z = F.linear(h, w)
    a, b = z.sin().mean(-1), z.sin().mean(-1)
    a.mul_(2)
    return a.sum() + b.square().sum()


def through_a_view(h, w):
    a = F.linear(h, w).sin().mean(-1)
    a.reshape(-1)[:1].mul_(2)
    return a.sum()


def without_its_gradient(h, w):
    a = F.linear(h, w).sin().mean(-1)
    a.detach().mul_(0.5)
    return a.sum()


def behind_another(h, w):
    a = F.linear(h, w).flatten(0, 1).sin().mean(-1)
    b = a * 2
    a[:3].mul_(2)
    return a.sum() + b.sum()


@pytest.mark.parametrize("function", [same_twice, through_a_view, behind_another])
def test_results_that_are_written_to(function):
    """Found by generated programs: what stands for one result is in no memory of another's."""
    h, w, *_ = inputs()
    with lmhead_pass.config.patch(batch_chunk_size=5):
        ours = gradients(rewrite(function), (h, w))
    assert counters["lmhead_pass"] == {"rewritten": 1}
    torch.testing.assert_close(ours, gradients(function, (h, w)))


def test_a_write_through_what_is_detached():
    h, w, *_ = inputs()
    ours = gradients(rewrite(without_its_gradient), (h, w))
    torch.testing.assert_close(ours, gradients(without_its_gradient, (h, w)))


def test_inputs_that_are_written_to_between_two_losses():
    """Found by generated programs: the call stands where both have what they read."""
    h, w, y, *_ = inputs()

    def function(h, w, y):
        y, z = y.clone(), F.linear(h, w)
        spread = z.std(-1).mean()
        y[:, 0] = 3
        return spread + F.cross_entropy(z.flatten(0, 1), y.flatten())

    ours = gradients(rewrite(function), (h, w, y))
    assert counters["lmhead_pass"] == {"rewritten": 1}
    torch.testing.assert_close(ours, gradients(function, (h, w, y)))


def test_what_is_logged_between_two_losses_has_no_gradient():
    h, w, y, *_ = inputs()

    def function(h, w, y):
        z = F.linear(h, w)
        spread = z.std(-1)
        with torch.no_grad():
            largest = spread.amax()
        words = y.clone()
        return spread.mean() + F.cross_entropy(z.flatten(0, 1), words.flatten()), largest

    _, largest = rewrite(function)(h, w, y)
    assert counters["lmhead_pass"] == {"rewritten": 1}
    assert not largest.requires_grad
    torch.testing.assert_close(largest, function(h, w, y)[1])


def test_what_is_made_of_a_loss_under_no_grad_stays_there():
    """It is moved behind a call that stands further down."""

    def function(h, w, y, h2, w2, z):
        logits = F.linear(h, w)
        of_words = torch.stack([row.logsumexp(-1) for row in logits])
        loss = of_words - logits.gather(-1, y.unsqueeze(-1)).squeeze(-1)
        loss = torch.stack(list(loss))
        with torch.no_grad():
            known = loss.mean()
        weights = (y != 0).sum(-1).clamp(min=1)
        return ((loss * (y != 0)).sum(-1) / weights).mean() * known

    check(function, inputs(), torch.float32)


def test_a_teacher_that_is_also_needed_whole():
    h, w, *_, z = inputs()

    def function(h, w, z):
        teacher = z.softmax(-1) + 0.5
        return F.cosine_similarity(F.linear(h, w), teacher, dim=-1).sum()

    torch.testing.assert_close(
        gradients(rewrite(function), (h, w, z)), gradients(function, (h, w, z))
    )


def test_rows_of_rows():
    h, w, *_ = inputs()

    def function(h, w):
        return F.linear(h, w).flatten(0, 1)[1:][::2].std(-1).sum()

    ours = gradients(rewrite(function), (h, w))
    assert counters["lmhead_pass"] == {"rewritten": 1}
    torch.testing.assert_close(ours, gradients(function, (h, w)))


def test_what_is_only_compared_has_no_gradient():
    h, w, *_ = inputs()
    bias = torch.randn(V, requires_grad=True)

    def function(h, w, bias):
        return torch.where(bias > 0.2, F.linear(h, w), -1.0).sum(-1).mean()

    loss = rewrite(function)(h, w, bias)
    assert counters["lmhead_pass"] == {"rewritten": 1}
    assert torch.autograd.grad(loss, (h, bias), allow_unused=True)[1] is None


@pytest.mark.parametrize(
    "tail",
    [
        lambda loss: (1 - loss).mul_(0.75) * 2,
        lambda loss: [loss := 1 - loss, loss.mul_(0.75), loss * 2][-1],
        lambda loss: [loss := loss * 3, loss.mul_(0.75)][0],
        lambda loss: [loss := loss * 3, loss.view(1).mul_(0.75), loss * 2][-1],
        lambda loss: [loss := loss * 3, view := loss.view(1), loss.mul_(0.75), view.sum()][-1],
        lambda loss: [loss := loss * 3, loss.add_(loss.mul_(0.75)), loss * 2][-1],
    ],
    ids=["read", "read_by_its_name", "returned_by_its_name", "by_a_view", "a_view", "twice"],
)
def test_a_sum_of_two_heads_that_is_written_to(tail):
    """Both gradients reach what is read of the memory afterwards, by whatever name."""

    def function(h, w, y, h2, w2, z):
        return tail(F.linear(h, w).std(-1).mean() + F.linear(h2, w2).std(-1).mean())

    tensors = inputs()
    ours = gradients(rewrite(function), tensors)
    assert counters["lmhead_pass"] == {"rewritten": 2}
    for one, other in zip(ours, gradients(function, tensors), strict=True):
        torch.testing.assert_close(one, other)
