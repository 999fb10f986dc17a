"""What a program asks of the same logits in every step comes with its first result of them."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lmhead_pass.returned import LazyLogits

from ..backend import rewrite
from ..products import multiplications
from .test_joint_gradients import entropies, log_probabilities, policy
from .test_losses import H, Model, V, batch


def cross_entropy(z, y):
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def with_metrics(z, y):
    loss = cross_entropy(z, y)
    with torch.no_grad():
        accuracy = (z.argmax(-1) == y).float().mean()
        return loss, accuracy, entropies(z).mean(), z.logsumexp(-1).mean()


def with_detached_metrics(z, y):
    z, y = z[:, :-1], y[:, 1:]
    loss = F.cross_entropy(z.flatten(0, 1), y.flatten(), label_smoothing=0.1)
    return loss, (z.argmax(-1) == y).float().mean(), entropies(z.detach()).sum()


def of_other_rows(z, y):
    loss = F.cross_entropy(z[:, :-1].flatten(0, 1), y[:, 1:].flatten())
    return loss, z.argmax(-1), entropies(z.detach()).sum()


def with_entropy(z, y):
    """As TRL: entropies are logged, and have no gradient."""
    ours = log_probabilities(z, y)
    with torch.no_grad():
        entropy = entropies(z)
    advantage = torch.linspace(-1, 1, y.size(1), dtype=ours.dtype)
    return -((ours - ours.detach()).exp() * advantage).mean(), entropy


def with_bonus(z, y):
    return policy(z, y), z.amax(-1).detach().mean()


def metrics_first(z, y):
    accuracy = (z.argmax(-1) == y).float().mean()
    return cross_entropy(z, y), accuracy, entropies(z.detach())


PROGRAMS = [
    *(with_metrics, with_detached_metrics, with_entropy, with_bonus, metrics_first),
    of_other_rows,
]


def step(function, model, program, x, y, trains=True):
    """The results, and the gradients of the first."""
    model.zero_grad()
    with torch.set_grad_enabled(trains):
        loss, *others = program(function(x), y)
    if trains:
        loss.backward()
    return loss.detach(), *others, *(p.grad.clone() for p in model.parameters() if trains)


@pytest.mark.parametrize("trains", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_values_and_gradients(program, trains):
    model = Model()
    compiled = rewrite(model)
    for rows in ((3, 7), (3, 7), (3, 7), (2, 9), (2, 9), (2, 9), (3, 7)):
        x, y = batch(rows)
        results = step(compiled, model, program, x, y, trains)
        torch.testing.assert_close(results, step(model, model, program, x, y, trains))


def products(function, model, program, trains, rows=(8, 8)):
    x, y = batch(rows)
    count = multiplications(lambda: step(function, model, program, x, y, trains))
    return round(count / (y.numel() * H * V))


@pytest.mark.parametrize(
    ("program", "trains", "expected"),
    [
        *((with_metrics, True, 3), (with_metrics, False, 1)),
        *((with_detached_metrics, True, 3), (with_detached_metrics, False, 1)),
        # Gradients of rows take the logits once more.
        *((with_entropy, True, 4), (with_entropy, False, 1), (with_bonus, True, 4)),
    ],
)
def test_no_product_more_for_what_is_asked_every_time(program, trains, expected):
    model = Model()
    compiled = rewrite(model)
    for _ in range(2):
        step(compiled, model, program, *batch((8, 8)), trains)
    products(compiled, model, program, trains)  # which compiles all at once
    assert products(compiled, model, program, trains) == expected
    assert products(model, model, program, trains) == (3 if trains else 1)


def held(z):
    """Results that wait to be asked for."""
    assert isinstance(z, LazyLogits)
    return len(z._cell.foreseen)


def test_what_is_no_longer_asked_for_is_no_longer_computed():
    model = Model()
    compiled, (x, y) = rewrite(model), batch()
    waiting = []
    for asks in (True, True, False, False, True, True):
        z = compiled(x)
        cross_entropy(z, y).backward()
        waiting.append(held(z))
        if asks:
            torch.testing.assert_close(z.argmax(-1), model(x).argmax(-1))
        del z
    assert waiting == [0, 1, 1, 0, 0, 1]


def test_steps_that_overlap():
    """Two batches at a time, as with a pipeline."""
    model = Model()
    compiled, batches = rewrite(model), [batch(), batch()]
    for _ in range(3):
        logits = [compiled(x) for x, _ in batches]
        for z, (_, y) in zip(logits, batches, strict=True):
            cross_entropy(z, y).backward()
        for z, (x, _) in zip(logits, batches, strict=True):
            torch.testing.assert_close(entropies(z.detach()), entropies(model(x)).detach())
    assert all(held(z) == 0 for z in logits)
    z = compiled(batches[0][0])
    cross_entropy(z, batches[0][1])
    assert held(z) == 1


@pytest.mark.parametrize("write", ["optimizer", "logits"])
def test_writes_between_the_results(write):
    model, (x, y) = Model(), batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    results = []
    for function in (model, rewrite(model)):
        model.load_state_dict(before)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(4):
            z = function(x)
            cross_entropy(z, y).backward()
            if write == "optimizer":
                optimizer.step()
            else:
                with torch.no_grad():
                    z.mul_(-1)
            optimizer.zero_grad()
            results.append(z.argmax(-1))
    torch.testing.assert_close(results[:4], results[4:])


@pytest.mark.parametrize("keeps", [True, False])
def test_gradients_of_results_computed_before(keeps):
    """In any order, alone, and again."""
    model, (x, y) = Model(), batch()
    compiled = rewrite(model)
    for _ in range(3):
        results = []
        for function in (model, compiled):
            z = function(x)
            ours, entropy = log_probabilities(z, y), entropies(z)
            entropy.square().sum().backward(retain_graph=True)
            (ours * entropy).sum().backward(retain_graph=keeps)
            if keeps:
                ours.exp().sum().backward()
            results.append([p.grad.clone() for p in model.parameters()])
            model.zero_grad()
        torch.testing.assert_close(*results)


def test_second_derivatives():
    model, (x, y) = Model(), batch((2, 3))
    compiled = rewrite(model)
    for _ in range(3):
        results = []
        for function in (model, compiled):
            z = function(x)
            loss = (log_probabilities(z, y) * entropies(z)).sum()
            (first,) = torch.autograd.grad(loss, model.head.weight, create_graph=True)
            results += torch.autograd.grad(first.square().sum(), model.body.weight)
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_targets_overwritten_before_the_backward():
    """The loss of rows is computed again there, with the targets that it was given."""
    model = Model()
    compiled, (x, y) = rewrite(model), batch()
    with_entropy(model(x), y)[0].backward()
    expected = [p.grad.clone() for p in model.parameters()]
    for _ in range(4):
        model.zero_grad()
        target = y.clone()
        loss, _ = with_entropy(compiled(x), target)
        loss.backward()
        torch.testing.assert_close([p.grad for p in model.parameters()], expected)
    model.zero_grad()
    loss, _ = with_entropy(compiled(x), target)
    target.data.zero_()
    loss.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)


@pytest.mark.parametrize(
    ("inside", "reentrant"), [("all", False), ("later", False), ("later", True)]
)
def test_checkpointed(inside, reentrant):
    model, (x, y) = Model(), batch()
    compiled = rewrite(model)

    def later(z):
        return entropies(z).square().mean()

    def both(z):
        return log_probabilities(z, y).square().sum() + later(z)

    for _ in range(4):
        results = []
        for function in (model, compiled):
            z = function(x)
            if inside == "all":
                loss = checkpoint(both, z, use_reentrant=reentrant)
            else:
                first = log_probabilities(z, y).square().sum()
                loss = first + checkpoint(later, z, use_reentrant=reentrant)
            loss.backward()
            results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
            model.zero_grad()
        torch.testing.assert_close(*results)


def test_in_another_mode():
    """What is asked for under autocast is not what was asked for without."""
    model, (x, y) = Model(), batch()
    compiled = rewrite(model)
    for use in (False, False, True, True, False):
        results = []
        for function in (model, compiled):
            z = function(x)
            loss = log_probabilities(z, y)
            mode = torch.autocast("cpu", torch.bfloat16) if use else contextlib.nullcontext()
            with mode:
                results.append([loss.detach(), entropies(z.detach())])
        torch.testing.assert_close(*results)
