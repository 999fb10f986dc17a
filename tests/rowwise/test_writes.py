"""Logits that are written to in chunks: others of their names, and what was read before."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import lmhead_pass

from ..backend import rewrite
from .test_losses import gradients, inputs


def word_put_back(z):
    own = z[..., 7] * 1.0
    z[..., 7] = -30
    return (z - own[..., None]).exp().sum(-1).log().mean()


def word_scaled_by_itself(z):
    factor = z[..., 3].exp()
    z[..., 3] = 0
    return (z * factor[..., None]).std(-1).mean() + factor.mean()


def end_of_text(z):
    eos = z[..., 1].sigmoid()
    z[..., 1] = -1e4
    return (z.log_softmax(-1) + (1 - eos).log()[..., None])[..., 5].sin().mean()


def two_words_swapped(z):
    first = z[..., 0].clone()
    z[..., 0] = z[..., 1]
    z[..., 1] = first
    return (z.sin() * torch.arange(z.size(-1))).std(-1).mean()


def written_by_a_view(z):
    own = z[..., 7]
    twice = own.mul_(2)
    before = z.std(-1)
    return (before + (z - twice[..., None]).std(-1)).mean()


@pytest.mark.parametrize(
    "function",
    [word_put_back, word_scaled_by_itself, end_of_text, two_words_swapped, written_by_a_view],
)
def test_what_was_read_before_a_write_is_of_before(function):
    h, w, *_ = inputs()
    ours = gradients(rewrite(lambda h, w: function(F.linear(h, w))), (h, w))
    torch.testing.assert_close(ours, gradients(lambda h, w: function(F.linear(h, w)), (h, w)))
    assert counters["lmhead_pass"]["rewritten"]


def narrow_logits_widened(h, w):
    z = F.linear(h.bfloat16(), w.bfloat16())
    scaled = z.float()
    scaled.div_(2)
    return (scaled.std(-1) + z.float().std(-1)).mean()


def a_narrow_copy(h, w):
    z = F.linear(h, w)
    low = z.to(torch.bfloat16)
    low.mul_(2)
    return (low.float().std(-1) + z.std(-1)).mean()


def no_copy(h, w):
    z = F.linear(h, w)
    same = z.float()
    same.mul_(2)
    return (same.std(-1) + z.std(-1)).mean()


@pytest.mark.parametrize("function", [narrow_logits_widened, a_narrow_copy, no_copy])
def test_a_cast_is_a_copy_where_the_model_makes_one(function):
    h, w, *_ = inputs()
    ours = gradients(rewrite(function), (h, w))
    torch.testing.assert_close(ours, gradients(function, (h, w)), rtol=2e-2, atol=2e-3)
    assert counters["lmhead_pass"]["rewritten"]


def test_words_of_32_bits():
    h, w, *_ = inputs()
    words = torch.tensor([1, 5], dtype=torch.int32)

    def masked(h, w):
        z = F.linear(h, w)
        z[..., words] = -7.0
        return z.sin().std(-1).mean()

    ours = gradients(rewrite(masked), (h, w))
    torch.testing.assert_close(ours, gradients(masked, (h, w)))


@pytest.mark.parametrize(
    "read",
    [lambda a: a.argsort(-1), lambda a: a.sort(-1)[1], lambda a: a.isfinite().long(),
     lambda a: a.signbit().long(), lambda a: a.clamp(0, 9).long()],
)  # fmt: skip
def test_numbers_that_have_no_gradient_pass_none_on(read):
    h, w, *_ = inputs()
    other = torch.randn_like(w).requires_grad_()

    def chosen(h, w, other):
        return (
            F.linear(h, w).gather(-1, read(F.linear(h.detach(), other))).cumsum(-1).std(-1).mean()
        )

    _, (_, _, gradient) = _results(rewrite(chosen), (h, w, other))
    assert gradient is None


def _results(function, tensors):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    loss = function(*leaves)
    loss.backward()
    return loss, [leaf.grad for leaf in leaves]


def a_temperature_is_fitted(h, w, v):
    with torch.no_grad():
        z = F.linear(h, w)
    z /= v.mean().exp()
    return z


def detached_and_biased(h, w, v):
    z = F.linear(h, w).detach()
    z += v
    return z


def a_frozen_head_and_an_adapter(h, w, v):
    with torch.no_grad():
        z = F.linear(h, w)
    z += (h * 0.5).sum(-1, keepdim=True) * v
    return z


def one_word_written(h, w, v):
    with torch.no_grad():
        z = F.linear(h, w)
    z[..., 3] = v.sum()
    return z


def of_a_part(h, w, v):
    z = F.linear(h, w).detach()
    z[:, 1:].mul_(v)
    return z


@pytest.mark.parametrize("loss", ["fused", "in chunks"])
@pytest.mark.parametrize(
    "logits",
    [a_temperature_is_fitted, detached_and_biased, a_frozen_head_and_an_adapter, one_word_written,
     of_a_part],
)  # fmt: skip
def test_a_gradient_that_is_written_into_detached_logits_ends_there(logits, loss):
    h, w, y, *_ = inputs()
    v = torch.rand(w.size(0)) + 0.5

    def function(h, w, v):
        z = logits(h, w, v)
        if loss == "fused":
            return F.cross_entropy(z.flatten(0, 1), y.flatten())
        return z.sin().std(-1).mean()

    (ours, ours_of), (eager, of_eager) = (
        _results(one, (h, w, v)) for one in (rewrite(function), function)
    )
    torch.testing.assert_close(ours, eager)
    assert [one is None for one in ours_of] == [one is None for one in of_eager]
    for one, other in zip(ours_of, of_eager, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other)


def running_scale(z, buffer):
    buffer.mul_(0.9)
    buffer.add_(z.detach().amax() * 0.1)
    return (z / buffer).std(-1).mean()


def scaled_by_a_statistic(z, buffer):
    spread = z.std(-1)
    buffer.add_(spread.detach().mean())
    return (z * buffer).amax(-1).mean() + spread.mean()


def by_a_view_of_it(z, buffer):
    buffer.view(-1)[0].add_(z.detach().std(-1).mean())
    return (z * buffer).amax(-1).mean()


def of_a_local_tensor(z, buffer):
    local = buffer * 1
    local[...] = z.detach().std(-1).mean()
    return (z * local).amax(-1).mean()


def counts_of_words(z, buffer):
    counts = torch.zeros(z.size(-1))
    words = z.argmax(-1).flatten()
    counts.index_add_(0, words, torch.ones(len(words)))
    return (z - counts).logsumexp(-1).square().mean()


def weights_of_words(z, buffer):
    weights = torch.ones(z.size(-1))
    weights.add_(z.std(-1).detach().mean() * torch.arange(z.size(-1)))
    return F.cross_entropy(z.flatten(0, 1), torch.arange(z.shape[0] * z.shape[1]), weight=weights)


@pytest.mark.parametrize(
    "function",
    [running_scale, scaled_by_a_statistic, by_a_view_of_it, of_a_local_tensor, counts_of_words,
     weights_of_words],
)  # fmt: skip
def test_a_buffer_that_takes_a_statistic_of_the_logits_and_is_read_with_them(function):
    """It holds that statistic when it is read."""
    h, w, *_ = inputs()
    found = []
    for run in (rewrite(lambda h, w, b: function(F.linear(h, w), b)),
                lambda h, w, b: function(F.linear(h, w), b)):  # fmt: skip
        buffer = torch.tensor(0.7)
        found.append(([*_results(lambda h, w, run=run, b=buffer: run(h, w, b), (h, w))], buffer))
    torch.testing.assert_close(*found)


def the_other_is_copied(z, other):
    z.copy_(other)
    return z


def emptied(z, other):
    z.zero_()
    return z + other


def filled(z, other):
    return z.fill_(0.5) * other


def all_words_assigned(z, other):
    z[..., :] = other
    return z


@pytest.mark.parametrize("function", [the_other_is_copied, emptied, filled, all_words_assigned])
def test_what_is_written_over_has_a_gradient_of_0(function):
    """And not None: optimizers tell these apart."""
    h, w, *_ = inputs()
    tensors = (h, w, torch.randn_like(h), torch.randn_like(w))

    def run(h, w, h2, w2):
        return function(F.linear(h, w), F.linear(h2, w2)).std(-1).mean()

    torch.testing.assert_close(_results(rewrite(run), tensors), _results(run, tensors))


def test_a_vocabulary_of_one_word():
    h, w, *_ = inputs()
    function = lambda h, w: F.linear(h, w[:1]).std(-1, correction=0).mean()  # noqa: E731
    with lmhead_pass.config.patch(min_vocab_size=1):
        ours = gradients(rewrite(function), (h, w))
    torch.testing.assert_close(ours, gradients(function, (h, w)))
