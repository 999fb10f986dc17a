"""Function transforms, other backends and other ways to compile: right, or refused by name."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import lmhead_pass

from . import forms, reference
from .backend import rewrite
from .test_rewriting import inputs


def loss_of(h, w, y):
    return forms.flat(F.linear(h, w), y)


def per_sample_gradients(h, w, y):
    gradient = torch.func.grad(lambda w, h, y: F.cross_entropy(F.linear(h, w), y))
    return torch.func.vmap(gradient, in_dims=(None, 0, 0))(w, h, y)


def value_and_gradient(h, w, y):
    return torch.func.grad_and_value(lambda w: loss_of(h, w, y))(w)


def batched_loss(h, w, y):
    return torch.func.vmap(lambda h, y: F.cross_entropy(F.linear(h, w), y))(h, y)


def tangent(h, w, y):
    return torch.func.jvp(lambda w: loss_of(h, w, y), (w,), (torch.ones_like(w),))


@pytest.mark.parametrize(
    "function",
    [per_sample_gradients, value_and_gradient, batched_loss, tangent],
    ids=lambda function: function.__name__,
)
def test_inside_a_transform_it_is_left_alone(function):
    hidden, weight, _, target = (t.detach() for t in inputs())
    results = rewrite(function)(hidden, weight, target)
    assert counters["lmhead_pass"]["rewritten"] == 0
    torch.testing.assert_close(results, function(hidden, weight, target))


def test_forward_mode_through_a_compiled_loss():
    """What torch.compile does without the pass, too: an error, or the right tangent."""
    hidden, weight, _, target = (t.detach() for t in inputs())
    compiled = torch.compile(loss_of)
    arguments = (weight,), (torch.ones_like(weight),)
    expected = torch.func.jvp(lambda w: loss_of(hidden, w, target), *arguments)
    try:
        results = torch.func.jvp(lambda w: compiled(hidden, w, target), *arguments)
    except (RuntimeError, NotImplementedError):
        return
    torch.testing.assert_close(results, expected)


def test_double_backward_is_an_error():
    hidden, weight, _, target = inputs()
    loss = rewrite(loss_of)(hidden, weight, target)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, weight, create_graph=True)


COMPILED = {
    "aot_eager": lambda: torch.compile(loss_of, backend="aot_eager"),
    "eager": lambda: torch.compile(loss_of, backend="eager"),
    "fullgraph": lambda: torch.compile(loss_of, fullgraph=True),
    "cpp_wrapper": lambda: torch.compile(loss_of, options={"cpp_wrapper": True}),
    "auto_chunker": lambda: torch.compile(loss_of, options={"auto_chunker.enable": True}),
}


@pytest.mark.parametrize("name", COMPILED)
def test_other_ways_to_compile(name):
    tensors = [inputs()[place] for place in (0, 1, 3)]
    exact = reference.run(loss_of, [reference.leaf(t, _double(t)) for t in tensors])
    eager = reference.run(loss_of, list(map(reference.leaf, tensors)))
    try:
        results = reference.run(COMPILED[name](), tensors)
    except (AttributeError, RuntimeError) as error:
        assert name == "auto_chunker", error
        assert "auto_chunker" in str(error), error  # an option that this release does not know
        pytest.skip("no auto_chunker in this release")
    reference.assert_no_worse(results, eager, exact, torch.float32)


def test_compiled_autograd():
    tensors = [inputs()[place] for place in (0, 1, 3)]
    exact = reference.run(loss_of, [reference.leaf(t, _double(t)) for t in tensors])
    eager = reference.run(loss_of, list(map(reference.leaf, tensors)))
    with torch._dynamo.config.patch(compiled_autograd=True):

        @torch.compile
        def step(h, w, y):
            loss = loss_of(h, w, y)
            loss.backward()
            return loss

        loss = step(*tensors)
    results = [loss.detach(), *(t.grad for t in tensors if t.requires_grad)]
    reference.assert_no_worse(results, eager, exact, torch.float32)


def test_freezing():
    """Weights become constants of the graph."""
    hidden, _, _, target = (t.detach() for t in inputs())
    head = torch.nn.Linear(16, forms.V).eval()

    def evaluate(h, y):
        return forms.flat(head(h), y)

    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        loss = torch.compile(evaluate)(hidden, target)
        torch.testing.assert_close(loss, evaluate(hidden, target))


def test_export_is_not_touched():
    """torch.export makes no pre-grad graph: what is exported has no op of ours in it."""
    hidden, weight, _, target = (t.detach() for t in inputs())

    class Model(torch.nn.Module):
        def forward(self, h, w, y):
            return loss_of(h, w, y)

    exported = torch.export.export(Model(), (hidden, weight, target))
    assert "lmhead_pass" not in exported.graph_module.code
    torch.testing.assert_close(
        exported.module()(hidden, weight, target), loss_of(hidden, weight, target)
    )
    assert lmhead_pass.config.strict


def _double(tensor):
    return torch.float64 if tensor.is_floating_point() else None
