"""A loss outside of the logits of two compiled models: a student's and its teacher's."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import lmhead_pass
from benchmarks.memory import peak_bytes

from .. import reference
from ..backend import rewrite
from ..returned.model import is_unread
from .test_losses import H, Model
from .test_losses import batch as batch_of


def batch():
    return batch_of((3, 9))


def distilled(student, teacher, y):
    student, teacher = (student / 2).log_softmax(-1), (teacher / 2).softmax(-1)
    return 4 * F.kl_div(student, teacher, reduction="none").sum(-1).mean()


def beside_labels(student, teacher, y):
    kl = F.kl_div(
        student.flatten(0, 1).log_softmax(-1),
        teacher.flatten(0, 1).log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    return kl + F.cross_entropy(student.flatten(0, 1), y.flatten())


def jensen_shannon(student, teacher, y):
    p, q = student.softmax(-1), teacher.softmax(-1)
    m = ((p + q) / 2).log()
    return ((p * (p.log() - m)).sum(-1) + (q * (q.log() - m)).sum(-1)).mean() / 2


def soft_labels(student, teacher, y):
    return F.cross_entropy(student.flatten(0, 1), teacher.flatten(0, 1).softmax(-1))


def differences(student, teacher, y):
    return F.mse_loss(student[:, 1:], teacher[:, 1:])


def against_the_reference(student, teacher, y):
    """As DPO takes it of each word: no operation reads both, only numbers of them."""
    ours, theirs = (z.log_softmax(-1).gather(-1, y[..., None]) for z in (student, teacher))
    return -F.logsigmoid(ours - theirs).mean()


LOSSES = [distilled, beside_labels, jensen_shannon, soft_labels, differences, against_the_reference]


def run(student, teacher, models, loss, x, y, has_gradient=False):
    """Results, and gradients of both models; the teacher's logits are made under no_grad."""
    of_student = student(x)
    with torch.set_grad_enabled(has_gradient):
        of_teacher = teacher(x)
    result = loss(of_student, of_teacher, y)
    result.backward()
    found = [None if p.grad is None else p.grad for m in models for p in m.parameters()]
    for model in models:
        model.zero_grad()
    return (of_student, of_teacher), [result.detach(), *found]


def assert_as_good(found, eager, exact):
    assert [g is None for g in found] == [g is None for g in eager]
    trio = zip(found, eager, exact, strict=True)
    kept = [part for part in trio if part[0] is not None]
    ours, theirs, right = (list(parts) for parts in zip(*kept, strict=True))
    reference.assert_no_worse(ours, theirs, right, torch.float32)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("teacher_size", [H, 24])
def test_loss(loss, teacher_size):
    torch.manual_seed(0)
    student, teacher = Model(), Model(teacher_size, bias=True)
    adapt = torch.nn.Linear(H, teacher_size) if teacher_size != H else torch.nn.Identity()
    teacher.body = torch.nn.Sequential(adapt, teacher.body)
    models, (x, y) = (student, teacher), batch()
    logits, found = run(*map(rewrite, models), models, loss, x, y)
    assert all(map(is_unread, logits))
    _, eager = run(*models, models, loss, x, y)
    doubles = [model.double() for model in models]
    _, exact = run(*doubles, doubles, loss, x.double(), y)
    assert_as_good(found, eager, exact)


@pytest.mark.parametrize("loss", [distilled, jensen_shannon], ids=lambda f: f.__name__)
@pytest.mark.parametrize("detaches", [False, True], ids=["both", "detached"])
def test_a_teacher_with_a_gradient(loss, detaches):
    """Of both, values are read; of a detached one there is none."""

    def of_detached(student, teacher, y):
        return loss(student, teacher.detach() if detaches else teacher, y)

    models, (x, y) = (Model(), Model()), batch()
    logits, found = run(*map(rewrite, models), models, of_detached, x, y, has_gradient=True)
    assert all(is_unread(z) == detaches for z in logits)
    _, eager = run(*models, models, of_detached, x, y, has_gradient=True)
    torch.testing.assert_close(found, eager)


def test_metrics_of_both():
    models, (x, _) = (Model(), Model()), batch()
    with torch.no_grad():
        ours = [rewrite(model)(x) for model in models]
        plain = [model(x) for model in models]
        for function in (
            lambda a, b: (a.softmax(-1) * b.softmax(-1)).sum(-1),
            lambda a, b: (a - b).abs().amax(-1),
            lambda a, b: F.cosine_similarity(a, b, dim=-1),
        ):
            torch.testing.assert_close(function(*ours), function(*plain))
    assert all(map(is_unread, ours))


def test_in_a_checkpoint():
    models, (x, y) = (Model(), Model()), batch()

    def loss(*arguments):
        return checkpoint(distilled, *arguments, use_reentrant=False)

    _, found = run(*map(rewrite, models), models, loss, x, y)
    _, eager = run(*models, models, distilled, x, y)
    torch.testing.assert_close(found, eager)


def test_two_calls_of_one_model():
    """As with a reference that is the same model, or two views of a sequence."""
    model, (x, y) = Model(), batch()
    compiled = rewrite(model)
    found, eager = [], []
    for function, results in ((compiled, found), (model, eager)):
        first = function(x)
        with torch.no_grad():
            second = function(x.flip(1))
        distilled(first, second, y).backward()
        results += [p.grad for p in model.parameters()]
        model.zero_grad()
    torch.testing.assert_close(found, eager)


MIXED = [
    *(lambda a, b: a - b, lambda a, b: 1.5 * a - 0.5 * b, lambda a, b: a.log_softmax(-1) * b),
    torch.maximum,
]
USES = [
    lambda z: z[..., 3].fill_(-1e4),
    lambda z: z.zero_(),
    lambda z: z.clone(),
]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("mix", MIXED)
@pytest.mark.parametrize("records", [False, True])
def test_one_is_read_or_written_to_once_both_are_mixed(mix, use, which, records):
    """What was made of both is that of before."""
    models = [Model(), Model()]
    compiled, (x, _) = [rewrite(model) for model in models], batch()
    found = []
    for student, teacher in (compiled, models):
        with torch.set_grad_enabled(records):
            a = student(x)
        with torch.no_grad():
            b = teacher(x)
        with torch.set_grad_enabled(records):
            mixed = mix(a, b)
        with torch.no_grad():
            use((a, b)[which])
        numbers = mixed.logsumexp(-1), mixed.amax(-1), mixed + 0
        gradient = None
        if records and mix is MIXED[0]:
            (mixed + 0).square().mean().backward()
            gradient = models[0].head.weight.grad.clone()
            models[0].zero_grad()
        found.append(([one.detach() for one in numbers], gradient))
    torch.testing.assert_close(*found)


def test_ways_of_use_are_kept():
    models, (x, y) = (Model(), Model()), batch()
    student, teacher = map(rewrite, models)
    for number in range(3):
        if number == 1:
            before = counters["lmhead_pass"]["rewritten"]
        run(student, teacher, models, distilled, x, y)
    assert counters["lmhead_pass"]["rewritten"] == before
    # The other way round it is another one.
    _, found = run(teacher, student, models[::-1], distilled, x, y)
    _, eager = run(*models[::-1], models[::-1], distilled, x, y)
    torch.testing.assert_close(found, eager)


def test_a_changed_teacher_raises():
    models, (x, y) = (Model(), Model()), batch()
    student, teacher = (rewrite(model)(x) for model in models)
    models[1].head.weight.data.mul_(2)
    with pytest.raises(RuntimeError, match="weight was changed"):
        distilled(student, teacher.detach(), y)


def test_the_log_names_no_reading(caplog):
    models, (x, y) = (Model(), Model()), batch()
    with caplog.at_level(logging.INFO, logger="lmhead_pass"):
        run(*map(rewrite, models), models, distilled, x, y)
    assert "rewritten" in caplog.text and "are computed" not in caplog.text


@pytest.mark.codegen
def test_memory():
    """Beyond gradients, of one [tokens, vocab] tensor in FP32."""
    tokens, hidden, vocab = 1024, 32, 8192
    models = [Model(hidden, vocab), Model(hidden, vocab)]
    x = torch.randn(1, tokens, hidden)
    student, teacher = map(torch.compile, models)

    def step():
        run(student, teacher, models, distilled, x, None)

    step()
    step()
    gradients = sum(p.numel() * 4 for p in models[0].parameters())
    logits = tokens * vocab * 4
    with lmhead_pass.config.patch(batch_chunk_size=32):
        step()
        assert peak_bytes(step) - gradients <= 0.25 * logits
