"""The promise on memory, counted in bytes of tensor allocations."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import lmhead_pass
from lmhead_pass.op.kernels import aten_loop as aten
from lmhead_pass.op.kernels.measures import parse_measures
from lmhead_pass.op.problem import Problem

from .test_op import VIEWS


def peak_bytes(step):
    """The largest number of bytes that live at once in what ``step`` allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def scratch(tokens, hidden_size, vocab, dtype=torch.float32):
    """Peak bytes of a compiled forward and backward beyond inputs and gradients."""
    hidden = torch.randn(tokens, hidden_size).to(dtype).requires_grad_()
    weight = torch.randn(vocab, hidden_size).to(dtype).requires_grad_()
    target = torch.randint(vocab, (tokens,))
    torch._dynamo.reset()
    function = torch.compile(lambda h, w, y: F.cross_entropy(F.linear(h, w), y))
    function(hidden, weight, target).backward()
    hidden.grad = weight.grad = None
    peak = peak_bytes(lambda: function(hidden, weight, target).backward())
    return peak - hidden.grad.nbytes - weight.grad.nbytes


def test_training_step_holds_a_fraction_of_the_logits():
    logits = 4096 * 32000 * 4
    assert scratch(4096, 512, 32000) <= 0.15 * logits
    with lmhead_pass.disabled():
        assert scratch(4096, 512, 32000) >= 0.99 * logits


def in_pieces(h, w, y):
    """As torchtune and torchtitan take the loss: the logits of a piece at a time."""
    pieces = zip(h.chunk(8), y.chunk(8), strict=True)
    return sum(F.cross_entropy(F.linear(p, w), t, reduction="sum") for p, t in pieces) / len(y)


def masked(h, w, y):
    losses = F.cross_entropy(F.linear(h, w), y, reduction="none")
    mask = (y > 9).float()
    return (losses * mask).sum() / mask.sum()


def z_loss(h, w, y):
    logits = F.linear(h, w)
    return F.cross_entropy(logits, y) + 1e-4 * logits.logsumexp(-1).square().mean()


def log_probabilities(h, w, y):
    logits = torch.tanh(F.linear(h, w) / 30) * 30
    chosen = logits.gather(-1, y[:, None]).squeeze(-1) - logits.logsumexp(-1)
    return (torch.exp(chosen - chosen.detach()) * (y > 9)).mean()


@pytest.mark.parametrize(
    "function", [in_pieces, masked, z_loss, log_probabilities], ids=lambda f: f.__name__
)
def test_every_form_holds_a_fraction_of_the_logits(function):
    """And one gradient of the weight, which in eight would be as large as the logits."""
    tokens, hidden_size, vocab = 2048, 256, 16384
    logits, gradient = tokens * vocab * 4, vocab * hidden_size * 4
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, requires_grad=True)
    target = torch.randint(vocab, (tokens,))
    with lmhead_pass.config.patch(batch_chunk_size=64):
        compiled = torch.compile(function)
        compiled(hidden, weight, target).backward()
    hidden.grad = weight.grad = None
    peak = peak_bytes(lambda: compiled(hidden, weight, target).backward())
    # The gradient of the weight, perhaps beside what it is scaled to, and hidden states twice.
    allowed = 2 * gradient + 3 * hidden.nbytes + 0.15 * logits
    assert allowed < 0.5 * logits
    assert peak <= allowed


def test_evaluation_holds_one_chunk():
    hidden, weight = torch.randn(4096, 64), torch.randn(8192, 64)
    target = torch.randint(8192, (4096,))
    function = torch.compile(lambda h, w, y: F.cross_entropy(F.linear(h, w), y))
    with torch.no_grad(), lmhead_pass.config.patch(batch_chunk_size=128):
        function(hidden, weight, target)
        chunk = 128 * 8192 * 4
        assert peak_bytes(lambda: function(hidden, weight, target)) <= 1.25 * chunk


def test_memory_budget_is_kept():
    with lmhead_pass.config.patch(memory_budget=2_000_000):
        rows = 2_000_000 // (8192 * 4)
        assert scratch(2048, 64, 8192) <= rows * 8192 * 4 + 2_000_000  # and what is left of hidden


def problem(tokens, vocab, weight=None, dtype=torch.float32):
    hidden, target = torch.randn(tokens, 64).to(dtype), torch.randint(vocab, (tokens,))
    if weight is None:
        weight = torch.randn(vocab, 64).to(dtype)
    options = ("none", -100, 0.0, -0.5, 30.0, dtype, 64)
    return Problem(hidden, weight, None, target, *[None] * 4, *options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", VIEWS)
def test_a_weight_that_is_a_view_is_not_copied(dtype, layout):
    plain = torch.randn(8192, 64).to(dtype)

    def peak(weight):
        given = problem(64, 8192, weight, dtype)
        forward = peak_bytes(lambda: aten.forward(given, []))
        _, row_max, log_sum = aten.forward(given, [])
        needed, upstream = [True, True, False], torch.rand(64)
        return forward, peak_bytes(
            lambda: aten.backward(given, needed, row_max, log_sum, upstream, None)
        )

    assert peak(VIEWS[layout](plain)) == peak(plain)
    copied = peak(plain.to(torch.float64))  # so it is where the products have another dtype
    assert copied[0] >= peak(plain)[0] + plain.nbytes


@pytest.mark.parametrize("ignored", [0, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_the_only_thing_of_their_size(dtype, ignored, monkeypatch):
    """Beside them, one chunk of logits in each pass, and blocks of rows that stay in caches."""
    monkeypatch.setattr(aten, "_BLOCK_BYTES", 1 << 18)
    tokens, vocab = 1024, 8192
    given = problem(tokens, vocab, dtype=dtype)
    given.target[:ignored] = -100
    every = parse_measures(["logsumexp", "argmax", "max", "entropy", "logits"])
    logits = tokens * vocab * dtype.itemsize
    chunk = 64 * vocab * dtype.itemsize
    blocks = 4 * aten._BLOCK_BYTES
    # A CPU without BF16 instructions makes a BF16 product by way of FP32.
    product = peak_bytes(lambda: F.linear(given.hidden[:64], given.weight))
    peak = peak_bytes(lambda: aten.forward(given, every))
    assert logits + chunk <= peak <= logits + product + blocks
    assert chunk <= product and product + blocks < logits / 2

    assert peak_bytes(lambda: aten.forward(given, every[:-1])) <= peak - logits
