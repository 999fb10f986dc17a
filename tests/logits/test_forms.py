"""What is rewritten: every form gives the values and gradients of the model as it was written."""

import pytest
import torch
import torch.nn.functional as F

from .. import forms
from ..backend import rewrite
from ..checks import check

V = forms.V


@pytest.mark.parametrize("name", forms.HEADS)
def test_head(name):
    tensors = forms.inputs()
    if "bias" not in name and "keywords" not in name and "addmm" not in name:
        tensors[2].requires_grad_(False)
    check(forms.HEADS[name], tensors)


@pytest.mark.parametrize("name", forms.CHAINS)
def test_chain(name):
    hidden, weight, _, target = forms.inputs()
    chain = forms.CHAINS[name]
    check(lambda h, w, y: chain(F.linear(h, w), y), (hidden, weight, target))


@pytest.mark.parametrize("name", forms.WRITES)
def test_written_in_place(name):
    hidden, weight, _, target = forms.inputs()
    chain = forms.WRITES[name]
    check(lambda h, w, y: chain(F.linear(h, w), y), (hidden, weight, target))


@pytest.mark.parametrize("name", forms.LOG_PROBABILITIES)
def test_log_probabilities(name):
    hidden, weight, bias, target = forms.inputs()
    log_probabilities = forms.LOG_PROBABILITIES[name]
    upstream = torch.randn(target.shape)
    check(
        lambda h, w, b, y: (log_probabilities(F.linear(h, w, b), y) * upstream).square().sum(),
        (hidden, weight, bias, target),
    )


@pytest.mark.parametrize("name", forms.PER_TOKEN)
def test_per_token(name):
    hidden, weight, _, target = forms.inputs()
    use, log_probabilities = forms.PER_TOKEN[name], forms.LOG_PROBABILITIES["gather"]
    check(lambda h, w, y: use(log_probabilities(F.linear(h, w), y), y), (hidden, weight, target))


KNOWN_BEFORE = {
    *("mean", "masked", "where", "where_not", "where_method", "masked_fill"),
    *("by_sequence", "weights", "items"),
}


@pytest.mark.parametrize("name", forms.PER_TOKEN)
def test_weights_that_are_known_before_the_loss(name):
    """Those losses have their gradients with three products: the op gives a sum, not each row's."""
    hidden, weight, _, target = forms.inputs()
    use, log_probabilities = forms.PER_TOKEN[name], forms.LOG_PROBABILITIES["gather"]
    graphs = []
    rewrite(lambda h, w, y: use(log_probabilities(F.linear(h, w), y), y), graphs)(
        hidden, weight, target
    )
    assert ("'sum'" in graphs[1]) == (name in KNOWN_BEFORE)


def test_a_row_that_is_masked_may_have_any_loss():
    hidden, weight, bias, target = forms.inputs()
    with torch.no_grad():
        bias[5] = -torch.inf

    def function(h, w, b, y):
        losses = forms.flat(F.linear(h, w, b), y, reduction="none")
        return losses.masked_fill(y.flatten() == 5, 0).mean()

    target[0, :3] = 5
    check(function, (hidden, weight, bias.detach(), target))


@pytest.mark.parametrize("name", forms.LOSSES)
def test_loss(name):
    hidden, weight, bias, target = forms.inputs()
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
        hidden, weight, _, target = forms.inputs(batch=batch, length=length)
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
    hidden, weight, _, target = forms.inputs()

    def function(h, w, y):
        mask, loss = MASKS[name]
        return loss(F.linear(h, w), y, mask(y))

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = rewrite(function) if backend == "rewrite" else torch.compile(function)
        check(function, (hidden, weight, target), compiled)


def test_hidden_states_chosen_by_a_mask():
    hidden, weight, _, target = forms.inputs()

    def function(h, w, y):
        mask = y > 20
        return F.cross_entropy(F.linear(h[mask], w), y[mask])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        check(function, (hidden, weight, target))


def test_one_loss_over_a_vector():
    hidden, weight, bias, _ = forms.inputs()
    vector, target = hidden[0, 0].detach().requires_grad_(), torch.tensor(5)
    check(lambda h, w, b, y: F.cross_entropy(F.linear(h, w, b), y), (vector, weight, bias, target))
