"""What only a GPU can show. ``python -m pytest -m gpu`` runs it, and skips it without one."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import lmhead_pass
from lmhead_pass.op.kernels.wide_products import multiply_into

from .. import reference

pytest.importorskip("lmhead_pass.op.kernels.triton_loop")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CUDA = torch.device("cuda")
MEASURES = [
    *("logsumexp", "argmax", "max", "entropy", "logits", "losses"),
    *("topk_values:3", "topk_indices:3"),
]


def _inputs(dtype=torch.bfloat16, tokens=1000, hidden=256, vocab=5003, device=CUDA):
    target = torch.randint(vocab, (tokens,), device=device)
    target[::7] = -100
    leaves = (
        torch.randn(tokens, hidden, device=device).to(dtype).requires_grad_(),
        (torch.randn(vocab, hidden, device=device) / 16).to(dtype).requires_grad_(),
    )
    return *leaves, target


def _head(hidden, weight, target, reduction="mean"):
    return F.cross_entropy(F.linear(hidden, weight).float(), target, reduction=reduction)


def _op(hidden, weight, target, reduction="mean", rows=256, softcap=None):
    return torch.ops.lmhead_pass.linear_cross_entropy(
        *(hidden, weight, None, target, *[None] * 5, reduction, -100, 0.0, 1.0, softcap, "tanh"),
        *(hidden.dtype, rows),
    )


def _op_with_measures(hidden, weight, target, reduction="mean", rows=256):
    loss, lse, *_ = torch.ops.lmhead_pass.linear_cross_entropy_and_measures(
        *(hidden, weight, None, target, *[None] * 5, reduction, -100, 0.0, 0.5, 30.0, "tanh"),
        *(hidden.dtype, rows, MEASURES),
    )
    return loss + lse if reduction == "none" else loss


def _op_with_terms(hidden, weight, target, reduction="sum", rows=256):
    """With a term of each row's log-sum-exp, and with a z-loss, which FP16 does not have."""
    factors = hidden.new_full((2, len(target)), 0.01)
    linear, square = factors if hidden.dtype != torch.float16 else (factors[0], None)
    return torch.ops.lmhead_pass.linear_cross_entropy(
        *(hidden, weight, None, target, None, None, linear, square, None),
        *(reduction, -100, 0.0, 0.5, 30.0, "tanh", hidden.dtype, rows),
    )


def _op_with_z_loss(hidden, weight, target, reduction="sum", rows=256):
    z_loss = hidden.new_full((len(target),), 0.01) if hidden.dtype != torch.float16 else None
    return torch.ops.lmhead_pass.linear_cross_entropy(
        *(hidden, weight, None, target, None, None, None, z_loss, None),
        *(reduction, -100, 0.0, 1.0, None, "tanh", hidden.dtype, rows),
    )


def _op_with_softcap(hidden, weight, target, reduction="mean", rows=256):
    return _op(hidden, weight, target, reduction, rows, softcap=30.0)


def _op_with_mask(hidden, weight, target, reduction="mean", rows=256):
    """Masked words, among them targets."""
    return torch.ops.lmhead_pass.linear_cross_entropy(
        *(hidden, weight, None, target, *[None] * 4, _fill(hidden), reduction, -100, 0.0, 1.0),
        *(None, "tanh", hidden.dtype, rows),
    )


def _fill(hidden, vocab=5003):
    words = torch.arange(vocab, device=hidden.device)
    return torch.full((vocab,), torch.nan, device=hidden.device).masked_fill(words % 7 == 0, 0.5)


def _op_with_algebraic_softcap(hidden, weight, target, reduction="mean", rows=256):
    return torch.ops.lmhead_pass.linear_cross_entropy(
        *(hidden, weight, None, target, *[None] * 5, reduction, -100, 0.0, 1.0),
        *(3.0, "algebraic", hidden.dtype, rows),
    )


def _op_by_words(hidden, weight, target, reduction="mean", rows=256):
    return torch.ops.lmhead_pass.linear_cross_entropy(
        *(hidden, weight, None, target, *[None] * 5, reduction, -100, 0.0, 1.0),
        *(None, "tanh", hidden.dtype, rows),
        vocab_chunk_size=1024,
    )


FUNCTIONS = (
    *(_op, _op_with_softcap, _op_with_measures),
    *(_op_with_mask, _op_with_algebraic_softcap, _op_by_words),
)
EVERY_PATH = [
    *((function, how) for function in FUNCTIONS for how in ("mean", "none")),
    (_op_with_terms, "sum"),
    (_op_with_z_loss, "sum"),
]


def _gradients(function, leaves, target, upstream, **options):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    loss = function(*leaves, target, **options)
    loss.backward(upstream.to(loss.dtype) if loss.dim() else None)
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def _exact(leaves, target, upstream, **options):
    def plain(hidden, weight, target, **options):
        return reference.linear_cross_entropy(hidden, weight, None, target, **options)

    return _gradients(plain, [leaf.double() for leaf in leaves], target, upstream, **options)


@pytest.fixture
def no_sync():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rows", [256, 4096])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype, reduction, rows):
    *leaves, target = _inputs(dtype)
    upstream = torch.randn(target.numel(), device=CUDA)
    results = _gradients(_op, leaves, target, upstream, reduction=reduction, rows=rows)
    unfused = _gradients(_head, leaves, target, upstream, reduction=reduction)
    exact = _exact(leaves, target, upstream, reduction=reduction)
    reference.assert_no_worse(results, unfused, exact, dtype)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("what", ["fill", "algebraic"])
def test_values_of_masks_and_caps(what, dtype, reduction):
    *leaves, target = _inputs(dtype)
    upstream = torch.randn(target.numel(), device=CUDA)
    function, options = _op_with_algebraic_softcap, {"softcap": 3.0, "softcap_kind": "algebraic"}
    if what == "fill":
        function, options = _op_with_mask, {"fill": _fill(target)}

    def plain(hidden, weight, target):
        given = (hidden, weight, None, target)
        return reference.linear_cross_entropy(*given, **options, reduction=reduction)

    results = _gradients(function, leaves, target, upstream, reduction=reduction)
    unfused = _gradients(plain, leaves, target, upstream)
    exact = _gradients(plain, [leaf.double() for leaf in leaves], target, upstream)
    reference.assert_no_worse(results, unfused, exact, dtype)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gradients_by_words(dtype, reduction):
    *leaves, target = _inputs(dtype)
    upstream = torch.randn(target.numel(), device=CUDA)
    results = _gradients(_op_by_words, leaves, target, upstream, reduction=reduction)
    unfused = _gradients(_head, leaves, target, upstream, reduction=reduction)
    exact = _exact(leaves, target, upstream, reduction=reduction)
    reference.assert_no_worse(results, unfused, exact, dtype)


@pytest.mark.parametrize("reads", [False, True])
def test_lazy_logits(reads):
    """Logits that leave a compiled function, with a loss that is taken of them outside."""
    *leaves, target = _inputs()
    compiled = torch.compile(F.linear)

    def loss_outside(hidden, weight, target):
        logits = compiled(hidden, weight)
        if reads:
            torch.testing.assert_close(logits.detach() * 1, F.linear(hidden, weight).detach())
        return F.cross_entropy(logits, target)

    results = _gradients(loss_outside, leaves, target, None)
    assert torch._dynamo.utils.counters["lmhead_pass"]["deferred"] == 1
    unfused = _gradients(_head, leaves, target, None)
    exact = _exact(leaves, target, None)
    # The loss of logits in BF16 is in BF16.
    reference.assert_no_worse(results, [unfused[0].bfloat16(), *unfused[1:]], exact, torch.bfloat16)


def test_no_step_with_lazy_logits_waits_for_the_device(request):
    *leaves, target = _inputs()
    compiled = torch.compile(F.linear)

    def step():
        return _gradients(lambda h, w, y: F.cross_entropy(compiled(h, w), y), leaves, target, None)

    step()  # compiles
    request.getfixturevalue("no_sync")
    step()


def test_lazy_inputs():
    """A compiled loss that is given such logits is run as it is, and fused."""
    *leaves, target = _inputs()
    head, loss = torch.compile(F.linear), torch.compile(lambda z, y: F.cross_entropy(z.float(), y))
    results = _gradients(lambda h, w, y: loss(head(h, w), y), leaves, target, None)
    counts = torch._dynamo.utils.counters["lmhead_pass"]
    assert (counts["deferred"], counts["rewritten"]) == (1, 1)
    unfused = _gradients(_head, leaves, target, None)
    reference.assert_no_worse(results, unfused, _exact(leaves, target, None), torch.bfloat16)


@pytest.mark.parametrize("size", [64, 61])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_into_fp32(dtype, size):
    def padded(dtype):
        return torch.full((64, 80), float("nan"), device=CUDA, dtype=dtype)[:size, :size]

    a, b = (padded(dtype).copy_(torch.randn(size, size)) for _ in range(2))
    exact = a.double() @ b.double()
    close = partial(torch.testing.assert_close, rtol=0)
    out = padded(torch.float32)
    multiply_into(out, a, b)
    close(out.double(), exact, atol=1e-5 * exact.abs().max().item())
    multiply_into(out, a, b, add=True)
    close(out.double(), 2 * exact, atol=2e-5 * exact.abs().max().item())
    for left in (a, padded(dtype).t().copy_(a)):
        narrow = padded(dtype)
        multiply_into(narrow, left, b)
        close(narrow.double(), exact, atol=torch.finfo(dtype).eps * exact.abs().max().item())


def test_fp32_products_follow_the_tf32_setting():
    *leaves, target = _inputs(torch.float32)
    losses = {}
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            losses[precision] = _op(*leaves, target)
    finally:
        torch.set_float32_matmul_precision(before)
    assert losses["highest"] != losses["high"]


@pytest.mark.parametrize(("function", "reduction"), EVERY_PATH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nothing_waits_for_the_device(dtype, reduction, function, no_sync):
    *leaves, target = _inputs(dtype)
    upstream = torch.ones(target.numel(), device=CUDA)
    _gradients(function, leaves, target, upstream, reduction=reduction)


@pytest.mark.parametrize(("function", "reduction"), EVERY_PATH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_captured_in_a_cuda_graph(dtype, reduction, function):
    *leaves, target = _inputs(dtype)
    upstream = torch.ones(target.numel(), device=CUDA)
    expected = _gradients(function, leaves, target, upstream, reduction=reduction)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = _gradients(function, leaves, target, upstream, reduction=reduction)
    graph.replay()
    assert all(map(torch.equal, results, expected))
    # Replayed for other tensors in the same memory, with another number of rows that count.
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(0.5)
        target[:100] = -100
    graph.replay()
    for result, again in zip(
        results, _gradients(function, leaves, target, upstream, reduction=reduction), strict=True
    ):
        assert torch.equal(result, again)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_model(mode):
    *leaves, target = _inputs()
    with lmhead_pass.config.patch(batch_chunk_size=256):
        compiled = torch.compile(_head, mode=mode)
        for _ in range(4):  # warm-up, capture, replays
            torch.compiler.cudagraph_mark_step_begin()
            results = _gradients(compiled, leaves, target, None)
            results = [result.clone() for result in results]
    counters = torch._dynamo.utils.counters
    assert counters["lmhead_pass"]["rewritten"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0
    unfused = _gradients(_head, leaves, target, None)
    reference.assert_no_worse(results, unfused, _exact(leaves, target, None), torch.bfloat16)


def test_on_another_stream():
    *leaves, target = _inputs()
    expected = _gradients(_op, leaves, target, None)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # what runs on another stream would be done before this
        late = [leaf.detach() * 1 for leaf in leaves]
        results = _gradients(_op, late, target, None)
    stream.synchronize()
    assert all(map(torch.equal, results, expected))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_on_a_device_that_is_not_current():
    *leaves, target = _inputs(device=torch.device("cuda:1"))
    assert torch.cuda.current_device() == 0
    results = _gradients(_op, leaves, target, None)
    unfused = _gradients(_head, leaves, target, None)
    reference.assert_no_worse(results, unfused, _exact(leaves, target, None), torch.bfloat16)


TUNABLE = """
import torch
import lmhead_pass
from tests.end_to_end import test_gpu

assert torch.cuda.tunable.is_enabled()
for function in (test_gpu._op, test_gpu._op_with_softcap):
    *leaves, target = test_gpu._inputs()
    results = test_gpu._gradients(function, leaves, target, None)
    torch.cuda.tunable.enable(False)
    expected = test_gpu._gradients(function, leaves, target, None)
    torch.cuda.tunable.enable(True)
    for result, other in zip(results, expected, strict=True):
        torch.testing.assert_close(result, other, rtol=0.02, atol=other.abs().max().item() / 100)
"""


def test_under_tunable_op(tmp_path):
    """In libtorch 2.11 is a message "Tunable GEMM is not supported for float output with reduced
    float input"."""
    tuning = {"PYTORCH_TUNABLEOP_ENABLED": "1", "PYTORCH_TUNABLEOP_MAX_TUNING_ITERATIONS": "2"}
    tuning["PYTORCH_TUNABLEOP_FILENAME"] = str(tmp_path / "tuned.csv")
    program = [sys.executable, "-c", TUNABLE]
    done = subprocess.run(program, env=os.environ | tuning, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


OUT_OF_RANGE = """
import torch, lmhead_pass
target = torch.zeros(8, dtype=torch.long, device="cuda")
target[3] = {bad}
loss = torch.ops.lmhead_pass.linear_cross_entropy(
    torch.randn(8, 16, device="cuda"), torch.randn(100, 16, device="cuda"), None, target,
    *[None] * 5, "mean", -100, 0.0, 1.0, None, "tanh", torch.float32, 8,
)
print("a number:", loss.item())
"""


@pytest.mark.parametrize("bad", [-1, 100])
def test_target_out_of_range_is_a_device_assert(bad):
    program = [sys.executable, "-c", OUT_OF_RANGE.format(bad=bad)]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode != 0
    assert "device-side assert" in done.stderr
    assert "a number" not in done.stdout


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_scratch_is_the_chunk_and_the_sum(softcap):
    """With a softcap FP32 logits are held; without, exponentials of twice as many rows."""
    tokens, hidden, vocab, rows = 8192, 1024, 32000, 1024
    *leaves, target = _inputs(tokens=tokens, hidden=hidden, vocab=vocab)
    options = ("mean", -100, 0.0, 1.0, softcap, "tanh", torch.bfloat16, rows)

    def step():
        loss = torch.ops.lmhead_pass.linear_cross_entropy(
            *leaves, None, target, *[None] * 5, *options
        )
        return torch.autograd.grad(loss, leaves)

    step()
    torch.cuda.synchronize()
    # Bytes asked for: the allocator gives up to a megabyte more for each tensor.
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    gradients = sum(gradient.nbytes for gradient in step())
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    chunk, total = 4 * rows * vocab, 4 * vocab * hidden
    assert peak < 2 * gradients + chunk + total + (4 << 20)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 30e9,
    reason="less than 30 GB",
)
def test_rows_times_vocabulary_past_32_bits():
    """2^31 logits and more in one chunk: 9 GB of FP32."""
    *leaves, target = _inputs(tokens=34000, hidden=16, vocab=128256)
    upstream = torch.ones(target.numel(), device=CUDA)
    for softcap in (None, 30.0):  # exponentials of all rows; logits of half of them
        results, chunked = (
            _gradients(_op, leaves, target, upstream, reduction="none", rows=rows, softcap=softcap)
            for rows in (34000, 1024)
        )
        torch.testing.assert_close(results[:2], chunked[:2])
