"""Consumers that end in one sum: one call, one gradient of the weight, three products."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from .. import forms, reference
from ..backend import rewrite
from ..checks import assert_as_eager
from ..sums.parts import kept, per_token

V = forms.V


def over_pieces_of_logits(h, w, b, y):
    z = F.linear(h, w, b)
    total = 0
    for logits, target in zip(z.chunk(3, dim=1), y.chunk(3, dim=1), strict=True):
        total = total + forms.flat(logits, target, reduction="sum")
    return total / y.numel()


def over_pieces_of_hidden(h, w, b, y):
    """As torchtune and torchtitan have it."""
    losses = []
    for hidden, target in zip(h.split(2, 1), y.split(2, 1), strict=True):
        losses.append(forms.flat(F.linear(hidden, w, b).float(), target, ignore_index=3))
    return torch.stack(losses).mean()


def multi_token_prediction(h, w, b, y):
    total = forms.flat(F.linear(h[:, :-1], w, b), y[:, 1:])
    for step in (2, 3):
        hidden = torch.tanh(h)[:, :-step]
        total = total + 0.3 / step * forms.flat(F.linear(hidden, w, b), y[:, step:])
    return total


def several_losses_of_one_head(h, w, b, y):
    z = F.linear(h, w, b)
    first = forms.flat(z[:, :3], y[:, :3], reduction="sum")
    return first - 2 * forms.flat(z[:, 3:], y[:, 3:], reduction="sum")


def with_others_in_the_sum(h, w, b, y):
    z = F.linear(h, w, b)
    aux = h.square().mean()
    loss = aux + forms.flat(z[0], y[0]) * 0.5
    return -(loss + forms.flat(z[1:], y[1:], label_smoothing=0.0)) + w.sum() / 7


def with_masks(h, w, b, y):
    z = F.linear(h, w, b)
    mask = (y > 20).float()
    losses = [
        (forms.flat(row, target, reduction="none") * kept).sum() / 5
        for row, target, kept in zip(z, y, mask, strict=True)
    ]
    return sum(losses) / len(losses)


def of_log_probabilities(h, w, b, y):
    first = forms.LOG_PROBABILITIES["gather"](F.linear(h[:1], w, b), y[:1])
    second = forms.LOG_PROBABILITIES["gather"](F.linear(h[1:], w, b), y[1:])
    return second.mean() * 0.1 - first.mean()


def logged(h, w, b, y):
    z = F.linear(h, w, b)
    first, second = forms.flat(z[0], y[0]), forms.flat(z[1:], y[1:])
    return first + second, first.detach() * 2, second.detach()


def with_class_weights(h, w, b, y):
    c = torch.linspace(0.5, 2, V, dtype=h.dtype)
    z = F.linear(h, w, b)
    return forms.flat(z[0], y[0], weight=c, ignore_index=3) + forms.flat(
        z[1:], y[1:], weight=c, ignore_index=3
    )


def added_in_place(h, w, b, y):
    total = 0
    for hidden, target in zip(h.split(2, 1), y.split(2, 1), strict=True):
        total += forms.flat(F.linear(hidden, w, b), target, reduction="sum")
    return total / y.numel()


def added_to_a_tensor(h, w, b, y):
    total = torch.zeros((), dtype=h.dtype)
    for row, target in zip(F.linear(h, w, b), y, strict=True):
        total += forms.flat(row, target)
    total /= len(y)
    return total


def stacked_and_weighted(h, w, b, y):
    z = F.linear(h, w, b)
    losses = [forms.flat(row, target) for row, target in zip(z, y, strict=True)]
    return torch.stack(losses).mul(0.5).sum() + h.square().sum()


def stacked_by_keyword(h, w, b, y):
    z = F.linear(h, w, b)
    return torch.stack(tensors=[forms.flat(z[0], y[0]), forms.flat(z[1:], y[1:])]).sum()


def read_before_it_is_added_to(h, w, b, y):
    z = F.linear(h, w, b)
    total = h.sum() * 1
    first = forms.flat(z[0], y[0])
    seen = total * 2
    total += first
    second = forms.flat(z[1:], y[1:])
    return total + second + seen.detach()


def factor_written_afterwards(h, w, b, y):
    z = F.linear(h, w, b)
    factor = torch.ones(())
    first, second = forms.flat(z[0], y[0]), forms.flat(z[1:], y[1:])
    factor.mul_(3)
    return first * factor + second


def total_of_two_names(h, w, b, y):
    z = F.linear(h, w, b)
    first, second = forms.flat(z[0], y[0]), forms.flat(z[1:], y[1:])
    total = other_name = torch.zeros(())
    total += first
    total += second
    return other_name * 2 + h.sum()


def repeated(h, w, b, y):
    z = F.linear(h, w, b)
    five_times = torch.stack([forms.flat(z[0], y[0])]) + torch.zeros(5)
    return five_times.sum() + forms.flat(z[1:], y[1:])


def total_in_a_tensor(h, w, b, y):
    z = F.linear(h, w, b)
    totals = torch.zeros(2)
    total = totals[0]
    total += forms.flat(z[0], y[0])
    total += forms.flat(z[1:], y[1:])
    return totals.sum() + h.sum()


def pieces(h, y):
    return zip(h.split(2, 1), y.split(2, 1), strict=True)


def transposed_in_each(h, w, b, y):
    return sum(forms.flat(hidden @ w.t() + b, target) for hidden, target in pieces(h, y))


def made_in_each(h, w, b, y):
    """Weight, bias and class weights."""
    total = 0
    for hidden, target in pieces(h, y):
        weight, bias = F.normalize(w.double() * 2.0, dim=-1), b.double()[None]
        logits = F.linear(hidden.double(), weight) + bias
        total += forms.flat(logits, target, weight=b.detach().abs().double()).to(h.dtype)
    return total


def of_a_region(h, w, b, y):
    logits = torch.tanh(h).double() @ F.normalize(w).double().t()
    return forms.flat(logits + b.double(), y)


def in_regions(h, w, b, y):
    return sum(
        checkpoint(of_a_region, hidden, w, b, target, use_reentrant=False)
        for hidden, target in pieces(h, y)
    )


JOINED = [
    transposed_in_each,
    made_in_each,
    in_regions,
    total_in_a_tensor,
    factor_written_afterwards,
    total_of_two_names,
    repeated,
    added_in_place,
    read_before_it_is_added_to,
    stacked_by_keyword,
    added_to_a_tensor,
    stacked_and_weighted,
    over_pieces_of_logits,
    over_pieces_of_hidden,
    multi_token_prediction,
    several_losses_of_one_head,
    with_others_in_the_sum,
    with_masks,
    of_log_probabilities,
    logged,
    with_class_weights,
]


@pytest.mark.parametrize("function", JOINED, ids=lambda function: function.__name__)
def test_one_call_for_several_losses(function):
    tensors, graphs = forms.inputs(), []
    compiled = rewrite(function, graphs)
    assert_as_eager(function, tensors, compiled)
    assert counters["lmhead_pass"]["rewritten"] >= 2
    assert graphs[1].count("lmhead_pass.linear_cross_entropy") == 1, graphs[1]


def product(h, w, b, y):
    z = F.linear(h, w, b)
    return forms.flat(z[0], y[0]) * forms.flat(z[1:], y[1:])


def squared(h, w, b, y):
    z = F.linear(h, w, b)
    return forms.flat(z[0], y[0]) ** 2 + forms.flat(z[1:], y[1:])


def used_twice(h, w, b, y):
    z = F.linear(h, w, b)
    first, second = forms.flat(z[0], y[0]), forms.flat(z[1:], y[1:])
    return first + second + first.exp()


def returned_too(h, w, b, y):
    z = F.linear(h, w, b)
    first, second = forms.flat(z[0], y[0]), forms.flat(z[1:], y[1:])
    return first + second, first


def weighted_by_a_parameter(h, w, b, y):
    z = F.linear(h, w, b)
    return forms.flat(z[0], y[0]) * h.sum() + forms.flat(z[1:], y[1:])


def hidden_of_a_loss(h, w, b, y):
    first = forms.flat(F.linear(h, w, b), y)
    return first + forms.flat(F.linear(h * first.detach(), w, b), y)


def of_some_words_and_of_all(h, w, b, y):
    z = F.linear(h, w)
    return forms.flat(z[0, :, :90], y[0].clamp(max=89)) + forms.flat(z[1:], y[1:]) + b.norm()


def target_chosen_by_another_head(h, w, b, y):
    """And by what reads nothing but logits."""
    h, y = h.flatten(0, 1), y.flatten()
    z, other = F.linear(h, w, b), F.linear(h.flip(0), w, b)
    losses = F.cross_entropy(z, y, reduction="none")
    return losses.sum() + F.cross_entropy(other, z.argmax(1), reduction="none").sum()


def written_in_between(h, w, b, y):
    h = h * 1
    first = forms.flat(F.linear(h[0], w.detach()), y[0])
    h = h.detach()
    h.mul_(2)
    return first + forms.flat(F.linear(h[1:], w.detach()), y[1:]) + w.sum() + b.sum()


def read_by_a_transform(h, w, b, y):
    z = F.linear(h, w, b)
    first, second = forms.flat(z[0], y[0]), forms.flat(z[1:], y[1:])
    return first + second + torch.vmap(lambda row: row * first)(torch.arange(3.0)).sum()


def logged_times_what_is_written(h, w, b, y):
    z = F.linear(h, w, b)
    scale = torch.ones(())
    first = forms.flat(z[0], y[0])
    logged = first.detach() * scale
    scale.add_(1)
    return first + forms.flat(z[1:], y[1:]), logged


def logged_in_a_tensor(h, w, b, y):
    z = F.linear(h, w, b)
    logs = torch.zeros(2)
    log = logs[0]
    first = forms.flat(z[0], y[0])
    log += first.detach()
    logged = logs.sum()
    return first + forms.flat(z[1:], y[1:]), logged


def logged_with_out(h, w, b, y):
    z = F.linear(h, w, b)
    log = torch.zeros(())
    first = forms.flat(z[0], y[0])
    torch.mul(first.detach(), 2, out=log)
    logged = log * 3
    return first + forms.flat(z[1:], y[1:]), logged


def target_written_in_between(h, w, b, y):
    y = y.clone()
    first = forms.flat(F.linear(h[:, :-1], w, b), y[:, 1:])
    y.sub_(1).clamp_(min=0)
    return first + forms.flat(F.linear(torch.tanh(h), w, b), y)


def weight_written_in_between(h, w, b, y):
    first, second = w.double(), w.double()
    with torch.no_grad():
        second.mul_(2)
    losses = forms.flat(F.linear(h.double(), first), y), forms.flat(F.linear(h.double(), second), y)
    return (losses[0] + losses[1]).to(h.dtype) + b.sum()


def copy_written_in_between(h, w, b, y):
    first, second = (w * 2).detach(), (w * 2).detach()
    first.mul_(2)
    losses = [forms.flat(F.linear(h, weight, b), y) for weight in (first, second)]
    return losses[0] + losses[1] + w.sum()


def weight_of_another_mode(h, w, b, y):
    with torch.no_grad():
        constant = w * 2
    return forms.flat(F.linear(h, constant, b), y) + forms.flat(F.linear(h, w * 2, b), y)


def other_numbers(h, w, b, y):
    return forms.flat(F.linear(h, w * True, b), y) + forms.flat(F.linear(h, w * 1.0, b), y)


def dropped_words(h, w, b, y):
    weights = F.dropout(w, 0.0), F.dropout(w, 0.0)
    return sum(forms.flat(F.linear(h, weight, b), y) for weight in weights)


APART = [
    weight_written_in_between,
    copy_written_in_between,
    weight_of_another_mode,
    other_numbers,
    dropped_words,
    target_written_in_between,
    read_by_a_transform,
    logged_times_what_is_written,
    logged_in_a_tensor,
    logged_with_out,
    product,
    squared,
    used_twice,
    returned_too,
    weighted_by_a_parameter,
    hidden_of_a_loss,
    of_some_words_and_of_all,
    target_chosen_by_another_head,
    written_in_between,
]


@pytest.mark.parametrize("function", APART, ids=lambda function: function.__name__)
def test_a_call_for_each(function):
    """Where the losses' shares of the gradient are not known before, or not what they read."""
    tensors, graphs = forms.inputs(), []
    compiled = rewrite(function, graphs)
    assert_as_eager(function, tensors, compiled)
    assert graphs[1].count("lmhead_pass.linear_cross_entropy") == 2, graphs[1]
    torch.testing.assert_close(compiled(*tensors), function(*tensors))


def losses_of_pieces(h, w, b, y):
    return [forms.flat(F.linear(hidden, w, b), target) for hidden, target in pieces(h, y)]


def largest(h, w, b, y):
    return torch.stack(losses_of_pieces(h, w, b, y)).amax()


def multiplied(h, w, b, y):
    return torch.stack(losses_of_pieces(h, w, b, y)).prod() / 50


def some_returned_apart(h, w, b, y):
    first, *others = losses_of_pieces(h, w, b, y)
    return first.exp() / 50 + sum(loss**2 for loss in others), *others


@pytest.mark.parametrize(
    "function",
    [largest, multiplied, some_returned_apart],
    ids=lambda function: function.__name__,
)
def test_gradients_that_would_take_more_than_logits(function, passes):
    """In the forward each call would hold a gradient of the weight."""
    tensors, graphs = forms.inputs(), []
    assert_as_eager(function, tensors, rewrite(function, graphs))
    assert graphs[1].count("lmhead_pass.linear_cross_entropy") == 1, graphs[1]
    assert passes == ["forward", "backward"]


def test_gradients_that_take_less_than_logits(passes):
    hidden, weight = (torch.randn(*s, requires_grad=True) for s in ((3, 200, 16), (V, 16)))
    target = torch.randint(V, (3, 200))

    def function(h, w, y):
        return torch.stack([forms.flat(F.linear(h[i], w), y[i]) for i in range(3)]).amax()

    rewrite(function)(hidden, weight, target).backward()
    assert passes == ["forward_and_gradients"] * 3


def both_terms(h, w, b, y):
    """Of two heads."""
    z = [F.linear(h, w), F.linear(h, w.flip(0), b)]
    return [forms.flat(logits, y) for logits in z], [z.logsumexp(-1).square().mean() for z in z]


def heads_in_one_sum(h, w, b, y):
    losses, squares = both_terms(h, w, b, y)
    return torch.stack(losses).mean() + 1e-2 * torch.stack(squares).mean()


def one_head_after_the_other(h, w, b, y):
    losses, squares = both_terms(h, w, b, y)
    return losses[0] + losses[1] + squares[0] + squares[1]


def the_other_head_first(h, w, b, y):
    losses, squares = both_terms(h, w, b, y)
    return losses[0] + losses[1] + squares[1] + squares[0]


def heads_in_turn(h, w, b, y):
    total, weights = 0, (w, w.flip(0))
    for row, target in zip(h, y, strict=True):
        for weight in weights:
            z = F.linear(row, weight, b)
            total += forms.flat(z, target) + 1e-2 * z.logsumexp(-1).square().mean()
    return total


@pytest.mark.parametrize(
    "function",
    [heads_in_one_sum, one_head_after_the_other, the_other_head_first, heads_in_turn],
    ids=lambda function: function.__name__,
)
def test_several_heads(function, passes):
    """Their calls may share a sum, and what is moved."""
    tensors, graphs = forms.inputs(), []
    assert_as_eager(function, tensors, rewrite(function, graphs))
    assert graphs[1].count("lmhead_pass.linear_cross_entropy") == 2, graphs[1]
    assert passes == ["forward_and_gradients"] * 2


def test_the_place_of_another_call_is_not_moved():
    """Past what writes to what that call reads."""
    h, w, b, y = forms.inputs()

    def function(h, w, b, y):
        z, written = F.linear(h, w, b), h * 1
        other = forms.flat(F.linear(written, w + 1), y)
        first = forms.flat(z[0], y[0])
        weighted = other * first.detach()
        written.mul_(2)
        return weighted + first + forms.flat(z[1:], y[1:])

    assert_as_eager(function, (h, w.detach(), b, y), rewrite(function))


def judged_by_a_parameter(h, w, b, y):
    """What is computed without a gradient has none, wherever it is computed."""
    losses = per_token(F.linear(h, w, b), y)
    with torch.no_grad():
        worst = (losses.amax() * b).sum()
        weights = kept(y) / kept(y).sum()
    return (losses * weights).sum() + worst * b.sum()


@pytest.mark.parametrize(
    "function",
    [over_pieces_of_hidden, multi_token_prediction, judged_by_a_parameter],
    ids=lambda f: f.__name__,
)
def test_inductor(function):
    assert_as_eager(function, forms.inputs(), torch.compile(function))


def test_fp16_under_an_autocast_to_bf16():
    """torch.cat under autocast is particular about dtypes."""
    tensors = forms.inputs(torch.float16)

    def function(h, w, b, y):
        with torch.autocast("cpu", torch.bfloat16):
            return over_pieces_of_hidden(h, w, b, y)

    expected = reference.run(function, list(map(reference.leaf, tensors)))
    results = reference.run(rewrite(function), tensors)
    assert counters["lmhead_pass"]["refused"] == 0
    torch.testing.assert_close(results, expected, atol=2e-2, rtol=2e-2)


def test_fp16_head_before_an_autocast_to_bf16():
    tensors = forms.inputs(torch.float16)

    def function(h, w, b, y):
        z = F.linear(h, w, b).float()
        first = forms.flat(z[0], y[0])
        with torch.autocast("cpu", torch.bfloat16):
            return first + forms.flat(z[1:], y[1:])

    expected = reference.run(function, list(map(reference.leaf, tensors)))
    results = reference.run(rewrite(function), tensors)
    assert counters["lmhead_pass"]["refused"] == 0
    torch.testing.assert_close(results, expected, atol=1e-3, rtol=1e-2)


def test_values_beside_the_sum():
    tensors = forms.inputs()
    expected, results = logged(*tensors), rewrite(logged)(*tensors)
    torch.testing.assert_close(results, expected)
    assert [r.requires_grad for r in results] == [True, False, False]


def test_scaled_by_an_upstream_gradient():
    tensors = forms.inputs()

    def function(h, w, b, y):
        return over_pieces_of_hidden(h, w, b, y).exp() * 1024

    assert_as_eager(function, tensors, rewrite(function))
