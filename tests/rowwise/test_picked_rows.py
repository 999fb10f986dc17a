"""Rows that are picked by their numbers: only these are computed, in chunks."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import lmhead_pass

from ..backend import rewrite
from .test_losses import V, check
from .test_operations import inputs
from .test_refusals import reason


def some_of(y):
    return torch.arange(0, y.numel(), 2) - 3  # the first is counted from the end


def bonus(lp):
    return (lp.exp() * lp).sum(-1).mean()


def indexed(h, w, y, *_):
    z = F.linear(h, w).flatten(0, 1)[some_of(y)]
    return F.cross_entropy(z, y.flatten()[some_of(y)]) + z.std(-1).mean()


def selected(h, w, y, *_):
    return bonus(F.linear(h, w).log_softmax(-1).flatten(0, 1).index_select(0, some_of(y) % 5))


def along_the_sequence(h, w, y, *_):
    return bonus(F.linear(h, w)[:, torch.tensor([5, 1, 1])].log_softmax(-1))


def sequences(h, w, y, *_):
    z = F.linear(h, w)
    return bonus(z[torch.tensor([2, 0, 2, 1], dtype=torch.int32)][:, 1:].log_softmax(-1))


def picked_twice(h, w, y, *_):
    z = F.linear(h, w).flatten(0, 1)
    return bonus(z[some_of(y)][torch.tensor([0, 4, -1])].log_softmax(-1))


def and_all(h, w, y, *_):
    z = F.linear(h, w).flatten(0, 1)
    return bonus(z[some_of(y)].log_softmax(-1)) + z.std(-1).sum()


def written_to(h, w, y, *_):
    """What an index gives is a copy."""
    z = F.linear(h, w).flatten(0, 1)
    some = z[some_of(y)]
    some.mul_(2)
    return bonus(some.log_softmax(-1)) + z.std(-1).sum()


def written_to_before(h, w, y, *_):
    z = F.linear(h, w).flatten(0, 1)
    some = z[some_of(y)]
    z.mul_(2)
    return bonus(some.log_softmax(-1)) + z.std(-1).sum()


def by_two(h, w, y, *_):
    picked = torch.tensor([0, 1, -1, 0]), torch.tensor([6, -7, 2, 6])
    z = F.linear(h, w)
    return bonus(z[picked].log_softmax(-1)) + F.cross_entropy(z[picked], y[picked])


def by_two_of_a_part(h, w, y, *_):
    sequences, tokens = torch.tensor([0, 2, -1, 1, 0]), torch.tensor([4, -1, 0, 3, -6])
    return bonus(F.linear(h, w)[:, 1:][sequences, tokens].log_softmax(-1))


def words_of_rows(h, w, y, *_):
    lp = F.linear(h, w).log_softmax(-1)
    rows = torch.tensor([0, 5, 5, -1])
    taken = lp.flatten(0, 1)[rows, torch.tensor([3, 0, -1, 7])]
    return (taken.exp() * taken).sum() - lp[
        torch.tensor([1, -1]), torch.tensor([0, -1]), y[0, :2]
    ].sum()


PICKS = [
    *(by_two, by_two_of_a_part, words_of_rows),
    *(indexed, selected, along_the_sequence, sequences, picked_twice),
    *(and_all, written_to, written_to_before),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", PICKS, ids=lambda f: f.__name__)
def test_picked_rows(function, dtype):
    with lmhead_pass.config.patch(batch_chunk_size=4):
        code = check(function, inputs(dtype), dtype)
    assert "lmhead_pass.rowwise" in code


@pytest.mark.parametrize(("batch", "length"), [(1, 7), (7, 1)])
def test_dimensions_of_size_one(batch, length):
    def function(h, w, y, *_):
        numbers = torch.tensor([0, 3, -1])
        places = (numbers * 0, numbers) if batch == 1 else (numbers, numbers * 0 - 1)
        return bonus(F.linear(h, w)[places].log_softmax(-1))

    check(function, inputs(batch=batch, length=length), torch.float32)


def test_numbers_that_are_none():
    h, w, *_ = inputs()

    def function(h, w, index):
        return bonus(F.linear(h, w)[index].log_softmax(-1))

    compiled = rewrite(function)
    compiled(h, w, torch.tensor([0, 1])).backward()
    assert counters["lmhead_pass"] == {"rewritten": 1}
    with pytest.raises(IndexError):
        compiled(h, w, torch.tensor([0, 3]))


@pytest.mark.parametrize("tokens", [(0, 7), (-8, 1)])
def test_a_token_that_is_none_is_not_one_of_the_next_sequence(tokens):
    h, w, *_ = inputs()

    def function(h, w, sequences, tokens):
        return bonus(F.linear(h, w)[sequences, tokens].log_softmax(-1))

    compiled, sequences = rewrite(function), torch.tensor([0, 1])
    compiled(h, w, sequences, torch.tensor([0, 6])).backward()
    assert counters["lmhead_pass"] == {"rewritten": 1}
    with pytest.raises(IndexError):
        compiled(h, w, sequences, torch.tensor(tokens))


def test_numbers_that_depend_on_the_logits_are_refused():
    h, w, *_ = inputs()

    def function(h, w):
        z = F.linear(h, w).flatten(0, 1)
        return bonus(z[z.std(-1).topk(3).indices].log_softmax(-1))

    (why,) = reason(function, (h, w))
    assert "made of all rows" in why or "made of rows" in why
    assert h.size(-1) < V
