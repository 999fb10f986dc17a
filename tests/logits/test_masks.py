"""Words of the vocabulary that are masked, however that is written, with targets among them."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from .. import forms, reference
from ..backend import rewrite
from ..checks import assert_left_alone, check

V = forms.V
BANNED = torch.arange(V) % 7 == 3
WORDS = torch.tensor([3, 50, -1])


def setting(index, value=-1e4):
    def write(z):
        z[index] = value
        return z

    return write


def filling(part, value=-1e4):
    def write(z):
        part(z).fill_(value)
        return z

    return write


def then(z, *writes):
    for write in writes:
        write(z)
    return z


# What masks [B, S, V], with a finite number each.
MASKS = {
    "masked_fill": lambda z: z.masked_fill(BANNED, -1e9),
    "masked_fill_function": lambda z: torch.masked_fill(z, BANNED[None], -1e9),
    "masked_fill_by_a_tensor": lambda z: z.masked_fill(BANNED, torch.tensor(-1e9)),
    "masked_fill_in_place": lambda z: z.masked_fill_(BANNED[None, None], -1e9),
    "masked_fill_lowest": lambda z: z.masked_fill(BANNED, torch.finfo(torch.float16).min),
    "little": lambda z: z.masked_fill(BANNED, -0.5),
    "high": lambda z: z.masked_fill(BANNED, 3),
    "where": lambda z: torch.where(BANNED, -1e9, z),
    "where_kept": lambda z: torch.where(~BANNED, z, -1e9),
    "where_keywords": lambda z: torch.where(condition=BANNED, input=torch.tensor(-1.0), other=z),
    "where_method": lambda z: z.where(~BANNED[None], -1e9),
    "where_method_of_the_fill": lambda z: torch.full((), -1e9).where(BANNED, z),
    "where_tensor": lambda z: torch.where(BANNED, torch.tensor(-1e9), z),
    "where_one_for_each_word": lambda z: torch.where(BANNED, torch.linspace(-2, 2, V), z),
    "where_full_like": lambda z: torch.where(BANNED, torch.full_like(z, -1e9), z),
    "where_new_full": lambda z: torch.where(BANNED, z.new_full(z.shape, -2), z),
    "where_zeros_like": lambda z: torch.where(~BANNED, z, torch.zeros_like(z)),
    "index_fill": lambda z: z.index_fill(-1, WORDS, -1e9),
    "index_fill_function": lambda z: torch.index_fill(z, 2, WORDS, torch.tensor(-1e9)),
    "index_fill_in_place": lambda z: z.index_fill_(2, WORDS, -1e9),
    "a_word": setting((..., 7)),
    "a_word_from_the_end": setting((slice(None), slice(None), -5)),
    "words_set_to_a_tensor": lambda z: setting((..., WORDS), torch.tensor(-9).to(z))(z),
    "a_list": setting((..., [3, 50, -1])),
    "a_tensor_of_words": setting((..., WORDS)),
    "a_mask_as_index": setting((..., BANNED)),
    "the_first": setting((..., slice(5))),
    "the_middle": setting((..., slice(40, 50)), -3.0),
    "the_last": setting((..., slice(90, None)), torch.tensor(-1e4)),
    "every_third": setting((..., slice(None, None, 3)), torch.tensor(-2)),
    "a_part_filled": filling(lambda z: z[:, :, 40:50]),
    "a_part_filled_with_zeros": lambda z: then(z, lambda z: z.narrow(-1, 80, 17).zero_()),
    "a_part_of_a_view_filled": filling(lambda z: z.view(-1, V)[:, 30:]),
    "twice": lambda z: setting((..., slice(80, None)), -3.0)(z.masked_fill(BANNED, -4)),
    "scaled": lambda z: z.masked_fill(BANNED, -3) / 0.7,
    "negated": lambda z: -z.masked_fill(BANNED, 1e9),
    "shifted": lambda z: 3 - (z - 1).masked_fill(BANNED, 20),
    "capped": lambda z: 3 * torch.tanh(z.masked_fill(BANNED, -2) / 3),
    "capped_by_sigmoid": lambda z: 9 * torch.sigmoid(z.masked_fill(BANNED, -torch.inf)) + 1,
    "after_a_cap": lambda z: (3 * torch.tanh(z / 3) - 1).masked_fill(BANNED, -7),
    "biased": lambda z: z.masked_fill(BANNED, -3) + torch.linspace(-1, 1, V),
    "after_a_bias": lambda z: (z - torch.linspace(-1, 1, V)).masked_fill(BANNED, -3),
    "cut": lambda z: torch.where(BANNED, -3, z)[..., 3:],
    "after_a_cut": lambda z: setting((..., slice(-9, None)), -2.0)(z[..., 3:].float() * 1),
    "after_a_temperature": lambda z: (z / torch.tensor(1.5)).masked_fill(BANNED, -3),
}


@pytest.mark.parametrize("name", MASKS)
def test_targets_among_masked_words(name):
    hidden, weight, _, target = forms.inputs()
    mask = MASKS[name]
    check(lambda h, w, y: forms.flat(mask(F.linear(h, w)), y % 90), (hidden, weight, target))


def by_hand(z, y):
    return torch.logsumexp(z, -1).mean() - z.gather(-1, y[..., None]).mean()


LOSSES = {
    "sum": lambda z, y: forms.flat(z, y, reduction="sum"),
    "none": lambda z, y: forms.flat(z, y, reduction="none").square().mean(),
    "weighted": lambda z, y: (forms.flat(z, y, reduction="none") * torch.linspace(0, 1, 21)).sum(),
    "class_weight": lambda z, y: forms.flat(z, y, weight=torch.linspace(0, 1, V, dtype=z.dtype)),
    "smoothed": lambda z, y: forms.flat(z, y, label_smoothing=0.1),
    "by_hand": by_hand,
    "probabilities": lambda z, y: z.log_softmax(-1).gather(-1, y[..., None]).exp().mean(),
    "z_loss": lambda z, y: forms.flat(z, y) + z.logsumexp(-1).square().mean(),
    "vocabulary_second": lambda z, y: F.cross_entropy(z.mT, y),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    def function(h, w, b, y):
        return LOSSES[name](F.linear(h, w, b).masked_fill(BANNED, -1.5), y)

    check(function, forms.inputs())


def test_measures_are_of_the_masked_logits():
    def function(h, w, b, y):
        z = 3 * torch.tanh(F.linear(h, w, b)).masked_fill(BANNED, 1) + 1
        with torch.no_grad():
            taken = z.argmax(-1), z.amax(-1), z.logsumexp(-1), z.topk(20)
            return forms.flat(z, y), *taken, z.gather(-1, y[..., None])

    tensors = forms.inputs()
    expected = function(*tensors)
    results = rewrite(function)(*tensors)
    assert counters["lmhead_pass"]["refused"] == 0
    torch.testing.assert_close(results[2:], expected[2:])


DROPPED = {
    "by_where": lambda losses, kept: torch.where(kept, losses, 0).sum() / kept.sum(),
    "by_a_fill": lambda losses, kept: losses.masked_fill(~kept, 0).mean(),
    "by_row": lambda losses, kept: torch.where(kept, losses, 0).square().mean(),
}


@pytest.mark.parametrize("name", DROPPED)
@pytest.mark.parametrize("words", ["last", "by_mask"])
def test_rows_whose_target_is_impossible_are_dropped(name, words):
    """Their loss is infinite; it counts for nothing."""
    masked = BANNED if words == "by_mask" else torch.arange(V) >= 90

    def function(h, w, y):
        z = F.linear(h, w)
        if words == "last":
            z[..., 90:] = -torch.inf
        else:
            z = z.masked_fill(masked, -torch.inf)
        losses = forms.flat(z, y, reduction="none")
        return DROPPED[name](losses, ~masked[y.flatten()])

    hidden, weight, _, target = forms.inputs()
    target[0, :3], target[1, :3] = 94, 10
    check(function, (hidden, weight, target))


def test_an_impossible_target_has_an_infinite_loss_and_the_gradient_of_the_other_words():
    def function(h, w, y):
        return forms.flat(F.linear(h, w).masked_fill(BANNED, -torch.inf), y)

    tensors = [t for t in forms.inputs() if t.dim() > 1]
    tensors[2][0, 0] = 10
    expected = reference.run(function, list(map(reference.leaf, tensors)))
    results = reference.run(rewrite(function), tensors)
    assert counters["lmhead_pass"] == {"rewritten": 1}
    assert results[0] == torch.inf
    torch.testing.assert_close(results, expected)


class Head(torch.nn.Module):
    """With masks that are buffers, one of them to be added."""

    def __init__(self, adds):
        super().__init__()
        self.head = torch.nn.Linear(16, V).requires_grad_(False)
        self.adds = adds
        self.register_buffer("mask", torch.where(BANNED, -torch.inf, 0) if adds else BANNED)

    def forward(self, hidden, target):
        z = self.head(hidden)
        z = z + self.mask if self.adds else z.masked_fill(self.mask, -5)
        return forms.flat(z, target)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("backend", ["rewrite", "inductor"])
def test_masks_that_are_buffers(adds, backend):
    hidden, _, _, target = forms.inputs()
    model = Head(adds)
    if adds:
        target = torch.where(BANNED[target], 0, target)
    expected = reference.run(model, [reference.leaf(hidden), target])
    compiled = torch.compile(model) if backend == "inductor" else rewrite(model)
    torch.testing.assert_close(reference.run(compiled, [hidden, target]), expected)
    assert counters["lmhead_pass"] == {"rewritten": 1}


REFUSED = {
    "by_row": (
        lambda z, y, b: z.masked_fill(y[..., None] == torch.arange(V), -5),
        "masked_fill at .* masks logits by other than a mask of the vocabulary",
    ),
    "rows": (
        lambda z, y, b: torch.where(y[..., None] > 9, z, -5),
        "where at .* masks logits by other than a mask of the vocabulary",
    ),
    "index_of_rows": (
        lambda z, y, b: z.index_fill(1, torch.tensor([2]), -5),
        "index_fill at .* fills rows, not words",
    ),
    "some_rows": (
        lambda z, y, b: setting((slice(None), 0, slice(3)))(z),
        "setitem at .* writes to a part of the logits in place",
    ),
    "rows_by_mask": (lambda z, y, b: setting((y > 3,))(z), "setitem at .* where an index says"),
    "rows_and_words": (
        lambda z, y, b: setting((torch.tensor([0, 1]), slice(None), WORDS[:2]))(z),
        "setitem at .* writes to a part of the logits in place",
    ),
    "a_number_for_each_row": (
        lambda z, y, b: torch.where(BANNED, y[..., None].float(), z),
        "where at .* sets logits to other than one number for each word",
    ),
    "with_a_gradient": (
        lambda z, y, b: torch.where(BANNED, b[0], z),
        "where at .* sets logits to a tensor with a gradient",
    ),
    "not_a_number": (lambda z, y, b: z.masked_fill(BANNED, torch.nan), "sets logits to NaN"),
    "not_the_same_for_long": (
        lambda z, y, b: torch.where(BANNED, torch.full_like(z, -5).cumsum_(-1), z),
        "where at .* sets logits to other than one number for each word",
    ),
    "then_a_learned_bias": (
        lambda z, y, b: z.masked_fill(BANNED, -5) + b,
        "adds a bias with a gradient to masked logits",
    ),
    "then_a_temperature": (
        lambda z, y, b: z.masked_fill(BANNED, -5) / torch.tensor(0.7),
        "div at .* scales masked logits by a tensor",
    ),
}


@pytest.mark.usefixtures("no_regions")
@pytest.mark.parametrize("name", REFUSED)
def test_near_misses_are_left_alone_with_a_reason(name, caplog):
    chain, reason = REFUSED[name]

    def function(h, w, b, y):
        return forms.flat(chain(F.linear(h, w), y, b), y)

    assert_left_alone(function, forms.inputs(), reason, caplog)
