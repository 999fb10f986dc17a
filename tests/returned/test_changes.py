"""Reading after what the logits are computed from has changed raises an error."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ..backend import rewrite
from .model import (
    SETTING,
    VOCAB,
    Model,
    batch,
    is_unread,
)


def optimizers():
    for name, cls in sorted(vars(torch.optim).items()):
        is_optimizer = isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
        if not is_optimizer or name in ("Optimizer", "SparseAdam"):  # takes no dense gradient
            continue
        for form in ({}, {"foreach": True}, {"fused": True}):
            parameter = nn.Parameter(torch.ones(2, 2))
            options = {"lr": 0.01, **form}
            try:
                cls([parameter], **options)
            except (TypeError, RuntimeError):
                continue  # has no such form
            yield pytest.param(cls, options, id="-".join((name, *form)))


def train_step(model, compiled, optimizer):
    inputs = batch()
    optimizer.zero_grad()
    loss, logits = compiled(*inputs)
    loss.backward()
    early = copy.deepcopy(logits.detach())
    torch.testing.assert_close(early, model(*inputs)[1].detach())
    return logits.detach(), compiled(*inputs)[1], loss


@pytest.mark.parametrize(("cls", "options"), [*optimizers()])
def test_reading_after_an_optimizer_step_gives_the_forwards_values(cls, options):
    model = Model(bias=False)
    compiled = rewrite(model)
    parameters = [p for p in model.parameters() if cls is not torch.optim.Muon or p.dim() == 2]
    optimizer = cls(parameters, **options)
    _, unread, loss = train_step(model, compiled, optimizer)
    expected = copy.deepcopy(unread._cell.roots[0].source).compute()
    before = model.head.weight.detach().clone()
    if cls is torch.optim.LBFGS:
        optimizer.step(lambda: loss)
    else:
        optimizer.step()
    assert not torch.equal(model.head.weight, before)
    torch.testing.assert_close(unread.detach().clone(), expected)


def test_reading_after_a_compiled_optimizer_step_gives_the_forwards_values_or_raises(model):
    optimizer = torch.optim.AdamW(model.parameters())
    _, unread, _ = train_step(model, torch.compile(model), optimizer)
    expected = copy.deepcopy(unread._cell.roots[0].source).compute()
    torch.compile(optimizer.step)()
    try:
        best = unread.argmax(-1)
    except RuntimeError as error:
        assert SETTING in str(error)
    else:
        assert torch.equal(best, expected.argmax(-1))


def set_one(tensor):
    tensor.data[3, 3] += 1e-3


def flip_one_sign(tensor):
    tensor.data[4, 5] *= -1


def swap_rows(tensor):
    tensor.data[[0, 1]] = tensor.data[[1, 0]]


CHANGES = {
    "data": (lambda model, x: set_one(model.head.weight), "weight was changed"),
    "sign": (lambda model, x: flip_one_sign(model.head.weight), "weight was changed"),
    "rows": (lambda model, x: swap_rows(model.head.weight), "weight was changed"),
    "columns": (lambda model, x: swap_rows(model.head.weight.data.t()), "weight was changed"),
    "bias": (lambda model, x: model.head.bias.data.fill_(0), "bias was changed"),
    "numpy": (lambda model, x: model.head.weight.detach().numpy().fill(0), "weight was changed"),
    "init": (lambda model, x: nn.init.normal_(model.head.weight), "weight was changed"),
    "freed": (lambda model, x: model.head.weight.untyped_storage().resize_(0), "weight was freed"),
    "loaded": (lambda model, x: model.load_state_dict(Model().state_dict()), "weight was changed"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("backend", [rewrite, torch.compile])
def test_reading_after_a_change_raises(model, change, message, backend):
    inputs = batch()
    _, logits = backend(model)(*inputs)
    view = logits[0]
    change(model, inputs[0])
    for unread in (view, logits):
        with pytest.raises(RuntimeError, match=rf"{message}.*{SETTING}"):
            unread.sum()


def test_reading_after_the_parameter_got_another_tensor_raises(model):
    _, logits = torch.compile(model)(*batch())
    model.head.weight.data = model.head.weight.data + 1
    with pytest.raises(RuntimeError, match=rf"weight was changed.*{SETTING}"):
        logits.sum()


@pytest.mark.parametrize("backend", [rewrite, torch.compile])
@pytest.mark.parametrize("is_view", [False, True])
def test_hidden_states_of_the_callers_may_change(backend, is_view):
    weight = torch.randn(VOCAB, 16)

    def head(hidden, y):
        logits = (hidden.view(-1, 16) if is_view else hidden) @ weight.t()
        return F.cross_entropy(logits, y), logits

    hidden, y = batch((7,))
    _, logits = backend(head)(hidden, y)
    assert is_unread(logits)
    expected = head(hidden, y)[1]
    hidden.copy_(hidden.flip(0))
    torch.testing.assert_close(logits.clone(), expected)


@pytest.mark.parametrize("backend", [rewrite, torch.compile])
def test_no_alarm_when_nothing_that_counts_changed(model, backend):
    compiled, inputs = backend(model), batch()
    loss, logits = compiled(*inputs)
    expected = model(*inputs)[1].detach()
    loss.backward()
    compiled(*batch())[0].backward()
    model.zero_grad()
    optimizer = torch.optim.SGD(model.body.parameters(), lr=1.0)
    compiled(*batch())[0].backward()
    optimizer.step()
    model.head.weight.data.copy_(model.head.weight.data.clone())
    model.load_state_dict(Model().state_dict(), assign=True)  # new parameters beside the old
    torch.testing.assert_close(logits.detach().clone(), expected)
