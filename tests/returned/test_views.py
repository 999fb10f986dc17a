"""Logits are returned, and views of them beside."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

from ..backend import rewrite
from .model import VOCAB, Model, batch, is_unread

VIEWS = {
    "without the first": lambda z: (z, z[:, 1:]),
    "the view first": lambda z: (z[:, :-1], z),
    "the last": lambda z: (z, z[:, -1]),
    "flat": lambda z: (z, z.flatten(0, 1)),
    "some of the flat ones": lambda z: (z.view(-1, VOCAB), z.view(-1, VOCAB)[1:]),
    "another order": lambda z: (z, z.transpose(0, 1)),
    "vocabulary first": lambda z: (z, z.transpose(1, 2)),
    "new dimensions": lambda z: (z, z[:, None], z.unsqueeze(0)),
    "pieces": lambda z: (z, *z.split(2, dim=1)),
    "one after the other": lambda z: (z, *z.unbind(0), z[0]),
    "several": lambda z: (z[:, ::2], z, z[..., 1:, :], z.transpose(0, 1)[1:]),
    "of a part": lambda z: (z[:, 1:], z[:, 1:][:, ::2]),
    "of what was scaled": lambda z: (lambda w: (w, w[:, 1:]))(z * 2),
    "the same": lambda z: (z, z[:], z.contiguous(), z.view_as(z)),
    "twice": lambda z: (lambda w: (z, w, z, w))(z[:, 1:]),
    "detached": lambda z: (z, z.detach(), z.detach()[:, 1:]),
}


def use(parts):
    """A number of all parts, each of which counts differently."""
    by_rows = [part if part.size(-1) == VOCAB else part.transpose(1, 2) for part in parts]
    return sum(n * part.logsumexp(-1).square().mean() for n, part in enumerate(by_rows, 1))


@pytest.fixture(params=[rewrite, pytest.param(torch.compile, marks=pytest.mark.codegen)])
def backend(request):
    return request.param


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("returns", VIEWS.values(), ids=VIEWS)
def test_values_and_gradients(returns, backend, dynamic):
    model = Model(returns)
    compiled = backend(model, dynamic=dynamic)
    for rows in ((2, 5), (3, 7)) if returns is not VIEWS["one after the other"] else [(2, 5)]:
        x, y = batch(rows)
        found = []
        for function in (compiled, model):
            model.zero_grad()
            loss, parts = function(x, y)
            assert function is model or all(map(is_unread, parts))
            forms = [(p.shape, p.requires_grad) for p in parts]
            if returns is not VIEWS["of a part"]:  # which is dense where sizes are dynamic
                forms += [p.stride() for p in parts]
            (loss + use(parts)).backward()
            found.append((forms, [*parts, *(p.grad for p in model.parameters())]))
        (forms, actual), (expected_forms, expected) = found
        assert forms == expected_forms
        torch.testing.assert_close([a.detach() + 0 for a in actual], expected)
    assert counters["lmhead_pass"]["rewritten"] and not counters["lmhead_pass"]["refused"]


@pytest.mark.parametrize("returns", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("is_read", [False, True])
def test_what_is_written_to_one_shows_in_the_others(returns, backend, is_read):
    model, (x, y) = Model(returns), batch()
    (_, parts), (_, expected) = backend(model)(x, y), model(x, y)
    for written in (parts, expected):
        if is_read:
            written[-1].sum().item()
        with torch.no_grad():
            written[-1].mul_(2)
    torch.testing.assert_close([p.detach() + 0 for p in parts], [p.detach() for p in expected])


def test_the_values_are_in_one_memory():
    _, (logits, view) = rewrite(Model(lambda z: (z, z[:, 1:])))(*batch())
    view.tolist()
    assert not is_unread(logits)
    memory = {part._cell.value.untyped_storage().data_ptr() for part in (logits, view)}
    assert len(memory) == 1


def test_hooks_of_logits_see_what_comes_by_a_view():
    model, (x, y) = Model(lambda z: (z, z[:, 1:])), batch()
    found = []
    for function in (rewrite(model), model):
        _, (logits, view) = function(x, y)
        logits.register_hook(lambda gradient: found.append(gradient + 0))
        F.cross_entropy(view.flatten(0, 1), y[:, 1:].flatten()).backward()
    torch.testing.assert_close(*found)


def test_without_a_gradient():
    model, (x, y) = Model(lambda z: (z, z[:, -1])), batch((2, 40))
    with torch.no_grad():
        _, (logits, last) = rewrite(model)(x, y)
        probabilities = last.softmax(-1)
        assert is_unread(logits) and is_unread(last)
        torch.testing.assert_close(probabilities + 0, model(x, y)[1][1].softmax(-1))
        assert not logits.requires_grad and not last.requires_grad


def test_nothing_is_left_of_logits_that_nobody_holds():
    compiled = rewrite(Model(lambda z: (z, z[:, 1:])))
    inputs = batch()
    for number in range(3):
        _, (logits, view) = compiled(*inputs)
        del logits
        loss = F.cross_entropy(view.flatten(0, 1), inputs[1][:, 1:].flatten())
        hidden = view._cell.roots[0].source.hidden
        loss.backward()
        storage = torch.multiprocessing.reductions.StorageWeakRef(hidden.untyped_storage())
        del view, hidden, loss
        assert number == 0 or storage.expired()  # The first is traced.


class PicksByMask(nn.Module):
    """As Qwen2-Audio and others: the mask breaks the graph, and the logits are returned."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y, mask):
        logits = self.model(x, y)[1]
        mask = mask[:, 1:] != 0
        picked = logits[..., :-1, :][mask].contiguous()
        targets = y[:, 1:][mask].contiguous()
        loss = nn.CrossEntropyLoss()(picked.view(-1, VOCAB), targets.view(-1))
        return loss, logits


def test_a_loss_of_a_view_that_a_mask_picks_of_is_fused(backend):
    model = PicksByMask(Model())
    compiled = backend(model)
    for _ in range(3):
        x, y = batch((4, 9))
        mask = torch.rand(4, 9) > 0.4
        found = []
        for function in (compiled, model):
            model.zero_grad()
            loss, logits = function(x, y, mask)
            loss.backward()
            assert function is model or is_unread(logits)
            found.append([loss.detach() + 0, *(p.grad for p in model.parameters())])
        torch.testing.assert_close(*found)
    assert counters["lmhead_pass"]["rewritten"] >= 1


@pytest.mark.parametrize("use_it", [lambda view: view.tolist(), lambda view: view.mul_(1.5)])
def test_a_detached_view_is_read_before_its_logits_are_touched(use_it):
    model, (x, y) = Model(lambda z: (z, z.detach()[:, 1:])), batch()
    found = []
    for function in (rewrite(model), model):
        model.zero_grad()
        _, (logits, view) = function(x, y)
        use_it(view)
        logits.logsumexp(-1).sum().backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found)


def test_what_contiguous_returns_is_the_first():
    model, (x, y) = Model(lambda z: (z.contiguous(), z)), batch()
    _, (same, logits) = rewrite(model)(x, y)
    logits.retain_grad()
    (same.logsumexp(-1).sum() + logits.logsumexp(-1).sum()).backward()
    torch.testing.assert_close(logits.grad + 0, 2 * logits.detach().softmax(-1))
