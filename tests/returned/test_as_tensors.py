"""Unread logits are used in ways that tensors are used: each does what eager PyTorch does."""

import copy
import gc

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..backend import rewrite
from .model import is_unread

ROWS, HIDDEN, VOCAB = (3, 5), 8, 96


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, x):
        return self.head(self.body(x).tanh())


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def both(model):
    """The model, and the same compiled: given hidden states, each returns logits."""
    x, compiled = torch.randn(*ROWS, HIDDEN), rewrite(model)
    return [lambda: model(x), lambda: compiled(x)]


def test_an_index_may_change_after_it_was_used(both):
    results = []
    for logits_of in both:
        index = numpy.array([2, 0])
        taken = logits_of()[index]
        index[:] = 1
        results.append(taken.detach() + 0)
    torch.testing.assert_close(*results)


INDICES = [
    *(torch.tensor([0, 3]), [0, -4], (slice(None), torch.tensor([5])), (..., torch.tensor(96))),
    *((0, [1, 5]), (None, [7]), (torch.ones(3, 5, dtype=torch.bool), torch.tensor(96))),
    (..., torch.tensor([0]), [-97]),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_an_index_out_of_range_raises_where_it_is_used(index, both):
    for logits_of in both:
        logits = logits_of()
        with pytest.raises(IndexError):
            logits[index]


def test_an_index_in_range_reads_nothing(both):
    for logits_of in both[1:]:
        for index in (torch.tensor([0, 2]), [0, -1], (..., torch.tensor([4, 0]), slice(None))):
            logits = logits_of()
            assert is_unread(logits[index])
            assert is_unread(logits)


def test_names_stay(both):
    for logits_of in both:
        logits = logits_of()
        logits.task = "words"
        logits.square().mean().backward()
        assert logits.task == "words"


@pytest.mark.parametrize(
    "kind", [torch.Tensor.requires_grad_, nn.Parameter], ids=["leaf", "parameter"]
)
def test_a_copy_of_a_leaf(kind, both):
    for logits_of in both:
        holder = nn.Module()
        leaf = kind(logits_of().detach())
        leaf.square().sum().backward()
        holder.given = [leaf, leaf]
        copied, same = copy.deepcopy(holder).given
        assert copied is same
        assert copied.is_leaf and copied.requires_grad
        assert isinstance(copied, nn.Parameter) == (kind is nn.Parameter)
        torch.testing.assert_close(copied.detach(), leaf.detach() + 0)
        if kind is nn.Parameter:
            assert copied.grad is None
        else:
            torch.testing.assert_close(copied.grad, leaf.grad + 0)
        copied.data.zero_()
        assert leaf.detach().abs().sum() > 0


def test_only_leaves_are_copied(both):
    for logits_of in both:
        with pytest.raises(RuntimeError, match="graph leaves"):
            copy.deepcopy(logits_of())


@pytest.mark.parametrize("name", [lambda t: t.data, torch.Tensor.detach], ids=["data", "detach"])
def test_a_leaf_may_be_stepped_by_hand(name, both):
    results = []
    for logits_of in both:
        leaf = logits_of().detach().requires_grad_()
        for _ in range(3):
            loss = F.cross_entropy(leaf.flatten(0, 1), torch.arange(15))
            loss.backward()
            name(leaf).sub_(leaf.grad)
            leaf.grad = None
        results.append(leaf.detach() + 0)
    torch.testing.assert_close(*results)


def test_several_gradients_at_once(both):
    results = []
    for logits_of in both:
        logits = logits_of()
        losses = F.cross_entropy(logits.flatten(0, 1), torch.arange(15), reduction="none")
        eye = torch.eye(15)[:4]
        results.append(torch.autograd.grad(losses, logits, eye, is_grads_batched=True)[0])
    torch.testing.assert_close(*results)


@torch.no_grad()
def test_who_keeps_a_few_probabilities_keeps_no_hidden_states(both):
    logits = both[1]()
    hidden = StorageWeakRef(logits._cell.source.hidden.untyped_storage())
    kept = logits[:, -1, :20].softmax(-1)
    torch.testing.assert_close(kept, both[0]()[:, -1, :20].softmax(-1))
    del logits
    gc.collect()
    assert hidden.expired()
