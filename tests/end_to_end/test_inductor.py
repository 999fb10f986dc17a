"""The rewritten graph under Inductor: training and evaluation as users run them."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import lmhead_pass

from .. import reference
from ..forms import V, flat
from ..model import Model

pytestmark = pytest.mark.codegen


def gradients(model, *args, scale=1.0, **kwargs):
    """The loss, and the gradient of every parameter that has one."""
    model.zero_grad()
    loss = model(*args, **kwargs)
    (loss * scale).sum().backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def check_training(model, tokens, dtype=torch.float32, compile_options=None, **kwargs):
    compiled = torch.compile(model, **(compile_options or {}))
    results = gradients(compiled, tokens, **kwargs)
    assert counters["lmhead_pass"] == {"rewritten": 1}
    with lmhead_pass.disabled():
        torch._dynamo.reset()
        unfused = gradients(torch.compile(model), tokens, **kwargs)
    assert counters["lmhead_pass"] == {"rewritten": 1}
    kwargs.pop("autocast", None)
    exact = gradients(_double(model), tokens, **kwargs)
    reference.assert_no_worse(results, unfused, exact, dtype)
    assert [r.dtype for r in results] == [r.dtype for r in unfused]


def _double(model):
    copy = Model(bias=model.head.bias is not None)
    if model.head.weight is model.embedding.weight:
        copy.head.weight = copy.embedding.weight
    copy.load_state_dict(model.state_dict())
    copy.head.requires_grad_(model.head.weight.requires_grad)
    copy.double()
    # The model casts its logits to FP32; the exact one must not.
    copy.head.register_forward_hook(lambda module, args, output: _NoFloat(output))
    return copy


class _NoFloat:
    """Stands for logits whose ``float()`` keeps them as they are."""

    def __init__(self, logits):
        self.logits = logits

    def float(self):
        return self.logits


@pytest.fixture
def tokens():
    return torch.randint(V, (3, 7))


KINDS = [{}, {"tied": True}, {"frozen": True}, {"bias": True}]
OFTEN = [
    ({}, "mean"),
    ({"tied": True}, "sum"),
    ({"frozen": True}, "none"),
    ({"bias": True}, "mean"),
]


@pytest.mark.parametrize(
    ("kind", "reduction"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] * (case not in OFTEN))
        for case in product(KINDS, ["mean", "sum", "none"])
    ],
    ids=str,
)
def test_training(kind, reduction, tokens):
    check_training(Model(**kind), tokens, reduction=reduction, scale=1 / 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", pytest.param("none", marks=pytest.mark.slow)])
def test_training_in_a_narrow_dtype(dtype, reduction, tokens):
    check_training(Model(bias=True).to(dtype), tokens, dtype, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", pytest.param("none", marks=pytest.mark.slow)])
@pytest.mark.parametrize("inside", [True, False])
def test_training_under_autocast(inside, reduction, tokens):
    """The products are in BF16; the FP32 parameters get gradients that are sums in FP32."""
    model = Model(bias=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        check_training(model, tokens, torch.bfloat16, reduction=reduction, autocast=inside)


def test_whole_graph(tokens):
    check_training(Model(), tokens, compile_options={"fullgraph": True})


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_evaluation(mode, reduction, tokens):
    model = Model()
    with mode():
        loss = torch.compile(model)(tokens, reduction)
        expected = model(tokens, reduction)
    assert counters["lmhead_pass"] == {"rewritten": 1}
    torch.testing.assert_close(loss, expected)
    assert not loss.requires_grad


def test_one_compilation_for_several_sizes():
    model = Model(tied=True)
    compiled = torch.compile(model, dynamic=True)
    for batch, length in ((3, 7), (5, 9), (2, 12)):
        tokens = torch.randint(V, (batch, length))
        results = gradients(compiled, tokens)
        for result, expected in zip(results, gradients(model, tokens), strict=True):
            torch.testing.assert_close(result, expected)
    assert counters["lmhead_pass"] == {"rewritten": 1}
    assert counters["stats"]["unique_graphs"] == 1


def test_functions_of_plain_tensors_with_dynamic_sizes():
    """Here the sizes of the weight are dynamic too."""
    function = torch.compile(
        lambda h, w, y: F.cross_entropy(F.linear(h, w)[:, 1:].flatten(0, 1), y[:, 1:].flatten()),
        dynamic=True,
    )
    for batch, hidden, vocab in ((3, 16, 97), (4, 24, 130)):
        tensors = [torch.randn(batch, 5, hidden), torch.randn(vocab, hidden)]
        leaves = [t.requires_grad_() for t in tensors] + [torch.randint(vocab, (batch, 5))]
        results = reference.run(function, leaves)
        expected = reference.run(
            lambda h, w, y: F.cross_entropy((h @ w.t())[:, 1:].flatten(0, 1), y[:, 1:].flatten()),
            [reference.leaf(t) for t in leaves],
        )
        for result, exact in zip(results, expected, strict=True):
            torch.testing.assert_close(result, exact)
    assert counters["lmhead_pass"] == {"rewritten": 1}


def test_second_backward(tokens):
    model = Model()
    loss = torch.compile(model)(tokens)
    loss.backward(retain_graph=True)
    once = model.head.weight.grad.clone()
    loss.backward()
    assert torch.equal(model.head.weight.grad, 2 * once)
    assert counters["lmhead_pass"] == {"rewritten": 1}


def test_out_of_range_target_is_an_index_error(tokens):
    tokens[1, 2] = V

    def function(hidden, weight, tokens):
        return flat(F.linear(hidden, weight), tokens)

    hidden, weight = torch.randn(3, 7, 16), torch.randn(V, 16)
    with pytest.raises(IndexError) as eager:
        function(hidden, weight, tokens)
    with pytest.raises(IndexError) as ours:
        torch.compile(function)(hidden, weight, tokens)
    assert str(ours.value) == str(eager.value)


def test_all_tokens_ignored():
    """A micro-batch of prompts alone: the loss is NaN, the gradients are zero, as in eager."""
    model = Model()
    hidden, target = torch.randn(3, 7, 16), torch.full((3, 7), -100)
    function = torch.compile(lambda h, y: flat(model.head(h), y))
    loss = function(hidden, target)
    loss.backward()
    assert loss.isnan()
    assert not model.head.weight.grad.any()
    assert counters["lmhead_pass"] == {"rewritten": 1}


def test_training_follows_the_unfused_model():
    """Twenty steps of AdamW with gradient accumulation: the losses stay together."""

    def losses():
        torch.manual_seed(1)
        model = Model(tied=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        compiled = torch.compile(model)
        history = []
        for _ in range(20):
            for _ in range(2):
                loss = compiled(torch.randint(V, (3, 7)))
                (loss / 2).backward()
                history.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        return torch.tensor(history)

    ours = losses()
    assert counters["lmhead_pass"] == {"rewritten": 1}
    torch._dynamo.reset()
    with lmhead_pass.disabled():
        unfused = losses()
    assert ours[-4:].mean() < 0.9 * ours[:4].mean()
    torch.testing.assert_close(ours, unfused)
