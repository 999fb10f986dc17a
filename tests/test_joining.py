"""Consumers that end in one sum: one call, one gradient of the weight, three products."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

import lmhead_pass
from lmhead_pass.op.kernels import aten_loop as aten

from . import forms, reference
from .backend import rewrite
from .test_rewriting import inputs

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


JOINED = [
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


def first_of(function):
    def run(*args):
        result = function(*args)
        return result[0] if isinstance(result, tuple) else result

    return run


def assert_as_eager(function, tensors, compiled):
    exact = reference.run(first_of(function), [reference.leaf(t, _double(t)) for t in tensors])
    eager = reference.run(first_of(function), list(map(reference.leaf, tensors)))
    results = reference.run(first_of(compiled), tensors)
    assert counters["lmhead_pass"]["refused"] == 0
    reference.assert_no_worse(results, eager, exact, torch.float32)


@pytest.mark.parametrize("function", JOINED, ids=lambda function: function.__name__)
def test_one_call_for_several_losses(function):
    tensors, graphs = inputs(), []
    compiled = rewrite(function, graphs)
    assert_as_eager(function, tensors, compiled)
    assert counters["lmhead_pass"]["rewritten"] >= 2
    assert graphs[1].count("lmhead_pass.linear_cross_entropy") == 1, graphs[1]


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
    assert_as_eager(function, inputs(), torch.compile(function))


def test_fp16_under_an_autocast_to_bf16():
    """torch.cat under autocast is particular about dtypes."""
    tensors = inputs(torch.float16)

    def function(h, w, b, y):
        with torch.autocast("cpu", torch.bfloat16):
            return over_pieces_of_hidden(h, w, b, y)

    expected = reference.run(function, list(map(reference.leaf, tensors)))
    results = reference.run(rewrite(function), tensors)
    assert counters["lmhead_pass"]["refused"] == 0
    torch.testing.assert_close(results, expected, atol=2e-2, rtol=2e-2)


def test_fp16_head_before_an_autocast_to_bf16():
    tensors = inputs(torch.float16)

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
    tensors = inputs()
    expected, results = logged(*tensors), rewrite(logged)(*tensors)
    torch.testing.assert_close(results, expected)
    assert [r.requires_grad for r in results] == [True, False, False]


def test_scaled_by_an_upstream_gradient():
    tensors = inputs()

    def function(h, w, b, y):
        return over_pieces_of_hidden(h, w, b, y).exp() * 1024

    assert_as_eager(function, tensors, rewrite(function))


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


def total_in_a_tensor(h, w, b, y):
    z = F.linear(h, w, b)
    totals = torch.zeros(2)
    total = totals[0]
    total += forms.flat(z[0], y[0])
    total += forms.flat(z[1:], y[1:])
    return totals.sum() + h.sum()


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


APART = [
    target_written_in_between,
    total_in_a_tensor,
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
    tensors, graphs = inputs(), []
    compiled = rewrite(function, graphs)
    assert_as_eager(function, tensors, compiled)
    assert graphs[1].count("lmhead_pass.linear_cross_entropy") == 2, graphs[1]
    torch.testing.assert_close(compiled(*tensors), function(*tensors))


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
    tensors, graphs = inputs(), []
    assert_as_eager(function, tensors, rewrite(function, graphs))
    assert graphs[1].count("lmhead_pass.linear_cross_entropy") == 2, graphs[1]
    assert passes == ["forward_and_gradients"] * 2


def test_the_place_of_another_call_is_not_moved():
    """Past what writes to what that call reads."""
    h, w, b, y = inputs()

    def function(h, w, b, y):
        z, written = F.linear(h, w, b), h * 1
        losses = forms.flat(F.linear(written, w + 1), y, reduction="none")
        first = forms.flat(z[0], y[0])
        weighted = (losses * first.detach()).sum()
        written.mul_(2)
        return weighted + first + forms.flat(z[1:], y[1:])

    assert_as_eager(function, (h, w.detach(), b, y), rewrite(function))


def nll_by_hand(z, y):
    return z.logsumexp(-1) - z.gather(-1, y.unsqueeze(-1)).squeeze(-1)


def in_one_row(z, y):
    return forms.flat(z, y, reduction="none")


def per_token(z, y):
    return in_one_row(z, y).view(y.shape)


def kept(y, dtype=torch.float32):
    return (y > 20).to(dtype)


def metrics(losses, y):
    """Of losses that go into a sum, too."""
    return losses.detach().max(), losses.mean().detach(), (losses.detach() * kept(y)).sum(-1)


KNOWN = {
    "z_loss": lambda z, y: forms.flat(z, y) + 1e-2 * z.logsumexp(-1).pow(2).mean(),
    "z_loss_of_counted": lambda z, y: (
        forms.flat(z, y, ignore_index=3)
        + 1e-2 * (z.logsumexp(-1).square() * (y != 3)).sum() / (y != 3).sum()
    ),
    "z_loss_by_row": lambda z, y: (
        ((per_token(z, y) + 1e-2 * torch.logsumexp(z, -1) ** 2) * kept(y)).sum() / kept(y).sum()
    ),
    "z_loss_kept_dim": lambda z, y: (
        forms.flat(z, y, reduction="sum") - torch.logsumexp(z, -1, keepdim=True).square().sum() / 9
    ),
    "z_loss_of_a_product": lambda z, y: (
        (lambda lse: lse * lse)(z.logsumexp(-1)).mean() * 0.1
        + (z.logsumexp(-1).float() ** 2.0).mean(1).sum()
        + forms.flat(z, y)
    ),
    "z_loss_moved": lambda z, y: (
        forms.flat(3 * torch.tanh(z / 3) + 2, y)
        + (3 * torch.tanh(z / 3) + 2).logsumexp(-1).square().mean()
    ),
    "z_loss_alone": lambda z, y: z.logsumexp(-1).square().mean(),
    "z_loss_of_other_rows": lambda z, y: (
        nll_by_hand(z[1:], y[1:]).sum() + z[:, 2:].logsumexp(-1).square().sum()
    ),
    "z_loss_and_a_frozen_loss": lambda z, y: (
        z.logsumexp(-1).square().mean() + forms.flat(z.detach(), y, ignore_index=3)
    ),
    "with_a_measure": lambda z, y: (
        forms.flat(z, y) + 1e-2 * z.logsumexp(-1).pow(2).mean() + z.detach().amax(-1).mean()
    ),
    "measured_later": lambda z, y: (
        forms.flat(z, y) + 1e-2 * z.logsumexp(-1).pow(2).mean(),
        (z.argmax(-1) == y).float().mean(),
    ),
    "logsumexp_mean": lambda z, y: forms.flat(z, y) + 0.1 * z.logsumexp(-1).mean(),
    "by_hand": lambda z, y: nll_by_hand(z, y).mean(),
    "by_hand_masked": lambda z, y: -(-nll_by_hand(z, y) * kept(y)).sum() / kept(y).sum(),
    "by_hand_and_z_loss": lambda z, y: (
        nll_by_hand(z, y).mean() + 1e-2 * z.logsumexp(-1).square().mean()
    ),
    "gathered_masked": lambda z, y: (
        -(z.log_softmax(-1).gather(-1, y.unsqueeze(-1))[..., 0] * kept(y)).sum() / kept(y).sum()
    ),
    "gathered_kept_dim": lambda z, y: -z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).sum(1).mean(),
    "some_of_the_losses": lambda z, y: (per_token(z, y)[:, 1:] * kept(y)[:, 1:]).mean(),
    "every_other": lambda z, y: per_token(z, y).view(-1)[1::2].view(2, -1)[:, None].sum(2).mean(),
    "one_row_of_losses": lambda z, y: per_token(z, y)[1].sum() / 3 + per_token(z, y)[0, 2:].mean(),
    "logged_by_row": lambda z, y: (
        lambda losses: ((losses * kept(y)).sum() / kept(y).sum(), *metrics(losses, y))
    )(per_token(z, y)),
    "mean_over_no_dim_is_over_all": lambda z, y: per_token(z, y).mean(dim=[]),
    "weighted_before_the_square": lambda z, y: (
        forms.flat(z, y) + (kept(y) * z.logsumexp(-1)).square().mean()
    ),
    "negated_masked_and_sliced_before_the_square": lambda z, y: (
        forms.flat(z, y)
        + (-0.1 * z.logsumexp(-1)).masked_fill(y > 40, 0)[:, 1:].pow(2).mul(kept(y)[:, 1:]).sum()
    ),
    "rows_of_losses_added_to_groups": lambda z, y: (
        per_token(z, y).new_zeros(2, y.size(1)).index_add(0, y[:, 0] % 2, per_token(z, y))
        / torch.arange(1, 3)[:, None]
    ).sum(),
    "logged_sum": lambda z, y: (
        lambda total: (total / y.numel(), total.detach(), total.exp().detach())
    )(per_token(z, y).sum()),
}


def measured_without_gradient(z, y):
    loss, lse = forms.flat(z, y), z.logsumexp(-1)
    with torch.no_grad():
        accuracy = (z.argmax(-1) == y).float().mean()
        scaled = lse.mean() * 2
    return loss + 1e-2 * lse.pow(2).mean(), accuracy, scaled


def weighted_without_gradient(z, y):
    losses = per_token(z, y)
    with torch.no_grad():
        weights = kept(y) / kept(y).sum()
    return (losses * weights).sum(), losses.detach().amax(1)


def viewed_without_gradient(z, y):
    losses = per_token(z, y)[:, 1:]
    with torch.no_grad():
        known = losses[1:]
    return losses.mean() + known.sum()


def judged_without_gradient(z, y):
    losses = per_token(z, y)
    with torch.no_grad():
        worst = losses.amax(1)
    weights = kept(y) / kept(y).sum()
    return (losses * weights).sum(), worst


def judged_and_weighted_without_gradient(z, y):
    losses, lse = per_token(z, y), z.logsumexp(-1)
    with torch.no_grad():
        worst = losses.amax(1) - lse.amax()
        weights = kept(y) / kept(y).sum()
    return (losses * weights).sum() + lse.pow(2).mean(), worst.exp()


def viewed_as_the_target_is_not(z, y):
    losses = F.cross_entropy(z.permute(1, 2, 0), y.t(), reduction="none")
    return losses.view(-1).sum() / 4, losses.detach().amax()


KNOWN |= {
    f.__name__: f
    for f in (
        measured_without_gradient,
        weighted_without_gradient,
        judged_without_gradient,
        judged_and_weighted_without_gradient,
        viewed_as_the_target_is_not,
    )
}


def weights_written_afterwards(z, y):
    losses, weights = per_token(z, y), kept(y)
    worst = losses.detach().amax()
    weights.mul_(0.5)
    return (losses * weights).sum(), worst


def weights_written_from_the_losses(z, y):
    losses, weights = per_token(z, y), torch.zeros(y.shape)
    weights.copy_(losses.detach())
    return (losses * weights).sum(), losses.detach().amax()


def square_of_what_was_written(z, y):
    lse = z.logsumexp(-1).clone()
    lse.detach().add_(5)
    return lse.square().mean() + forms.flat(z, y)


def sum_of_two_names(z, y):
    losses, worst = per_token(z, y), per_token(z, y).detach().amax()
    total = other_name = torch.zeros(y.shape)
    total += losses
    return total.sum() + 3 * other_name.sum() + losses.detach().amax(), worst


def imaginary(z, y):
    losses = per_token(z, y)
    return (losses * 1j).sum().imag, losses.detach().amax()


def through_a_transform(z, y):
    losses = per_token(z, y)
    return losses.sum() + torch.vmap(lambda row: row * 2)(losses).sum()


def masked_in_place(z, y):
    losses = per_token(z, y)
    losses.mul_(kept(y))
    losses.div_(kept(y).sum())
    return losses.sum()


def set_to_zero(z, y):
    losses, dropped = in_one_row(z, y), y.flatten() <= 20
    losses[~dropped] = 0.0
    losses[2:4] = 1
    return losses.sum() / dropped.sum()


def put_into_a_tensor(z, y):
    total = torch.zeros(y.shape)
    for number, (row, target) in enumerate(zip(z, y, strict=True)):
        total[number] = F.cross_entropy(row, target, reduction="none")
    return (total * kept(y)).sum() / kept(y).sum()


def read_before_and_after_a_write(z, y):
    losses = per_token(z, y)
    before = losses.mean()
    losses *= kept(y)
    return before + losses.sum()


def weights_made_in_place(z, y):
    losses, weights = per_token(z, y), torch.ones(y.shape)
    weights[:, 0] = 0.5
    return (losses * weights).sum() / weights.sum(), losses.detach().amax()


def mask_as_the_losses(z, y):
    losses = per_token(z, y)
    mask = (y > 20).type_as(losses)
    return (losses * mask).sum() / mask.sum(), losses.detach().amax(), mask


def weights_like_the_losses(z, y):
    losses = per_token(z, y)
    weights = torch.ones_like(losses)
    weights[y > 50] = 0.5
    return (losses * weights).sum() / weights.sum()


def counted_like_the_losses(z, y):
    losses, sequence = per_token(z, y).mean(0), torch.tensor([0, 0, 0, 1, 1, 2, 2])
    zeros = losses.new_zeros(3)
    counts = zeros.index_add(0, sequence, torch.ones_like(losses))
    return (zeros.index_add(0, sequence, losses) / counts).sum() / losses.numel()


def packed_by_index_add(z, y):
    sequence = torch.arange(y.numel()) // 8
    losses = in_one_row(z, y)
    totals = torch.zeros(3, dtype=losses.dtype).index_add_(0, sequence, losses)
    return (totals / torch.tensor([8, 8, 5])).mean()


def packed_by_an_index_made_in_place(z, y):
    lengths, losses = torch.tensor([7, 9, 5]), in_one_row(z, y)
    worst = losses.detach().amax()
    sequence = torch.arange(y.numel()) // 8
    sequence[3] = 1
    return (losses.new_zeros(3).index_add(0, sequence, losses) / lengths).mean(), worst


def packed_by_scatter_add(z, y):
    sequence = torch.tensor([0, 0, 0, 1, 1, 2, 2]).expand(y.shape)
    zeros, mask = torch.zeros(len(y), 3, dtype=z.dtype), kept(y, z.dtype)
    counts = zeros.scatter_add(1, sequence, mask)
    totals = zeros.scatter_add(1, sequence, per_token(z, y) * mask)
    return (totals / counts.clamp(min=1)).mean()


def packed_by_length(z, y):
    parts = in_one_row(z, y).split([5, 9, 7])
    return torch.stack([part.mean() for part in parts]).mean(), parts[1].detach()


def prompt_and_answer(z, y):
    losses, prompt = per_token(z, y), 1 - kept(y)
    parts = [(losses * mask).sum() / mask.sum() for mask in (prompt, kept(y))]
    return parts[1] + 0.1 * parts[0], *(part.detach() for part in parts)


def by_sequence_in_turn(z, y):
    pairs = zip(per_token(z, y), kept(y), strict=True)
    return sum((losses * mask).sum() / mask.sum() for losses, mask in pairs)


def one_logsumexp_for_both(z, y):
    lse = z.logsumexp(-1)
    losses = lse - z.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    return ((losses + 1e-3 * lse**2) * kept(y)).sum() / kept(y).sum()


def sum_written_by_another_name(z, y):
    losses, total = per_token(z, y), torch.zeros(())
    name = total
    name += (losses * kept(y)).sum()
    clamped = name.clamp_(max=3.0)
    return clamped * 1, total.detach() * 1, losses.detach().amax()


def put_into_a_longer_shape(z, y):
    losses, total = in_one_row(z, y), torch.zeros(2, y.numel())
    total[0] = losses.view(1, -1)
    return total.sum() / 2, losses.detach().amax()


def losses_of_rows(z, y, reduction="none"):
    pairs = zip(z, y, strict=True)
    return [F.cross_entropy(row, target, reduction=reduction) for row, target in pairs]


KNOWN |= {
    f.__name__: f
    for f in (
        masked_in_place,
        set_to_zero,
        put_into_a_tensor,
        read_before_and_after_a_write,
        packed_by_index_add,
        packed_by_an_index_made_in_place,
        packed_by_scatter_add,
        packed_by_length,
        prompt_and_answer,
        by_sequence_in_turn,
        one_logsumexp_for_both,
        sum_of_two_names,
        weights_written_afterwards,
        weights_made_in_place,
        mask_as_the_losses,
        weights_like_the_losses,
        counted_like_the_losses,
        put_into_a_longer_shape,
    )
} | {
    "dot": lambda z, y: torch.dot(kept(y, z.dtype).view(-1), in_one_row(z, y)),
    "inner": lambda z, y: torch.inner(in_one_row(z, y), kept(y, z.dtype).view(-1)),
    "matrix_times_weights": lambda z, y: (per_token(z, y) @ kept(y, z.dtype)[0]).mean(),
    "weights_times_matrix": lambda z, y: (kept(y, z.dtype)[:, 0] @ per_token(z, y)).mean(),
    "matrix_times_matrix": lambda z, y: (per_token(z, y).t() @ kept(y, z.dtype)).mean(),
    "packed_by_product": lambda z, y: (
        lambda hot: (hot.t() @ in_one_row(z, y) / hot.sum(0)).mean()
    )(F.one_hot(torch.arange(y.numel()) // 8, 3).to(z.dtype)),
    "packed_by_one_hot": lambda z, y: (
        lambda hot: ((per_token(z, y)[..., None] * hot).sum((0, 1)) / hot.sum((0, 1))).mean()
    )(F.one_hot(torch.tensor([0, 0, 0, 1, 1, 2, 2]).expand(y.shape), 3).float()),
    "einsum": lambda z, y: (
        torch.einsum("bs,bs->", per_token(z, y), kept(y, z.dtype)) / kept(y).sum()
    ),
    "einsum_by_sequence": lambda z, y: (
        torch.einsum("bs, bs -> b", kept(y, z.dtype), per_token(z, y)) / kept(y).sum(1)
    ).mean(),
    "where_zeros_like": lambda z, y: (
        lambda losses: torch.where(y > 20, losses, torch.zeros_like(losses)).sum() / kept(y).sum()
    )(per_token(z, y)),
    "where_it_counts_less": lambda z, y: (
        lambda losses: torch.where(y > 20, losses, 0.1 * losses).mean()
    )(per_token(z, y)),
    "where_it_is_detached": lambda z, y: (
        lambda losses: torch.where(y > 20, losses, losses.detach()).mean()
    )(per_token(z, y)),
    "filled_with_one": lambda z, y: per_token(z, y).masked_fill(y > 20, 1).mean(),
    "transposed": lambda z, y: (per_token(z, y).t()[1:] * kept(y).t()[1:]).sum(),
    "cut_and_joined": lambda z, y: (
        (torch.cat(losses_of_rows(z, y)) * kept(y).flatten()).sum() / kept(y).sum()
    ),
    "mean_times_a_mask": lambda z, y: (forms.flat(z, y) * kept(y)).sum() / kept(y).sum(),
    "rows_in_a_stack": lambda z, y: (torch.stack(losses_of_rows(z, y)) * kept(y)).mean(),
    "means_in_a_stack": lambda z, y: (
        torch.stack(losses_of_rows(z, y, "mean")) * torch.tensor([0.2, 0.3, 0.5])
    ).sum(),
    "two_means": lambda z, y: (
        lambda losses: losses[:, :3].mean() + 0.3 * losses[:, 3:].mean() + losses.sum() / 9
    )(per_token(z, y)),
    "chosen_twice": lambda z, y: per_token(z, y).view(-1)[torch.tensor([1, 3, 3])].mean(),
    "chosen_by_index": lambda z, y: per_token(z, y).index_select(1, torch.tensor([5, 1])).sum(),
    "gathered": lambda z, y: per_token(z, y).gather(1, torch.tensor([[1], [3], [2]])).mean(),
    "added_constant": lambda z, y: ((per_token(z, y) - 2) * kept(y)).sum() + 1,
    "indexed_with_true": lambda z, y: per_token(z, y)[True].sum(),
    "total_of_one_element": lambda z, y: (
        (torch.zeros(1) + forms.flat(z, y)).squeeze()
        + (per_token(z[:1], y[:1]).sum() / torch.tensor([9])).sum()
    ),
}


def written_without_gradient(z, y):
    losses = per_token(z, y)
    with torch.no_grad():
        losses.mul_(2)
    return losses.sum()


def written_by_another_name(z, y):
    losses = per_token(z, y)
    flat = losses.view(-1)
    losses.mul_(kept(y))
    return flat.sum()


def set_where_it_is_large(z, y):
    losses = per_token(z, y)
    losses[losses.detach() > 4.5] = 0
    return losses.mean()


def square_of_what_was_put_and_written(z, y):
    lse, held = z.logsumexp(-1), torch.zeros(y.shape)
    held[:] = lse
    held.detach().add_(1)
    return held.square().mean() + forms.flat(z, y)


def others_shaped_as_losses(z, y):
    losses = per_token(z, y)
    return losses.sum() + losses.mean(1, keepdim=True).square().expand_as(losses).sum()


def part_written(z, y):
    losses = per_token(z, y)
    losses[0].mul_(3)
    return losses.mean()


def noted_in_a_tensor_without_gradient(z, y):
    losses, notes = per_token(z, y), torch.zeros(2)
    with torch.no_grad():
        notes[0] = losses.mean()
        first, _ = losses.split(2)
    weights = kept(y) / kept(y).sum()
    return (losses * weights).sum(), notes * 2, first.detach()


def logged_under_autocast(z, y):
    with torch.autocast("cpu", torch.bfloat16):
        losses = in_one_row(z, y)
        logged = losses.detach() @ losses.detach()
    return (losses * kept(y).flatten()).sum(), logged


def ones_with_strides_of_the_losses(z, y):
    losses = per_token(z, y)
    ones = torch.ones_like(losses.t()).t().view(-1)
    return (losses.view(-1) * ones).sum() / 2, losses.detach().amax()


UNKNOWN = {
    "added_to_itself": lambda z, y: (lambda losses: torch.add(losses, losses).mean())(
        per_token(z, y)
    ),
    **{
        f.__name__: f
        for f in (
            written_without_gradient,
            written_by_another_name,
            set_where_it_is_large,
            square_of_what_was_put_and_written,
            others_shaped_as_losses,
            part_written,
            noted_in_a_tensor_without_gradient,
            logged_under_autocast,
            ones_with_strides_of_the_losses,
        )
    },
    "chosen_by_size": lambda z, y: per_token(z, y).flatten().topk(5)[0].mean(),
    "finite_ones": lambda z, y: per_token(z, y).nanmean(),
    "weighted_by_their_likelihood": lambda z, y: (
        lambda losses: (losses * losses.detach().neg().exp()).mean()
    )(per_token(z, y)),
    "product_with_itself": lambda z, y: (lambda losses: losses @ losses)(per_token(z, y).view(-1)),
    "in_another_order": lambda z, y: (
        forms.flat(z, y) + (z.transpose(0, 1).logsumexp(-1) * kept(y).t()).mean()
    ),
    "cast_like_the_losses": lambda z, y: (
        lambda losses: losses.mean() + z.logsumexp(-1).type_as(losses).mean()
    )(per_token(z, y)),
    "inverted": lambda z, y: (kept(y) / per_token(z, y)).mean(),
    "einsum_of_a_sum": lambda z, y: torch.einsum("bs,b->", per_token(z, y), kept(y, z.dtype)[:, 0]),
    "einsum_that_repeats": lambda z, y: torch.einsum(
        "bs,bs->", per_token(z[:1], y[:1]), kept(y, z.dtype)
    ),
    "where_either": lambda z, y: (
        lambda losses: torch.where(losses > 4.5, losses, 0.1 * losses).mean()
    )(per_token(z, y)),
    "viewed_without_gradient": viewed_without_gradient,
    **{
        f.__name__: f
        for f in (
            weights_written_from_the_losses,
            square_of_what_was_written,
            imaginary,
            through_a_transform,
        )
    },
    "ratio": lambda z, y: (nll_by_hand(z, y).neg().exp() * kept(y)).mean(),
    "returned_by_row": lambda z, y: (
        lambda losses: ((losses * kept(y)).sum() / kept(y).sum(), losses)
    )(per_token(z, y)),
    "z_loss_returned_too": lambda z, y: (lambda extra: (forms.flat(z, y) + extra, extra))(
        1e-2 * z.logsumexp(-1).pow(2).mean()
    ),
    "squared_losses": lambda z, y: per_token(z, y).square().mean(),
    "cubed_logsumexp": lambda z, y: forms.flat(z, y) + 1e-3 * (z.logsumexp(-1) ** 3).mean(),
    "fourth_power": lambda z, y: forms.flat(z, y) + 1e-4 * z.logsumexp(-1).pow(2).pow(2).mean(),
    "shifted_before_the_square": lambda z, y: (
        forms.flat(z, y) + (kept(y) * z.logsumexp(-1) + kept(y)).square().mean()
    ),
    "summed_before_the_square": lambda z, y: (
        forms.flat(z, y) + 1e-3 * z.logsumexp(-1).sum(1).square().mean()
    ),
    "weighted_by_itself": lambda z, y: (lambda losses: (losses * (losses.detach() > 4)).mean())(
        per_token(z, y)
    ),
}


@pytest.fixture
def passes(monkeypatch):
    """Which functions of the chunk loop run, one after the other."""
    names = []

    def recorded(name):
        function = getattr(aten, name)

        def run(*arguments):
            names.append(name)
            return function(*arguments)

        return run

    for name in ("forward", "forward_and_gradients", "backward"):
        monkeypatch.setattr(aten, name, recorded(name))
    return names


def assert_form_as_eager(form, passes):
    tensors = inputs()

    def function(h, w, b, y):
        return form(F.linear(h, w, b), y)

    compiled = rewrite(function)
    assert_as_eager(function, tensors, compiled)
    of_a_step = list(passes)
    results, expected = compiled(*tensors), function(*tensors)
    torch.testing.assert_close(results, expected)
    gradients = [[t.requires_grad for t in tree_leaves(values)] for values in (results, expected)]
    assert gradients[0] == gradients[1]
    return of_a_step


@pytest.mark.parametrize("name", KNOWN)
def test_three_products(name, passes):
    """One call computes the gradients, in the forward; what has none may have another."""
    of_a_step = assert_form_as_eager(KNOWN[name], passes)
    assert of_a_step.count("forward_and_gradients") == 1
    assert "backward" not in of_a_step


@pytest.mark.parametrize("name", UNKNOWN)
def test_four_products(name, passes):
    """What a row counts for is not known in the forward, or not by the pass."""
    assert "backward" in assert_form_as_eager(UNKNOWN[name], passes)


def test_a_sum_that_is_written_by_another_name():
    def function(h, w, b, y):
        return sum_written_by_another_name(F.linear(h, w, b), y)

    tensors = inputs()
    compiled = rewrite(function)
    torch.testing.assert_close(compiled(*tensors), function(*tensors))
    assert counters["lmhead_pass"]["refused"] == 0


@pytest.mark.parametrize("is_clamped", [False, True])
def test_a_sum_in_an_argument_keeps_its_gradient(is_clamped):
    """Where the caller finds it."""

    def function(h, w, b, y, total):
        total += (per_token(F.linear(h, w, b), y) * kept(y)).sum()
        if is_clamped:
            total.clamp_(max=500.0)
        return total * 2

    results = []
    tensors = inputs()
    for run in (function, rewrite(function)):
        leaves, total = list(map(reference.leaf, tensors)), torch.tensor(2.0)
        run(*leaves, total)
        total.backward()
        results.append([total.detach(), *(leaf.grad for leaf in leaves[:3])])
    assert counters["lmhead_pass"]["refused"] == 0
    torch.testing.assert_close(*results)


def test_weights_in_a_product_are_not_rounded_by_autocast():
    """The call may be in one, where the product was not."""
    tensors = inputs()

    def function(h, w, b, y):
        losses = F.cross_entropy(F.linear(h, w, b).mT, y, reduction="none")
        with torch.autocast("cpu", torch.bfloat16):
            weights = torch.linspace(0.013, 1.7, 21, dtype=h.dtype).view(7, 3) * 1.01
        return (losses @ weights).sum() / 3, losses.detach().amax()

    assert_as_eager(function, tensors, rewrite(function))


def test_z_loss_in_float16(passes):
    tensors = inputs(torch.float16)

    def function(h, w, b, y):
        return KNOWN["z_loss"](F.linear(h, w, b), y)

    expected = reference.run(function, list(map(reference.leaf, tensors)))
    results = reference.run(rewrite(function), tensors)
    assert passes == ["forward_and_gradients"]
    torch.testing.assert_close(results, expected, atol=1e-2, rtol=1e-2)


def test_failure_after_nodes_were_moved_leaves_the_graph_alone(monkeypatch):
    def fail(*_):
        raise ArithmeticError("on purpose")

    def function(h, w, b, y):
        return judged_and_weighted_without_gradient(F.linear(h, w, b), y)

    monkeypatch.setattr("lmhead_pass.rewrite.rewriter.emit_root", fail)
    tensors, graphs = inputs(), []
    with lmhead_pass.config.patch(strict=False):
        results = rewrite(function, graphs)(*tensors)
    assert counters["lmhead_pass"] == {"failed": 1}
    assert graphs[0] == graphs[1]
    torch.testing.assert_close(results, function(*tensors))


def written_after_the_sum(losses, weights):
    total = (losses * weights).sum()
    weights.mul_(0.5)
    return total


def written_before_the_sum(losses, weights):
    weighted = losses * weights
    weights.mul_(0.5)
    return weighted.sum()


def written_between_two_sums(losses, weights):
    return written_after_the_sum(losses, weights) + (losses * (torch.arange(7) % 3)).sum()


@pytest.mark.parametrize(
    "weighted", [written_after_the_sum, written_before_the_sum, written_between_two_sums]
)
@pytest.mark.parametrize("is_joined", [False, True])
def test_weights_that_are_written_after_their_use_are_an_error_as_in_eager(weighted, is_joined):
    def function(h, w, b, y):
        z = F.linear(h, w, b)
        losses, weights = per_token(z, y), kept(y)
        if is_joined:
            return z.logsumexp(-1).mean() + weighted(losses, weights)
        return weighted(losses, weights)

    for run in (function, rewrite(function)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            run(*inputs()).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_sum_that_is_divided_is_rounded_as_often_as_a_mean(dtype):
    def mean(h, w, b, y):
        return forms.flat(F.linear(h, w, b), y, ignore_index=3)

    def divided(h, w, b, y):
        total = forms.flat(F.linear(h, w, b), y, ignore_index=3, reduction="sum")
        return total / (y != 3).sum()

    tensors = inputs(dtype)
    results = (
        reference.run(rewrite(function), list(map(reference.leaf, tensors)))
        for function in (mean, divided)
    )
    for expected, result in zip(*results, strict=True):
        assert torch.equal(expected, result)


CHOSEN = {
    "mean": lambda losses, lse, m, w: losses[m].mean(),
    "sum": lambda losses, lse, m, w: losses[m].sum() / m.sum(),
    "weighted": lambda losses, lse, m, w: (losses[m] * w).sum() / w.sum(),
    "by_number": lambda losses, lse, m, w: losses.view(-1)[m.view(-1).nonzero().squeeze(1)].mean(),
    "z_loss": lambda losses, lse, m, w: losses.mean() + 1e-2 * lse[m].square().mean(),
}


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("backend", ["rewrite", "inductor"])
def test_losses_chosen_by_a_mask(name, backend, passes):
    def function(h, w, b, y):
        z, mask = F.linear(h, w, b), y > 20
        weights = torch.linspace(0, 1, 7).expand(y.shape)[mask]
        lse = z.logsumexp(-1) if name == "z_loss" else None
        return CHOSEN[name](per_token(z, y), lse, mask, weights)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = rewrite(function) if backend == "rewrite" else torch.compile(function)
        for _ in range(2):
            assert_as_eager(function, inputs(), compiled)
    assert passes == ["forward_and_gradients"] * 2


@pytest.mark.parametrize(
    "name",
    [
        *("z_loss_by_row", "some_of_the_losses", "by_hand_masked", "masked_in_place"),
        *("prompt_and_answer", "by_sequence_in_turn", "rows_in_a_stack", "weights_times_matrix"),
        *("mask_as_the_losses", "weights_like_the_losses"),
        *(
            "mean_times_a_mask",
            "einsum_by_sequence",
            "transposed",
            "chosen_twice",
            "where_it_counts_less",
        ),
    ],
)
def test_dynamic_sizes(name, passes):
    @first_of
    def function(h, w, b, y):
        return KNOWN[name](F.linear(h, w, b), y)

    compiled = torch.compile(function, dynamic=True)
    for rows in (7, 11):
        h, w, b, y = inputs()
        h, y = (torch.cat((t, t[:, :1].expand(-1, rows, *t.shape[2:])), 1) for t in (h, y))
        tensors = [h.detach().requires_grad_(), w, b, y]
        expected = reference.run(function, list(map(reference.leaf, tensors)))
        results = reference.run(compiled, list(map(reference.leaf, tensors)))
        torch.testing.assert_close(results, expected)
    assert counters["lmhead_pass"]["refused"] == 0
    assert passes == ["forward_and_gradients"] * 2


def _double(tensor):
    return torch.float64 if tensor.is_floating_point() else None
