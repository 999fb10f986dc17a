"""Returned logits after scale, softcap, bias, cuts of the vocabulary, and writes in place."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import lmhead_pass
from lmhead_pass.returned.lazy_logits import LazyLogits

from .. import forms, reference
from ..backend import rewrite

V = forms.V


def mask_padding(z):
    z[..., 90:] = float("-inf")
    return z


def lower_padding(z):
    z[..., 90:] = -1e6
    return z


CHAINS = {
    "plain": lambda z, b: z,
    "float": lambda z, b: z.float(),
    "scaled": lambda z, b: z * 0.0625,
    "divided": lambda z, b: z / 0.7,
    "softcapped": lambda z, b: 30 * torch.tanh(z / 30),
    "softcapped_float": lambda z, b: torch.tanh(z.float() / 5) * 5,
    "sigmoid": lambda z, b: 30 * torch.sigmoid((z + 5) / 7.5),
    "negated": lambda z, b: 3 - z,
    "bias_added": lambda z, b: z + b,
    "bias_added_and_scaled": lambda z, b: (z + b) / 3,
    "cut": lambda z, b: z[..., :90],
    "cut_float": lambda z, b: z[..., 3:90].float(),
    "sliced": lambda z, b: (z / 2)[:, :-1],
    "sequence_first": lambda z, b: z.transpose(0, 1) * 2,
    "written": lambda z, b: z.div_(0.7),
    "padding_lowered_and_scaled": lambda z, b: lower_padding(z) / 0.5,
    "padding_masked": lambda z, b: mask_padding(z),
}


def model(name, h, w, b, y):
    logits = CHAINS[name](F.linear(h, w), b)
    if name == "sliced":
        y = y[:, 1:]
    if name == "sequence_first":
        y = y.t()
    loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten() % 80)
    return loss, logits


def run(compiled, tensors):
    loss, logits = compiled(*tensors)
    values = logits.detach().clone()
    loss.backward()
    return logits, [loss.detach(), *(t.grad for t in tensors[:3] if t.grad is not None)], values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("way", ["lazy", "detach"])
def test_values_and_gradients(name, way, dtype):
    def function(*args):
        return model(name, *args)

    tensors = forms.inputs(dtype)
    exact = run(function, reference.doubles(tensors))
    eager = run(function, list(map(reference.leaf, tensors)))
    graphs = []
    with lmhead_pass.config.patch(returned_logits=way):
        logits, results, values = run(rewrite(function, graphs), tensors)
    assert counters["lmhead_pass"] == {"rewritten": 1}
    assert isinstance(logits, LazyLogits) == (way == "lazy")
    assert logits.requires_grad == (way == "lazy")
    assert (values.dtype, values.shape) == (eager[2].dtype, eager[2].shape)
    if way == "lazy":
        assert torch.equal(values, eager[2])
    else:
        # In the same pass as the loss, and from the same product.
        assert graphs[1].count("torch.ops.lmhead_pass") == 1
        kept = torch.isfinite(exact[2])
        assert torch.equal(values[~kept], eager[2][~kept])
        reference.assert_no_worse([values[kept]], [eager[2][kept]], [exact[2][kept]], dtype)
    reference.assert_no_worse(results, eager[1], exact[1], dtype)


@pytest.mark.parametrize("name", ["softcapped", "bias_added", "cut"])
@pytest.mark.parametrize("way", ["lazy", "detach"])
def test_inductor(name, way):
    def function(*args):
        return model(name, *args)

    tensors = forms.inputs()
    expected = run(function, list(map(reference.leaf, tensors)))
    with lmhead_pass.config.patch(returned_logits=way):
        _, results, values = run(torch.compile(function), tensors)
    torch.testing.assert_close(values, expected[2])
    torch.testing.assert_close(results, expected[1])


def test_a_late_reading_is_refused():
    tensors = forms.inputs()
    loss, logits = rewrite(lambda *args: model("bias_added_and_scaled", *args))(*tensors)
    loss.backward()
    with torch.no_grad():
        tensors[2].add_(1)
    with pytest.raises(RuntimeError, match="bias was changed after the model ran"):
        logits.tolist()


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        (lambda z, b: z + b + b.detach(), "after a second bias or a mask of the vocabulary"),
        (lambda z, b: z.masked_fill(torch.arange(V) > 90, -torch.inf), "a mask of the vocabulary"),
        (lambda z, b: z.log_softmax(-1), "returns log-probabilities"),
    ],
    ids=["two biases", "mask", "log-probabilities"],
)
def test_what_cannot_be_lazy(chain, reason, caplog):
    def function(h, w, b, y):
        logits = chain(F.linear(h, w), b)
        return forms.flat(logits, y % 80), logits

    tensors = forms.inputs()
    with caplog.at_level("INFO", logger="lmhead_pass"):
        results = rewrite(function)(*tensors)
    assert counters["lmhead_pass"] == {"refused": 1}
    assert reason in caplog.text
    for result, expected in zip(results, function(*tensors), strict=True):
        assert torch.equal(result, expected)
