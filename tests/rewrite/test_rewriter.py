"""What the rewriting of a graph does to the rest of it, and that a failure does nothing to it."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import lmhead_pass
from lmhead_pass.graph_pass import the_pass

from .. import forms, reference
from ..backend import rewrite
from ..checks import check
from ..sums.known_weights import judged_and_weighted_without_gradient


def test_several_heads():
    hidden, weight, _, target = forms.inputs()
    other = torch.randn(80, 16).requires_grad_()
    tensors = (hidden, weight, other, target)

    def function(h, w, v, y):
        return forms.flat(F.linear(h, w), y) + 0.3 * forms.flat(F.linear(h, v), y % 80)

    compiled = rewrite(function)
    results = reference.run(compiled, tensors)
    assert counters["lmhead_pass"] == {"rewritten": 2}
    exact = reference.run(function, reference.doubles(tensors))
    eager = reference.run(function, [reference.leaf(t) for t in tensors])
    reference.assert_no_worse(results, eager, exact, torch.float32)


def test_several_losses_of_one_head():
    """Multi-token prediction, or a loop over chunks of the logits."""
    hidden, weight, _, target = forms.inputs()

    def function(h, w, y):
        logits = F.linear(h, w)
        first = forms.flat(logits[:, :3], y[:, :3], reduction="sum")
        return first + forms.flat(logits[:, 3:], y[:, 3:], reduction="sum")

    compiled = rewrite(function)
    results = reference.run(compiled, (hidden, weight, target))
    assert counters["lmhead_pass"] == {"rewritten": 2}
    tensors = (hidden, weight, target)
    exact = reference.run(function, reference.doubles(tensors))
    eager = reference.run(function, [reference.leaf(t) for t in tensors])
    reference.assert_no_worse(results, eager, exact, torch.float32)


def test_pass_can_run_again_on_its_own_result():
    hidden, weight, _, target = forms.inputs()
    graphs = []

    def backend(module, example_inputs):
        for _ in range(2):
            the_pass()(module.graph)
            module.recompile()
            graphs.append(module.code)
        return module.forward

    def function(h, w, y):
        return forms.flat(F.linear(h, w), y)

    check(function, (hidden, weight, target), torch.compile(function, backend=backend))
    assert graphs[0] == graphs[1]


def test_gradients_flow_only_where_they_did():
    """The head under no_grad, or its output detached: the loss sends nothing back."""
    hidden, weight, _, target = forms.inputs()

    def under_no_grad(h, w, y):
        with torch.no_grad():
            logits = F.linear(h, w)
        return forms.flat(logits, y) + h.sum() + w.sum()

    def detached(h, w, y):
        return forms.flat(F.linear(h, w).detach(), y) + h.sum() + w.sum()

    def loss_under_no_grad(h, w, y):
        logits = F.linear(h, w)
        with torch.no_grad():
            loss = forms.flat(logits, y)
        return loss + h.sum() + w.sum()

    for function in (under_no_grad, detached, loss_under_no_grad):
        torch._dynamo.reset()
        counters.clear()
        for leaf in (hidden, weight):
            leaf.grad = None
        check(function, (hidden, weight, target))
        assert torch.equal(weight.grad, torch.ones_like(weight))


def test_weight_that_is_written_to_later():
    """Autograd refuses new views of a view that was made under no_grad before the write."""
    hidden, weight, _, target = forms.inputs()

    def function(h, w, y):
        h = h + w[y % forms.V, :]
        with torch.no_grad():
            loss = forms.flat(h @ w.T, y)
            w.mul_(1.1)
        return loss

    expected = function(hidden, weight.detach().clone().requires_grad_(), target)
    torch.testing.assert_close(rewrite(function)(hidden, weight, target), expected)
    assert counters["lmhead_pass"] == {"rewritten": 1}


def test_failure_inside_the_pass_leaves_the_graph_alone(monkeypatch, caplog):
    def fail(*_):
        raise ArithmeticError("on purpose")

    monkeypatch.setattr("lmhead_pass.rewrite.emit_calls.emit_weight", fail)
    function = lambda h, w, y: forms.flat(F.linear(h, w)[:, 1:], y[:, 1:])  # noqa: E731
    hidden, weight, _, target = forms.inputs()
    graphs = []
    with lmhead_pass.config.patch(strict=False):
        result = rewrite(function, graphs)(hidden, weight, target)
    assert torch.equal(result, function(hidden, weight, target))
    assert graphs[0] == graphs[1]
    assert counters["lmhead_pass"] == {"failed": 1}
    assert "on purpose" in caplog.text
    assert "Please report" in caplog.text
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"lmhead_pass.config.strict.*on purpose"):
        rewrite(function)(hidden, weight, target)


def test_failure_after_nodes_were_moved_leaves_the_graph_alone(monkeypatch):
    def fail(*_):
        raise ArithmeticError("on purpose")

    def function(h, w, b, y):
        return judged_and_weighted_without_gradient(F.linear(h, w, b), y)

    monkeypatch.setattr("lmhead_pass.rewrite.rewriter.emit_root", fail)
    tensors, graphs = forms.inputs(), []
    with lmhead_pass.config.patch(strict=False):
        results = rewrite(function, graphs)(*tensors)
    assert counters["lmhead_pass"] == {"failed": 1}
    assert graphs[0] == graphs[1]
    torch.testing.assert_close(results, function(*tensors))
