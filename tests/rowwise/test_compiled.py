"""What is done to each row, compiled by Inductor: once for each way of use, or not at all."""

import json

import pytest
import torch
import torch.nn.functional as F

import lmhead_pass
from lmhead_pass.op.kernels import compiled_blocks, row_loop

from ..backend import rewrite
from ..process import output_of
from .losses import LOSSES, entropy_bonus, focal, jensen_shannon, sum_of_heads
from .test_losses import check, gradients, inputs


@pytest.fixture
def compiled(monkeypatch):
    """What was compiled, or was not."""
    found = {}
    monkeypatch.setattr(row_loop, "run_compiled", compiled_blocks.run_compiled)
    monkeypatch.setattr(compiled_blocks, "_compiled", found)
    return found


@pytest.mark.parametrize("function", LOSSES, ids=lambda f: f.__name__)
def test_each_loss_is_traced(function, compiled):
    check(function, inputs(), torch.float32, unfused=torch.compile(function))
    assert compiled
    assert None not in compiled.values()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype, compiled):
    check(sum_of_heads, inputs(dtype), dtype)
    assert compiled
    assert None not in compiled.values()


@pytest.mark.codegen
@pytest.mark.parametrize("function", [focal, pytest.param(jensen_shannon, marks=pytest.mark.slow)])
def test_generated_code(function, compiled):
    check(function, inputs(), torch.float32, unfused=torch.compile(function))
    assert compiled
    assert None not in compiled.values()


def test_one_compilation_serves_all_numbers_of_rows(compiled):
    def peaks(h, w):
        return F.linear(h, w).softmax(-1).square().sum(-1).mean()

    h, w, *_ = inputs(batch=1, length=40)
    function = rewrite(peaks)
    with lmhead_pass.config.patch(batch_chunk_size=5):
        for length in (40, 37, 5, 23, 3):
            tensors = h[:, :length].detach().requires_grad_(), w
            for a, b in zip(gradients(function, tensors), gradients(peaks, tensors), strict=True):
                torch.testing.assert_close(a, b)
        assert len(compiled) == 1
        with torch.no_grad():  # another way of use
            torch.testing.assert_close(function(h, w), peaks(h, w))
        assert len(compiled) == 2


def test_without_a_compiler(compiled, monkeypatch, caplog):
    def compile_nothing(function, forms):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(compiled_blocks, "compile_as_it_is", compile_nothing)
    tensors = inputs()
    with lmhead_pass.config.patch(batch_chunk_size=5):
        ours = gradients(rewrite(entropy_bonus), tensors)
    for a, b in zip(ours, gradients(entropy_bonus, tensors), strict=True):
        torch.testing.assert_close(a, b)
    told = [line for line in caplog.messages if "run by ATen" in line]
    assert len(told) == 1
    assert "RuntimeError: no compiler" in told[0]


def test_what_is_returned_shares_no_memory_with_logits(compiled):
    """These are written over with their gradients."""

    def function(h, w):
        logits = F.linear(h, w)
        return logits.logsumexp(-1).sum() + 0 * logits[..., 3].detach().sum(), logits[..., 3]

    h, w, *_ = inputs()
    with lmhead_pass.config.patch(batch_chunk_size=5):
        _, ours = rewrite(function)(h, w)
    torch.testing.assert_close(ours, function(h, w)[1])


STEP = """
    import json, logging
    import torch, torch.nn.functional as F
    import lmhead_pass
    from torch._dynamo.utils import counters

    lines = []
    log = logging.getLogger("lmhead_pass")
    log.addFilter(lambda record: lines.append(record.getMessage()))
    log.setLevel(logging.INFO)

    @torch.compile
    def step(hidden, weight):
        return F.linear(hidden, weight).softmax(-1).square().sum(-1).mean()

    torch.manual_seed(0)
    weight = torch.randn(5000, 16, requires_grad=True)
    loss = step(torch.ones(300, 16), weight)
    loss.backward()
    exact = F.linear(torch.ones(300, 16), weight).softmax(-1).square().sum(-1).mean()
    (wanted,) = torch.autograd.grad(exact, weight)
    torch.testing.assert_close(weight.grad, wanted)
    fx = counters["inductor"]
    print(json.dumps({"misses": fx["fxgraph_cache_miss"], "lines": lines,
        "aot": counters["aot_autograd"]["autograd_cache_miss"]}))
"""


@pytest.mark.slow
def test_second_process_compiles_nothing(tmp_path):
    """And says what the first one said."""

    def run():
        return json.loads(
            output_of(
                STEP,
                TORCHINDUCTOR_CACHE_DIR=str(tmp_path),
                TORCHINDUCTOR_FORCE_DISABLE_CACHES="0",
                TORCHINDUCTOR_FX_GRAPH_CACHE="1",
                TORCHINDUCTOR_AUTOGRAD_CACHE="1",
            )
        )

    first, second = run(), run()
    assert first["misses"] >= 2
    assert second["misses"] == second["aot"] == 0
    (told,) = [line for line in first["lines"] if line.startswith("rewritten")]
    assert "operations on each row" in told
    from_cache = "" if torch.__version__ < "2.13" else " (from a cache)"
    again = [line for line in second["lines"] if line.startswith("rewritten")]
    assert [line.partition(": hidden")[2] for line in again] == [
        f"{told.partition(': hidden')[2]}{from_cache}"
    ]
