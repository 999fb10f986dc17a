"""The weight's gradient for some words at a time, with one product more and no sum of its size."""

import pytest
import torch

from benchmarks.memory import peak_bytes
from lmhead_pass.op import holding
from lmhead_pass.op.kernels import aten_loop, dispatch

from .. import reference
from ..device import DEVICE, SUITE
from .cases import DTYPES, call, tensors

triton_loop = pytest.importorskip("lmhead_pass.op.kernels.triton_loop")

# The interpreter computes with numpy, which warns of what the device does in silence.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), *SUITE]

LOOPS = {
    "aten": (aten_loop, False),
    "logits": (triton_loop, False),
    "exponentials": (triton_loop, True),
}
WORDS = 40  # 40, 40 and 21 of 101
BY_ROW = ["coefficient", "logsumexp_coefficient", "z_loss"]
OPTIONS = {
    "mean": {},
    "cap": {"reduction": "mean", "logit_scale": -0.5, "softcap": 3.0},
    "ignored": {"ignore_index": 5},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
}


@pytest.fixture
def loop(request, monkeypatch):
    loop, is_hopper = LOOPS[request.param]
    monkeypatch.setattr(holding, "_is_hopper", lambda device: is_hopper)
    monkeypatch.setattr(dispatch, "loop_for", lambda device: loop)


def inputs(dtype, bias, names=()):
    """Hidden, weight, bias, target, and of the tensors that may follow those with these names."""
    *leaves, target = tensors(dtype, bias=bias)
    target[1::5] = 5
    some = {"class_weight": torch.rand(101) + 0.5, "fill": torch.full((101,), torch.nan)}
    some |= {name: torch.randn(37) for name in BY_ROW}
    some["fill"][::3] = 0.5
    given = [*leaves, target, *(some[name] if name in names else None for name in some)]
    given[5:] = given[6:] + given[5:6]  # the mask comes last
    return [
        t if t is None else t.detach().to(DEVICE).requires_grad_(t.requires_grad) for t in given
    ]


def assert_no_worse(given, options, upstream=None):
    def plain(*args):
        return reference.linear_cross_entropy(*args, **options)

    exact = reference.run(plain, reference.doubles(given), upstream)
    unfused = reference.run(plain, [reference.leaf(t) for t in given], upstream)
    given = [reference.leaf(t) for t in given]
    results = reference.run(
        lambda *args: call(*args, **options, rows=20, words=WORDS), given, upstream
    )
    cuts = DEVICE == "cpu" and given[0].dtype == torch.bfloat16  # so does Triton's interpreter
    reference.assert_no_worse(results, unfused, exact, given[0].dtype, roundings=1.5 if cuts else 1)


def on(*loops):
    """Runs on these loops. Triton's interpreter takes a second for each block of words."""

    def mark(test):
        return pytest.mark.usefixtures("loop")(
            pytest.mark.parametrize("loop", loops, indirect=True)(test)
        )

    return mark


CASES = [
    *(("aten", dtype, options) for dtype in DTYPES[1:] for options in OPTIONS),
    ("logits", torch.bfloat16, "cap"),
    ("exponentials", torch.bfloat16, "mean"),
    ("exponentials", torch.float16, "none"),
]


@pytest.mark.parametrize(("loop", "dtype", "options"), CASES, indirect=["loop"], ids=str)
@pytest.mark.usefixtures("loop")
def test_loss_and_gradients(dtype, options):
    upstream = torch.randn(37, device=DEVICE) if options == "none" else None
    given = inputs(dtype, bias=options != "mean")
    if options == "ignored":
        given[3].clamp_(min=5)  # 5 has no loss then, where -100 had none
    assert_no_worse(given, OPTIONS[options], upstream)


@pytest.mark.parametrize("names", [["class_weight"], [*BY_ROW, "fill"]], ids=str)
@on("aten", "exponentials")
def test_rows_and_words_that_differ(names):
    options = {"reduction": "sum"} if names[0] in BY_ROW else {}
    assert_no_worse(inputs(torch.bfloat16, True, names), options)


@on("aten")
def test_gradient_of_a_log_sum_exp():
    given = inputs(torch.bfloat16, bias=False)
    options = {"reduction": "none"}
    upstream = torch.randn(37, device=DEVICE)

    def plain(*args):
        loss = reference.linear_cross_entropy(*args, **options)
        return loss + reference.logits(*args[:3]).logsumexp(1)

    def ours(*args):
        return sum(call(*args, **options, words=WORDS, measures=["logsumexp"]))

    exact = reference.run(plain, reference.doubles(given), upstream)
    unfused, results = (
        reference.run(function, [reference.leaf(t) for t in given], upstream)
        for function in (plain, ours)
    )
    reference.assert_no_worse(results, unfused, exact, torch.bfloat16, roundings=1.5)


@pytest.mark.parametrize("tokens", [0, 6])
@on("aten")
def test_no_row_counts(tokens):
    hidden, weight, _, target = (
        t if t is None else t.detach().to(DEVICE) for t in tensors(torch.bfloat16, tokens)
    )
    target.fill_(-100)
    hidden, weight = (t.requires_grad_() for t in (hidden, weight))
    call(hidden, weight, None, target, reduction="sum", rows=40, words=WORDS).backward()
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@on("aten")
def test_opcheck(reduction):
    given = inputs(torch.bfloat16, bias=False)
    *leaves, target = given[:4]
    problem = (*(t if t is None else t.detach() for t in leaves), target, *[None] * 5, reduction)
    problem += (-100, 0.0, 1.0, None, "tanh", torch.bfloat16, 10)
    ops, checks = torch.ops.lmhead_pass, ("test_schema", "test_faketensor")
    arguments = (*problem, [True, True, False], [])
    function = ops._forward_and_gradients
    if reduction == "none":
        _, row_max, log_sum = ops._forward(*problem, [])
        arguments = (*arguments[:-1], row_max, log_sum, torch.ones_like(row_max), None)
        function = ops._backward
    torch.library.opcheck(
        function.default, arguments, {"vocab_chunk_size": WORDS}, test_utils=checks
    )


@pytest.mark.skipif(DEVICE != "cpu", reason="counts what the CPU allocates")
@on("aten")
def test_no_sum_of_the_size_of_the_weight():
    """Beside the gradients, only logits of a chunk and the sum for a block of words."""
    tokens, size, vocab, rows, words = 32, 256, 2048, 8, 256
    problem = (torch.randn(tokens, size).bfloat16(), torch.randn(vocab, size).bfloat16(), None)
    problem += (torch.randint(vocab, (tokens,)), *[None] * 5, "mean", -100, 0.0, 1.0, None, "tanh")
    problem += (torch.bfloat16, rows, [True, True, False], [])

    def peak(**given):
        ops = torch.ops.lmhead_pass
        return peak_bytes(lambda: ops._forward_and_gradients(*problem, **given))

    peak()
    fp32_sum = 4 * size * vocab
    assert peak() >= 1.5 * fp32_sum
    # A CPU without BF16 instructions makes products by way of FP32, which takes scratch of its own.
    assert peak(vocab_chunk_size=words) <= peak() - fp32_sum / 2
