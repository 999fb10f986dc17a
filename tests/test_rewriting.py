"""What is rewritten: every form gives the values and gradients of the model as it was written."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from lmhead_pass.graph_pass import the_pass

from . import forms, reference
from .backend import rewrite

V = forms.V


def inputs(dtype=torch.float32, batch=3, length=7, hidden=16):
    """Leaves hidden, weight, bias, and a target."""
    shapes = ((batch, length, hidden), (forms.V, hidden), (forms.V,))
    leaves = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    return *leaves, torch.randint(forms.V, (batch, length))


def check(function, tensors, compiled=None):
    """``function`` is rewritten, once, and is no worse than eager against FP64."""
    compiled = compiled or rewrite(function)
    exact = reference.run(function, [reference.leaf(t, _double(t)) for t in tensors])
    eager = reference.run(function, list(map(reference.leaf, tensors)))
    results = reference.run(compiled, tensors)
    assert counters["lmhead_pass"] == {"rewritten": 1}
    reference.assert_no_worse(results, eager, exact, tensors[0].dtype)
    assert [r.dtype for r in results] == [r.dtype for r in eager]


@pytest.mark.parametrize("name", forms.HEADS)
def test_head(name):
    tensors = inputs()
    if "bias" not in name and "keywords" not in name and "addmm" not in name:
        tensors[2].requires_grad_(False)
    check(forms.HEADS[name], tensors)


@pytest.mark.parametrize("name", forms.CHAINS)
def test_chain(name):
    hidden, weight, _, target = inputs()
    chain = forms.CHAINS[name]
    check(lambda h, w, y: chain(F.linear(h, w), y), (hidden, weight, target))


@pytest.mark.parametrize("name", forms.WRITES)
def test_written_in_place(name):
    hidden, weight, _, target = inputs()
    chain = forms.WRITES[name]
    check(lambda h, w, y: chain(F.linear(h, w), y), (hidden, weight, target))


@pytest.mark.parametrize("name", forms.LOG_PROBABILITIES)
def test_log_probabilities(name):
    hidden, weight, bias, target = inputs()
    log_probabilities = forms.LOG_PROBABILITIES[name]
    upstream = torch.randn(target.shape)
    check(
        lambda h, w, b, y: (log_probabilities(F.linear(h, w, b), y) * upstream).square().sum(),
        (hidden, weight, bias, target),
    )


@pytest.mark.parametrize("name", forms.PER_TOKEN)
def test_per_token(name):
    hidden, weight, _, target = inputs()
    use, log_probabilities = forms.PER_TOKEN[name], forms.LOG_PROBABILITIES["gather"]
    check(lambda h, w, y: use(log_probabilities(F.linear(h, w), y), y), (hidden, weight, target))


KNOWN_BEFORE = {
    *("mean", "masked", "where", "where_not", "where_method", "masked_fill"),
    *("by_sequence", "weights", "items"),
}


@pytest.mark.parametrize("name", forms.PER_TOKEN)
def test_weights_that_are_known_before_the_loss(name):
    """Those losses have their gradients with three products: the op gives a sum, not each row's."""
    hidden, weight, _, target = inputs()
    use, log_probabilities = forms.PER_TOKEN[name], forms.LOG_PROBABILITIES["gather"]
    graphs = []
    rewrite(lambda h, w, y: use(log_probabilities(F.linear(h, w), y), y), graphs)(
        hidden, weight, target
    )
    assert ("'sum'" in graphs[1]) == (name in KNOWN_BEFORE)


def test_a_row_that_is_masked_may_have_any_loss():
    hidden, weight, bias, target = inputs()
    with torch.no_grad():
        bias[5] = -torch.inf

    def function(h, w, b, y):
        losses = forms.flat(F.linear(h, w, b), y, reduction="none")
        return losses.masked_fill(y.flatten() == 5, 0).mean()

    target[0, :3] = 5
    check(function, (hidden, weight, bias.detach(), target))


@pytest.mark.parametrize("name", forms.LOSSES)
def test_loss(name):
    hidden, weight, bias, target = inputs()
    loss = forms.LOSSES[name]
    check(
        lambda h, w, b, y: loss(F.linear(h, w, b).flatten(0, 1), y.flatten()),
        (hidden, weight, bias, target),
    )


# How many parts there are, what a row is: what these do is fixed when they are compiled.
FIXED = ("split", "tensor_split", "unbind", "temperature_by_row")


@pytest.mark.parametrize("name", [name for name in forms.CHAINS if name not in FIXED])
def test_chain_with_dynamic_shapes(name):
    """One compilation serves several batch sizes and lengths."""
    chain = forms.CHAINS[name]

    def function(h, w, y):
        return chain(F.linear(h, w), y)

    compiled = rewrite(function, dynamic=True)
    for batch, length in ((3, 7), (5, 7), (4, 9)):
        hidden, weight, _, target = inputs(batch=batch, length=length)
        torch._dynamo.mark_static(weight)  # as parameters of a module are
        check(function, (hidden, weight, target), compiled)


# Each mask is one node: of two equal ones, torch.compile itself loses track.
MASKS = {
    "all": (lambda y: y > 20, lambda z, y, m: F.cross_entropy(z[m], y[m])),
    "shifted": (
        lambda y: y[:, 1:] > 20,
        lambda z, y, m: F.cross_entropy(z[..., :-1, :][m].contiguous(), y[..., 1:][m]),
    ),
    "flat": (
        lambda y: y.view(-1) > 20,
        lambda z, y, m: F.cross_entropy(z.view(-1, V)[m], y.view(-1)[m]),
    ),
    "along": (
        lambda y: y[0] > 20,
        lambda z, y, m: F.cross_entropy(z[:, m].flatten(0, 1), y[:, m].flatten(), reduction="sum"),
    ),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("backend", ["rewrite", "inductor"])
def test_rows_chosen_by_a_mask(name, backend):
    hidden, weight, _, target = inputs()

    def function(h, w, y):
        mask, loss = MASKS[name]
        return loss(F.linear(h, w), y, mask(y))

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = rewrite(function) if backend == "rewrite" else torch.compile(function)
        check(function, (hidden, weight, target), compiled)


def test_hidden_states_chosen_by_a_mask():
    hidden, weight, _, target = inputs()

    def function(h, w, y):
        mask = y > 20
        return F.cross_entropy(F.linear(h[mask], w), y[mask])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        check(function, (hidden, weight, target))


def test_one_loss_over_a_vector():
    hidden, weight, bias, _ = inputs()
    vector, target = hidden[0, 0].detach().requires_grad_(), torch.tensor(5)
    check(lambda h, w, b, y: F.cross_entropy(F.linear(h, w, b), y), (vector, weight, bias, target))


def test_several_heads():
    hidden, weight, _, target = inputs()
    other = torch.randn(80, 16).requires_grad_()
    tensors = (hidden, weight, other, target)

    def function(h, w, v, y):
        return forms.flat(F.linear(h, w), y) + 0.3 * forms.flat(F.linear(h, v), y % 80)

    compiled = rewrite(function)
    results = reference.run(compiled, tensors)
    assert counters["lmhead_pass"] == {"rewritten": 2}
    exact = reference.run(function, [reference.leaf(t, _double(t)) for t in tensors])
    eager = reference.run(function, [reference.leaf(t) for t in tensors])
    reference.assert_no_worse(results, eager, exact, torch.float32)


def test_several_losses_of_one_head():
    """Multi-token prediction, or a loop over chunks of the logits."""
    hidden, weight, _, target = inputs()

    def function(h, w, y):
        logits = F.linear(h, w)
        first = forms.flat(logits[:, :3], y[:, :3], reduction="sum")
        return first + forms.flat(logits[:, 3:], y[:, 3:], reduction="sum")

    compiled = rewrite(function)
    results = reference.run(compiled, (hidden, weight, target))
    assert counters["lmhead_pass"] == {"rewritten": 2}
    tensors = (hidden, weight, target)
    exact = reference.run(function, [reference.leaf(t, _double(t)) for t in tensors])
    eager = reference.run(function, [reference.leaf(t) for t in tensors])
    reference.assert_no_worse(results, eager, exact, torch.float32)


def test_pass_can_run_again_on_its_own_result():
    hidden, weight, _, target = inputs()
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
    hidden, weight, _, target = inputs()

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
    hidden, weight, _, target = inputs()

    def function(h, w, y):
        h = h + w[y % forms.V, :]
        with torch.no_grad():
            loss = forms.flat(h @ w.T, y)
            w.mul_(1.1)
        return loss

    expected = function(hidden, weight.detach().clone().requires_grad_(), target)
    torch.testing.assert_close(rewrite(function)(hidden, weight, target), expected)
    assert counters["lmhead_pass"] == {"rewritten": 1}


def _double(tensor):
    return torch.float64 if tensor.is_floating_point() else None
