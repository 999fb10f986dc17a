"""Several losses over one weight that end in one sum: one call, one gradient of the weight."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

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


JOINED = [
    added_in_place,
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


@pytest.mark.parametrize(
    "function", [over_pieces_of_hidden, multi_token_prediction], ids=lambda f: f.__name__
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


def read_before_it_is_added_to(h, w, b, y):
    z = F.linear(h, w, b)
    total = h.sum() * 1
    first = forms.flat(z[0], y[0])
    seen = total * 2
    total += first
    second = forms.flat(z[1:], y[1:])
    return total + second + seen.detach()


def hidden_of_a_loss(h, w, b, y):
    first = forms.flat(F.linear(h, w, b), y)
    return first + forms.flat(F.linear(h * first.detach(), w, b), y)


def written_in_between(h, w, b, y):
    h = h * 1
    first = forms.flat(F.linear(h[0], w.detach()), y[0])
    h = h.detach()
    h.mul_(2)
    return first + forms.flat(F.linear(h[1:], w.detach()), y[1:]) + w.sum() + b.sum()


APART = [
    product,
    squared,
    used_twice,
    returned_too,
    weighted_by_a_parameter,
    hidden_of_a_loss,
    read_before_it_is_added_to,
    written_in_between,
]


@pytest.mark.parametrize("function", APART, ids=lambda function: function.__name__)
def test_a_call_for_each(function):
    """Where the losses' shares of the gradient are not known before, or not what they read."""
    tensors, graphs = inputs(), []
    assert_as_eager(function, tensors, rewrite(function, graphs))
    assert graphs[1].count("lmhead_pass.linear_cross_entropy") == 2, graphs[1]


def _double(tensor):
    return torch.float64 if tensor.is_floating_point() else None
