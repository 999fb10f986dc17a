"""What is left alone: near misses, each with a reason that says what to do or what was found."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import lmhead_pass

from .. import forms, reference
from ..backend import rewrite

V = forms.V


def flat(z, y, **options):
    return forms.flat(z, y, **options)


def write_to_hidden(h, w, b, y):
    h = h * 1
    z = F.linear(h.detach(), w)
    h.add_(1)
    return flat(z, y)


def write_to_hidden_through_view(h, w, b, y):
    h = h.detach() * 1
    z = F.linear(h, w)
    h[0].mul_(2)
    return flat(z, y)


def view_made_in_inference_mode(h, w, b, y):
    """No gradient gets through it in eager, though it says that it requires one."""
    z = F.linear(h, w)
    with torch.inference_mode():
        z = z.view(-1, V)
    return flat(z, y)


def view_of_a_view_made_under_no_grad(h, w, b, y):
    """As in inference mode: it requires a gradient, and has nowhere to pass it."""
    z = F.linear(h, w)[:, ::2]
    with torch.no_grad():
        z = z[0]
    return flat(z, y[0, ::2])


def gradient_taken_away_in_place(h, w, b, y):
    """Of what has passed one on before."""
    losses = flat(F.linear(h, w, b), y, reduction="none")
    doubled = losses * 2
    total = doubled.sum()
    doubled.detach_()
    return total + losses.sum() / 2


def argmax_of_rows(h, w, b, y):
    z = F.linear(h, w, b)
    return flat(z, y) + z.detach().argmax(1).sum()


def learned_temperature_before_a_write(h, w, b, y):
    """The temperature's gradient is made of the hidden states."""
    h = h.detach() * 1
    loss = flat(F.linear(h, w.detach()) * b[0], y)
    h.mul_(2)
    return loss


def write_to_hidden_by_index(h, w, b, y):
    h = h.detach() * 1
    z = F.linear(h, w)
    h[0] = 0
    return flat(z, y)


def write_to_hidden_by_operator(h, w, b, y):
    h = h.detach() * 1
    z = F.linear(h, w)
    h += 1
    return flat(z, y)


def write_to_hidden_by_out(h, w, b, y):
    h = h.detach() * 1
    z = F.linear(h, w)
    torch.add(h, 1, out=h)
    return flat(z, y)


def write_to_hidden_by_inplace_argument(h, w, b, y):
    h = h.detach() * 1
    z = F.linear(h, w)
    F.relu(h, True)
    return flat(z, y)


def write_to_hidden_by_max_norm(h, w, b, y):
    """And to the head's weight."""
    z = F.linear(h, w)
    F.embedding(y, w, max_norm=0.1)
    return flat(z, y)


def write_one_word(h, w, b, y):
    z = F.linear(h, w)
    z.view(-1, V)[:, 3].fill_(0)
    return flat(z, y)


def write_rows(h, w, b, y):
    z = F.linear(h, w)
    z[:, 0] = -torch.inf
    return flat(z[:, 1:], y[:, 1:])


def write_to_some_rows(h, w, b, y):
    z = F.linear(h, w)
    z[:, 1:].div_(2)
    return flat(z, y)


def write_without_gradient(h, w, b, y):
    z = F.linear(h, w)
    with torch.no_grad():
        z.mul_(2)
    return flat(z, y)


def write_to_detached(h, w, b, y):
    z = F.linear(h, w)
    z.detach().mul_(2)
    return flat(z, y)


def copy_over(h, w, b, y):
    z = F.linear(h, w)
    z.copy_(z.flip(-1).detach())
    return flat(z, y)


def put_into_another(h, w, b, y):
    z = F.linear(h, w)
    other = torch.zeros(3, 7, V)
    other[:] = z
    return flat(other, y)


def spread(h, w, b, y):
    z = F.linear(h, w)
    return flat(z, y) + 0 * z.detach().std(-1).mean()


def entropy_bonus(h, w, b, y):
    z = F.linear(h, w)
    return flat(z, y) + 0.1 * (z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean()


def hook(h, w, b, y):
    z = F.linear(h, w)
    z.register_hook(lambda grad: grad * 2)
    return flat(z, y)


def write_to_bias_before_the_backward(h, w, b, y):
    loss = flat(F.linear(h, w, b), y, reduction="none").square().mean()
    with torch.no_grad():
        b.add_(1)
    return loss


def write_by_fill_and_to_a_view(h, w, b, y):
    z = F.linear(h, w)
    rows = z.reshape(-1, V)
    loss = flat(rows, y)
    z[..., 90:] = -torch.inf
    rows.div_(0.7)
    return loss + 0 * z[..., :90].detach().std()


REFUSED = {
    "write_to_bias_before_the_backward": (
        write_to_bias_before_the_backward,
        "add_ at .* weight or bias in place after the loss, whose backward",
    ),
    "write_by_fill_and_to_a_view": (
        write_by_fill_and_to_a_view,
        "std at .* reads the logits too",
    ),
    "write_to_hidden": (write_to_hidden, "add_ at .* in place between the head and the loss"),
    "learned_temperature_before_a_write": (
        learned_temperature_before_a_write,
        "mul_ at .* in place after the loss, whose backward reads it again",
    ),
    "write_to_hidden_through_view": (write_to_hidden_through_view, "mul_ at .* in place between"),
    "write_to_hidden_by_index": (write_to_hidden_by_index, "setitem at .* in place between"),
    "write_to_hidden_by_operator": (write_to_hidden_by_operator, "iadd at .* in place between"),
    "write_to_hidden_by_out": (write_to_hidden_by_out, "add at .* in place between"),
    "write_to_hidden_by_argument": (write_to_hidden_by_inplace_argument, "relu at .* in place"),
    "write_to_hidden_by_max_norm": (write_to_hidden_by_max_norm, "embedding at .* in place"),
    "write_one_word": (write_one_word, "indexed along the vocabulary"),
    "write_rows": (write_rows, "setitem at .* writes to logits in place where|to a part"),
    "write_to_some_rows": (write_to_some_rows, "div_ at .* writes to the logits in place"),
    "write_without_gradient": (write_without_gradient, "mul_ at .* writes to the logits in place"),
    "write_to_detached": (write_to_detached, "mul_ at .* writes to the logits in place"),
    "copy_over": (copy_over, "flip at .* reads the logits too"),
    "put_into_another": (put_into_another, "the logits come from zeros"),
    "spread": (spread, "std at .* reads the logits too"),
    "entropy_bonus": (entropy_bonus, "sum at .* needs a gradient"),
    "words_from_few_rows": (
        lambda h, w, b, y: -F.log_softmax(F.linear(h, w), -1).gather(-1, y[:2, :, None]).mean(),
        "gather at .* picks other than one word of each row",
    ),
    "several_words": (
        lambda h, w, b, y: (
            -F.log_softmax(F.linear(h, w), -1).gather(-1, y[:, :, None].expand(-1, -1, 2)).mean()
        ),
        "gather at .* picks other than one word of each row",
    ),
    "deviation_of_words": (
        lambda h, w, b, y: -F.log_softmax(F.linear(h, w), -1).std(),
        "log_softmax goes to std at",
    ),
    "two_softcaps": (
        lambda h, w, b, y: flat(torch.tanh(torch.tanh(F.linear(h, w))), y),
        "second softcap",
    ),
    "clamped": (
        lambda h, w, b, y: flat(F.linear(h, w).clamp(-5, 5), y),
        "the logits come from clamp at .*, which is not understood",
    ),
    "scaled_by_word": (
        lambda h, w, b, y: flat(F.linear(h, w) * b, y),
        "scales the words of the vocabulary apart",
    ),
    "scaled_in_float16": (
        lambda h, w, b, y: flat(F.linear(h.half(), w.half()) / torch.tensor(1e-3), y).float(),
        "div at .* scales FP16 logits, and hidden states may overflow by it",
    ),
    "scaled_after_bias": (
        lambda h, w, b, y: flat(F.linear(h, w, b) * torch.tensor(2.0), y),
        "scales by a tensor after a bias",
    ),
    "added_logits": (
        lambda h, w, b, y: flat(F.linear(h, w) + F.linear(h * 2, w), y),
        "add puts logits together|adds a tensor to the logits that is not a bias",
    ),
    "added_by_row": (
        lambda h, w, b, y: flat(F.linear(h, w) + y[..., None].float(), y),
        "is not a bias",
    ),
    "dropped_out": (
        lambda h, w, b, y: flat(F.dropout(F.linear(h, w), 0.0), y),
        "the logits come from dropout",
    ),
    "inference_mode": (
        view_made_in_inference_mode,
        "a gradient of what was made without autograd",
    ),
    "no_grad_view": (
        view_of_a_view_made_under_no_grad,
        "a gradient of what was made without autograd",
    ),
    "argmax_of_rows": (argmax_of_rows, "argmax.* is not taken over the vocabulary"),
    "masked_and_scaled_by_tensor": (
        lambda h, w, b, y: flat(
            forms.written(F.linear(h, w), forms.mask_padding) / b[0].detach().abs(), y % 90
        ),
        "scales masked logits by a tensor",
    ),
    "masked_by_row": (
        lambda h, w, b, y: flat(F.linear(h, w).masked_fill((y == 3)[..., None], -torch.inf), y * 0),
        "other than a mask of the vocabulary",
    ),
    "soft_targets": (
        lambda h, w, b, y: F.cross_entropy(
            F.linear(h, w).flatten(0, 1), F.one_hot(y, V).flatten(0, 1).to(h.dtype)
        ),
        "probabilities of classes",
    ),
    "masked_rows": (
        lambda h, w, b, y: F.cross_entropy(
            F.linear(h, w)[[0, 2]].flatten(0, 1), y[[0, 2]].flatten()
        ),
        "indexed with tensors|not understood",
    ),
    "wrong_dimension": (
        lambda h, w, b, y: F.nll_loss(F.log_softmax(F.linear(h, w).flatten(0, 1), 0), y.flatten()),
        "log_softmax at .* runs over dimension 0",
    ),
    "classes_in_another_dimension": (
        lambda h, w, b, y: F.cross_entropy(
            F.linear(torch.cat([h] * 14, 1)[:, :V], w), y.repeat(1, 14)[:, :V]
        ),
        "classes from another dimension",
    ),
    "nll_of_logits": (
        lambda h, w, b, y: F.nll_loss(F.linear(h, w).flatten(0, 1), y.flatten()),
        "went through no log_softmax",
    ),
    "scrambled_reshape": (
        lambda h, w, b, y: F.cross_entropy(F.linear(h, w).mT.reshape(-1, V), y.flatten()),
        "reshape at .* to .* does not keep the vocabulary",
    ),
    "not_a_linear_layer": (
        lambda h, w, b, y: flat(torch.cat([F.linear(h, w)] * 2, -1), y),
        "the logits come from cat",
    ),
    "batched_weight": (
        lambda h, w, b, y: flat(torch.matmul(h, w.t().expand(3, -1, -1)), y),
        "weight has 3 dimensions",
    ),
    "addmm_beta": (
        lambda h, w, b, y: F.cross_entropy(
            torch.addmm(b, h.flatten(0, 1), w.t(), beta=0.5), y.flatten()
        ),
        "addmm is called with other arguments",
    ),
    "einsum_with_rows_moved": (
        lambda h, w, b, y: flat(torch.einsum("bsh,vh->sbv", h, w), y.t()),
        "einsum is not understood",
    ),
    "up_cast": (
        lambda h, w, b, y: flat(F.linear(h, w).double(), y).float(),
        "turns torch.float32 logits into torch.float64",
    ),
    "input_logits": (
        lambda h, w, b, y: flat(h.reshape(-1)[: 3 * V].view(1, 3, V), y[:1, :3]),
        "an input of this graph",
    ),
    "detach_": (gradient_taken_away_in_place, "detach_ at .* hides what had a gradient before"),
    "hook": (hook, "register_hook|reads the logits too"),
}


@pytest.mark.usefixtures("no_regions")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_reason(name, caplog):
    function, reason = REFUSED[name]
    tensors = forms.inputs()
    if name.startswith("write_to_hidden"):  # eager autograd would refuse it too
        tensors = [tensor.detach() for tensor in tensors]
    leaves = [reference.leaf(t) for t in tensors]
    with caplog.at_level("INFO", logger="lmhead_pass"):
        result = rewrite(function)(*tensors)
    loss = result[0] if isinstance(result, tuple) else result
    goes_back = loss.requires_grad and not name.startswith("write_to_target")  # the same
    if goes_back:
        loss.backward()
    assert counters["lmhead_pass"]["rewritten"] == 0
    assert counters["lmhead_pass"]["refused"] == 1
    text = "\n".join(r.getMessage() for r in caplog.records if r.name == "lmhead_pass")
    assert re.search(reason, text), text
    assert re.search(r"at \S+/tests/(forms|plan/test_refusals).py:\d+ `.+`: ", text), text

    # And the graph is what it was.
    expected = function(*leaves)
    expected = expected[0] if isinstance(expected, tuple) else expected
    if goes_back:
        expected.backward()
    assert torch.equal(loss, expected)
    for tensor, leaf in zip(tensors, leaves, strict=True):
        assert (tensor.grad is None and leaf.grad is None) or torch.equal(tensor.grad, leaf.grad)


def test_small_vocabulary_is_left_alone(caplog):
    hidden, weight, _, target = forms.inputs()
    with (
        lmhead_pass.config.patch(min_vocab_size=V + 1),
        caplog.at_level("INFO", logger="lmhead_pass"),
    ):
        rewrite(lambda h, w, y: flat(F.linear(h, w), y))(hidden, weight, target)
    assert counters["lmhead_pass"] == {"refused": 1}
    assert f"{V} classes are fewer than config.min_vocab_size ({V + 1})" in caplog.text
    torch._dynamo.reset()
    with lmhead_pass.config.patch(min_vocab_size=V):
        rewrite(lambda h, w, y: flat(F.linear(h, w), y))(hidden, weight, target)
    assert counters["lmhead_pass"]["rewritten"] == 1


def test_writes_that_matter_to_nobody_do_not_refuse():
    """Before the head, after the loss, or to something else in between."""

    def function(h, w, y):
        h = h * 1
        h.add_(1)
        z = F.linear(h, w)
        count = torch.zeros(())
        count.add_(1)
        F.embedding(y, w)
        F.batch_norm(h[0], torch.zeros(h.size(-1)), torch.ones(h.size(-1)), training=True)
        loss = flat(z, y)
        y.fill_(0)
        return loss * count

    hidden, weight, _, target = forms.inputs()
    expected = function(hidden, weight, target.clone())
    result = rewrite(function)(hidden, weight, target)
    assert counters["lmhead_pass"] == {"rewritten": 1}
    torch.testing.assert_close(result, expected)
    assert not target.any()


def test_write_to_target_between_head_and_loss_is_seen():
    def function(h, w, y):
        z = F.linear(h, w)
        y[:, 0] = -100
        return flat(z, y)

    hidden, weight, _, target = forms.inputs()
    expected = function(hidden, weight, target.clone())
    torch.testing.assert_close(rewrite(function)(hidden, weight, target), expected)
    assert counters["lmhead_pass"] == {"rewritten": 1}


def test_functorch_transforms_are_left_alone():
    def function(h, w, y):
        return torch.func.grad(lambda w: flat(F.linear(h, w), y))(w)

    hidden, weight, _, target = forms.inputs()
    hidden, weight = hidden.detach(), weight.detach()
    result = rewrite(function)(hidden, weight, target)
    assert counters["lmhead_pass"]["rewritten"] == 0
    torch.testing.assert_close(result, function(hidden, weight, target))
