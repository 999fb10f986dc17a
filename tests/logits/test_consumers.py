"""Who reads the logits beside the loss, and is served in the same pass."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from .. import forms, reference
from ..backend import rewrite
from ..checks import assert_as_eager, check

V = forms.V


def with_loss(measure):
    """The loss, and beside it what ``measure`` makes of the same logits under no_grad."""

    def function(h, w, b, y):
        z = F.linear(h, w, b) * 0.7
        loss = forms.flat(z, y)
        with torch.no_grad():
            return loss, measure(z, y)

    return function


def entropy(z, y):
    log_probs = z.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def entropy_with(raised):
    """With a smallest probability, as many write it to keep the log finite."""

    def measure(z, y):
        p = z.softmax(-1)
        return -(p * raised(p).log()).sum(-1)

    return measure


def entropy_from_logits(z, y):
    """As TRL and verl have it."""
    return torch.logsumexp(z, -1) - (torch.softmax(z, -1) * z).sum(-1)


MEASURES = {
    "accuracy": lambda z, y: (z.argmax(-1) == y).float().mean(),
    "accuracy_of_flat": lambda z, y: (z.view(-1, V).argmax(dim=-1) == y.view(-1)).sum(),
    "accuracy_shifted": lambda z, y: (z[:, :-1].argmax(-1) == y[:, 1:]).float().mean(),
    "argmax_of_probabilities": lambda z, y: z.softmax(-1).argmax(-1, keepdim=True),
    "max": lambda z, y: z.max(dim=-1),
    "max_values": lambda z, y: (z + 3).max(-1)[0],
    "max_indices": lambda z, y: z.max(-1).indices,
    "amax": lambda z, y: z.amax(-1, keepdim=True),
    "logsumexp": lambda z, y: z.logsumexp(-1),
    "entropy": lambda z, y: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1),
    "entropy_mean": lambda z, y: -(z.log_softmax(-1) * F.softmax(z, -1)).sum(-1).mean(),
    "entropy_sum": lambda z, y: (z.log_softmax(-1) * F.softmax(z, -1)).sum(),
    "entropy_from_logits": entropy_from_logits,
    "entropy_of_some": lambda z, y: (z[:, 1:].log_softmax(-1) * F.softmax(z[:, 1:], -1)).sum(),
    "log_probabilities": lambda z, y: F.log_softmax(z, -1).gather(-1, y[..., None]).squeeze(-1),
    "target_logits": lambda z, y: z.gather(-1, y[..., None]).squeeze(-1),
    "top_5": lambda z, y: (z.topk(5, dim=-1).indices == y[..., None]).any(-1).float().mean(),
    "top_3_of_flat": lambda z, y: torch.topk(z.view(-1, V), 3),
    "top_2_values": lambda z, y: (z + 3).topk(2)[0],
    "top_of_slices": lambda z, y: z[:, 1:].topk(4),
    "chosen_of_slices": lambda z, y: torch.stack([row.argmax(-1) for row in z]),
    "entropy_of_log_probabilities": entropy,
    "entropy_of_categorical": lambda z, y: torch.distributions.Categorical(logits=z).entropy(),
    "entropy_by_function": lambda z, y: torch.special.entr(F.softmax(z, -1)).sum(-1),
    "entropy_plus_epsilon": entropy_with(lambda p: p + 1e-12),
    "entropy_clamped": entropy_with(lambda p: p.clamp(min=1e-12)),
    "entropy_mean_of_all": lambda z, y: (z.softmax(-1) * z.softmax(-1).log()).mean(-1),
    "confidence": lambda z, y: z.softmax(-1).max(-1)[0],
    "confidence_by_amax": lambda z, y: torch.softmax(z, -1).amax(-1, keepdim=True),
    "log_confidence": lambda z, y: z.log_softmax(-1).max(-1).values,
    "scaled_confidence": lambda z, y: (2 * z.softmax(-1)).amax(-1),
    "top_3_probabilities": lambda z, y: z.softmax(-1).topk(3),
    "probability_of_target": lambda z, y: z.softmax(-1).gather(-1, y[..., None]).squeeze(-1),
    "is_confident": lambda z, y: (z.softmax(-1).max(-1)[0] > 0.05).float().mean(),
}
# Of all words alike: served where no size is dynamic.
MEANS = {
    "mean_logit": lambda z, y: (z + 2).mean(-1),
    "sum_of_logits": lambda z, y: z.sum(-1, keepdim=True),
    "mean_log_probability": lambda z, y: z.log_softmax(-1).mean(-1),
    "mean_log_probability_of_all": lambda z, y: z.log_softmax(-1).mean(),
    "sum_of_log_probabilities": lambda z, y: z.log_softmax(-1).sum(-1),
    "mean_of_some": lambda z, y: z[:, :-1].mean(),
    "mean_log_probability_of_some": lambda z, y: z[:, :-1].log_softmax(-1).mean(),
}


def detached(result):
    return tuple(map(torch.Tensor.detach, result)) if isinstance(result, tuple) else result.detach()


def with_loss_and_gradients(measure):
    """The same where gradients are recorded, though none gets to what is measured."""

    def function(h, w, b, y):
        z = F.linear(h, w, b) * 0.7
        return forms.flat(z, y), detached(measure(z, y))

    return function


@pytest.mark.parametrize("name", MEASURES | MEANS)
@pytest.mark.parametrize("beside", [with_loss, with_loss_and_gradients])
def test_measures_beside_the_loss(name, beside):
    check_beside(beside((MEASURES | MEANS)[name]), dynamic=False)


@pytest.mark.parametrize("name", MEASURES)
def test_measures_of_dynamic_sizes(name):
    check_beside(with_loss(MEASURES[name]), dynamic=True)


def check_beside(function, dynamic):
    tensors = forms.inputs()
    exact = function(*reference.doubles(tensors))
    leaves = [reference.leaf(t) for t in tensors]
    expected = function(*leaves)
    torch._dynamo.mark_static(tensors[1])
    loss, measured = rewrite(function, dynamic=dynamic)(*tensors)
    assert counters["lmhead_pass"]["refused"] == 0
    assert 1 <= counters["lmhead_pass"]["rewritten"] <= 2
    _assert_close(measured, expected[1], exact[1])
    loss.backward()
    expected[0].backward()
    torch.testing.assert_close(loss, expected[0])
    for ours, theirs in zip(tensors[:3], leaves[:3], strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def _assert_close(results, unfused, exact):
    pairs = [(results, unfused, exact)]
    if isinstance(exact, tuple):
        pairs = list(zip(results, unfused, exact, strict=True))
    for result, other, true in pairs:
        assert (result.dtype, result.shape) == (other.dtype, other.shape)
        assert not result.requires_grad
        if result.is_floating_point():
            reference.assert_no_worse([result], [other], [true.double()], torch.float32)
        else:
            assert torch.equal(result, true)


REACHED = {
    "returned": lambda z, y: z.max(-1)[0],
    "in_the_loss": lambda z, y: 0.01 * entropy(z, y).mean(),
    "written_to_a_buffer": lambda z, y: torch.zeros(y.shape).copy_(z.softmax(-1).amax(-1)).sum(),
}


@pytest.mark.usefixtures("no_regions")
@pytest.mark.parametrize("name", REACHED)
def test_measures_that_a_gradient_reaches_keep_the_logits(name):
    def function(h, w, b, y):
        z = F.linear(h, w, b)
        return forms.flat(z, y) + REACHED[name](z, y).sum()

    tensors = forms.inputs()
    expected = reference.run(function, list(map(reference.leaf, tensors)))
    results = reference.run(rewrite(function), tensors)
    assert counters["lmhead_pass"] == {"refused": 1}
    torch.testing.assert_close(results, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("no_regions")
@pytest.mark.parametrize(
    "raised",
    [lambda p: p + 1e-6, lambda p: p.clamp(min=1e-5), lambda p: p.clamp(1e-12, 0.5)],
)
def test_a_larger_epsilon_is_more_than_rounding(raised):
    rewrite(with_loss(entropy_with(raised)))(*forms.inputs())
    assert counters["lmhead_pass"] == {"refused": 1}


def test_confidence_in_low_precision():
    """A largest logit rounded to BF16 would make probabilities above 1."""
    h, w, b, y = forms.inputs(torch.bfloat16)
    with torch.no_grad():
        w *= 6
    function = with_loss_and_gradients(lambda z, y: z.float().softmax(-1).amax(-1))
    _, measured = rewrite(function)(h, w, b, y)
    exact, unfused = (
        function(*inputs)[1] for inputs in (reference.doubles((h, w, b, y)), (h, w, b, y))
    )
    assert counters["lmhead_pass"] == {"rewritten": 1}
    reference.assert_no_worse([measured], [unfused], [exact.double()], torch.bfloat16)
    assert measured.max() <= 1


def as_in_fairseq(z, y):
    log_probs = F.log_softmax(z, -1).view(-1, V)
    target = y.view(-1, 1)
    nll = -log_probs.gather(dim=-1, index=target)
    smooth = -log_probs.sum(dim=-1, keepdim=True)
    ignored = target.eq(3)
    nll.masked_fill_(ignored, 0.0)
    smooth.masked_fill_(ignored, 0.0)
    share = 0.1 / (log_probs.size(-1) - 1)
    return (0.9 - share) * nll.sum() + share * smooth.sum()


def by_row(z, y):
    log_probs = z.log_softmax(-1)
    return (-0.9 * log_probs.gather(-1, y[..., None])[..., 0] - 0.1 * log_probs.mean(-1)).mean()


SMOOTHED = {
    "as_in_fairseq": as_in_fairseq,
    "by_row": by_row,
    "of_shifted_rows": lambda z, y: by_row(z[:, :-1] * 0.5 - 1, y[:, 1:]),
    "of_few_words": lambda z, y: by_row(z[..., :90], y % 90),
    "beside_cross_entropy": lambda z, y: 0.9 * forms.flat(z, y) - 0.1 * z.log_softmax(-1).mean(),
    "summed": lambda z, y: 0.9 * forms.flat(z, y, reduction="sum") - 1e-3 * z.log_softmax(-1).sum(),
    "of_logits": lambda z, y: forms.flat(z, y) + 0.1 * (z.logsumexp(-1) - z.mean(-1)).mean(),
    "one_hot": lambda z, y: (
        -(F.one_hot(y, V) * z.log_softmax(-1)).sum() / 9 - z.log_softmax(-1).mean()
    ),
}


@pytest.mark.parametrize("name", SMOOTHED)
def test_label_smoothing_by_hand(name):
    """What is linear in log-probabilities takes one call, and three products."""

    def function(h, w, b, y):
        return SMOOTHED[name](F.linear(h, w, b), y)

    graphs = []
    check(function, forms.inputs(), rewrite(function, graphs))
    assert graphs[1].count("lmhead_pass.linear_cross_entropy") == 1
    assert "'none'" not in graphs[1]


@pytest.mark.usefixtures("no_regions")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda z: torch.tanh(z), "after a softcap or mask"),
        (lambda z: z.masked_fill(torch.arange(V) > 90, -torch.inf), "after a softcap or mask"),
    ],
)
def test_means_that_are_no_product(change, reason, caplog):
    with caplog.at_level("INFO", logger="lmhead_pass"):
        rewrite(lambda h, w, b, y: by_row(change(F.linear(h, w, b)), y % 90))(*forms.inputs())
    assert counters["lmhead_pass"] == {"refused": 1}
    assert reason in caplog.text


def test_measures_share_one_call():
    """Accuracy, entropy and log-sum-exp cost no second product."""

    def measure(z, y):
        return (z.argmax(-1) == y).sum(), entropy_from_logits(z, y), z.logsumexp(-1)

    graphs = []
    rewrite(with_loss(measure), graphs)(*forms.inputs())
    assert counters["lmhead_pass"] == {"rewritten": 1}
    assert graphs[1].count("torch.ops.lmhead_pass") == 1


def test_a_measure_that_is_written_to_shares_no_memory():
    def written(z, y):
        first, second = z.argmax(-1), z.argmax(-1)
        first[first > 40] = 0
        return first, second

    tensors, graphs = forms.inputs(), []
    _, expected = with_loss(written)(*tensors)
    _, results = rewrite(with_loss(written), graphs)(*tensors)
    assert graphs[1].count("torch.ops.lmhead_pass") == 1
    torch.testing.assert_close(results, expected)


def test_a_measure_without_a_gradient_beside_losses_with_one():
    def function(h, w, b, y):
        z = F.linear(h, w, b)
        losses = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none")
        return losses, z.detach().logsumexp(-1)

    tensors, graphs = forms.inputs(), []
    results = rewrite(function, graphs)(*tensors)
    assert graphs[1].count("torch.ops.lmhead_pass") == 1
    assert [result.requires_grad for result in results] == [True, False]
    torch.testing.assert_close(results, function(*tensors))


Z_LOSSES = {
    "after": lambda z, y: forms.flat(z, y) + 1e-2 * z.logsumexp(-1).pow(2).mean(),
    "before": lambda z, y: 1e-2 * torch.logsumexp(z, -1).square().mean() + forms.flat(z, y),
    "sum": lambda z, y: forms.flat(z, y, reduction="sum") + (z.logsumexp(-1) ** 2).sum(),
    "masked": lambda z, y: (
        forms.flat(z, y, ignore_index=3)
        + (z.view(-1, V).logsumexp(-1).pow(2) * (y.view(-1) != 3)).mean()
    ),
    "softcapped": lambda z, y: (
        forms.flat(9 * torch.tanh(z / 9) + 1, y)
        + (9 * torch.tanh(z / 9) + 1).logsumexp(-1).square().mean()
    ),
    "none": lambda z, y: (
        forms.flat(z, y, reduction="none") + z.view(-1, V).logsumexp(-1) ** 2
    ).mean(),
    "weighted": lambda z, y: (
        forms.flat(z, y, weight=torch.linspace(0.5, 2, V, dtype=z.dtype))
        + z.logsumexp(-1).square().mean()
    ),
    "smoothed": lambda z, y: (
        forms.flat(z, y, label_smoothing=0.1) + z.logsumexp(-1).square().mean()
    ),
}


@pytest.mark.parametrize("name", Z_LOSSES)
def test_z_loss(name):
    tensors = forms.inputs()

    def function(h, w, b, y):
        return Z_LOSSES[name](F.linear(h, w, b), y)

    exact = reference.run(function, reference.doubles(tensors))
    eager = reference.run(function, list(map(reference.leaf, tensors)))
    graphs = []
    results = reference.run(rewrite(function, graphs), tensors)
    assert counters["lmhead_pass"]["refused"] == 0
    assert graphs[1].count("lmhead_pass.linear_cross_entropy") == 1
    reference.assert_no_worse(results, eager, exact, torch.float32)


def guess_where_unsure(z, y):
    guess = z.argmax(-1)
    return F.cross_entropy(z.flatten(0, 1), torch.where(y > 9, guess, y).flatten())


def guess_of_flat(z, y):
    z = z.flatten(0, 1)
    return F.cross_entropy(z, z.argmax(-1))


@pytest.mark.parametrize("loss", [guess_where_unsure, guess_of_flat])
def test_logits_that_decide_the_target(loss):
    """Self-training: the loss needs the argmax of its own logits first."""

    def function(h, w, b, y):
        return loss(F.linear(h, w, b), y)

    tensors = forms.inputs()
    expected = reference.run(function, list(map(reference.leaf, tensors)))
    results = reference.run(rewrite(function), tensors)
    assert counters["lmhead_pass"]["refused"] == 0
    torch.testing.assert_close(results, expected)


INDEXED = {
    "rows": lambda z, y: z.view(-1, V).log_softmax(-1)[torch.arange(y.numel()), y.flatten()],
    "range": lambda z, y: z.view(-1, V).log_softmax(-1)[range(y.numel()), y.flatten()],
    "list": lambda z, y: z.view(-1, V).log_softmax(-1)[list(range(y.numel())), y.flatten()],
    "cut": lambda z, y: z.view(-1, V)[:, : V - 5].log_softmax(-1)[
        torch.arange(y.numel()), y.flatten()
    ],
    "along": lambda z, y: torch.take_along_dim(z[..., : V - 5].log_softmax(-1), y[..., None], -1),
    "grid": lambda z, y: z.log_softmax(-1)[
        torch.arange(len(y))[:, None], torch.arange(y.size(1)), y
    ],
}


@pytest.mark.parametrize("spelling", INDEXED)
def test_negative_indices_count_from_the_end(spelling):
    def function(h, w, b, y):
        mask = y != -30
        picked = INDEXED[spelling](F.linear(h, w, b), y)
        return -(picked.view(y.shape) * mask).sum() / mask.sum()

    h, w, b, y = forms.inputs()
    y = y % (V - 5)
    y[:, ::3], y[:, 1::4] = -30, -1
    check(function, (h, w, b, y))


@pytest.mark.parametrize(
    "index",
    [
        lambda y: (range(len(y) - 1, -1, -1), y),
        lambda y: ([0, 0, 1], y),
        lambda y: ([0, 1, 2], [5, 1, -1]),
        lambda y: (range(2), y[:2]),
        lambda y: ([1], y),
    ],
)
def test_an_index_that_is_not_one_word_of_each_row(index):
    def function(h, w, y):
        return F.linear(h, w).log_softmax(-1)[index(y)].sum()

    tensors = torch.randn(3, 8), torch.randn(V, 8), torch.tensor([3, -2, 7])
    torch.testing.assert_close(rewrite(function)(*tensors), function(*tensors))
    assert counters["lmhead_pass"] == {"refused": 1}


def test_an_index_before_the_first_word_is_an_error():
    def function(h, w, y):
        return -F.linear(h, w).log_softmax(-1)[torch.arange(len(y)), y].mean()

    h, w = torch.randn(4, 8), torch.randn(V, 8)
    with pytest.raises(IndexError):
        rewrite(function)(h, w, torch.tensor([1, -V - 1, 3, 4]))
    assert counters["lmhead_pass"]["rewritten"] == 1


def test_an_inference_block_inside_another_mode():
    """Behind it, and where it is switched off, gradients are recorded as before."""

    def function(h, w, b, y):
        with torch.inference_mode():
            with torch.inference_mode(False):
                z = F.linear(h, w, b)
                loss = forms.flat(z, y)
            count = y.numel() + F.relu(h.detach()).sum() * 0
        return loss + 1e-3 * z.logsumexp(-1).pow(2).mean(), count

    tensors, graphs = forms.inputs(), []
    expected = function(*map(reference.leaf, tensors))
    results = rewrite(function, graphs)(*tensors)
    assert counters["lmhead_pass"] == {"rewritten": 1}
    torch.testing.assert_close(results, expected)


def smoothed_by_hand(h, w, b, y):
    """A loss of some rows, of which one term is a total, beside a logged one of all."""
    z = F.linear(h, w, b)
    logged = F.cross_entropy(z.detach().flatten(0, 1), y.flatten())
    some = z[:, :-1]
    right = F.cross_entropy(some.flatten(0, 1), y[:, 1:].flatten())
    return 0.9 * right - 0.1 * some.log_softmax(-1).mean(), logged


def totals_of_some_and_all(h, w, b, y):
    z = F.linear(h, w, b)
    words = z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)
    return words.square().mean() + z[1:].log_softmax(-1).sum() * 1e-3 + z[:, 1:].mean()


@pytest.mark.parametrize("function", [smoothed_by_hand, totals_of_some_and_all])
def test_totals_of_some_of_the_rows(function):
    assert_as_eager(function, forms.inputs(), rewrite(function, dynamic=False))
