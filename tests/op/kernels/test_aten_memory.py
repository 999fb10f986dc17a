"""What the chunk loop in ATen allocates."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.memory import peak_bytes
from lmhead_pass.op.kernels import aten_loop as aten
from lmhead_pass.op.kernels.measures import parse_measures
from lmhead_pass.op.problem import Problem

from ..cases import VIEWS


def problem(tokens, vocab, weight=None, dtype=torch.float32):
    hidden, target = torch.randn(tokens, 64).to(dtype), torch.randint(vocab, (tokens,))
    if weight is None:
        weight = torch.randn(vocab, 64).to(dtype)
    options = ("none", -100, 0.0, -0.5, 30.0, "tanh", dtype, 64)
    return Problem(hidden, weight, None, target, *[None] * 5, *options)


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
