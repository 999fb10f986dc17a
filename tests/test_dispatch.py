"""Which chunk loop runs where, and what that takes to import."""

import logging
import subprocess
import sys

import pytest
import torch

from lmhead_pass import config
from lmhead_pass.op import chunking
from lmhead_pass.op.kernels import aten_loop as aten
from lmhead_pass.op.kernels import dispatch

pytest.importorskip("triton")


@pytest.fixture
def lines():
    """What the package logs."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    log = logging.getLogger("lmhead_pass")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    dispatch.loop_for.cache_clear()
    yield records
    dispatch.loop_for.cache_clear()
    log.removeHandler(handler)
    log.setLevel(level)


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_gpus_run_triton(device, lines):
    assert dispatch.loop_for(device).__name__ == "lmhead_pass.op.kernels.triton_loop"
    assert lines == []


def test_cpu_runs_aten(lines):
    assert dispatch.loop_for("cpu") is aten
    assert lines == []


def test_other_devices_run_aten_and_say_so_once(lines):
    assert dispatch.loop_for("mps") is dispatch.loop_for("mps") is aten
    assert lines == [
        "the chunk loop runs in plain ATen on mps, which is slower: there are no Triton kernels "
        "for mps"
    ]


def test_gpus_without_triton_run_aten_and_say_so(lines, monkeypatch):
    for name in ("triton_loop", "triton_row_kernels"):
        monkeypatch.delitem(sys.modules, f"lmhead_pass.op.kernels.{name}", raising=False)
        monkeypatch.delattr(f"lmhead_pass.op.kernels.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert dispatch.loop_for("cuda") is aten
    (line,) = lines
    assert line.startswith(
        "the chunk loop runs in plain ATen on cuda, which is slower: Triton cannot be imported"
    )


PROGRAM = """
import sys
{before}
import torch
import lmhead_pass
args = torch.ones(3, 4), torch.ones(5, 4), None, torch.zeros(3, dtype=torch.long), *[None] * 4
op = torch.ops.lmhead_pass.linear_cross_entropy
print(op(*args, "mean", -100, 0.0, 1.0, None, torch.float32, 2).item())
imported = {{"triton", "numpy"}} & {{name for name, module in sys.modules.items() if module}}
assert not {{name for name in imported if "{before}" or name == "triton"}}, imported
"""


@pytest.mark.parametrize(
    "before", ["", "sys.modules['triton'] = sys.modules['numpy'] = None"], ids=["with", "without"]
)
def test_neither_triton_nor_numpy_is_needed(before):
    """In a fresh process: nothing on the way to a loss on the CPU imports Triton."""
    program = [sys.executable, "-W", "ignore", "-c", PROGRAM.format(before=before)]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(torch.tensor(5.0).log().item())


CUDA = torch.device("cuda")


def test_planned_rows_of_a_large_head_keep_scratch_below_1_5_gb():
    rows = chunking.plan_rows(8192, 128000, torch.bfloat16, CUDA)
    assert rows == 2816
    assert 4 * rows * 128000 + (32 << 20) < 1.5e9  # FP32 logits, and cuBLAS's own scratch


@pytest.mark.parametrize(
    ("hidden", "vocab", "rows"), [(4096, 128256, 2816), (4096, 32000, 4096), (2304, 256000, 1408)]
)
def test_planned_rows(hidden, vocab, rows):
    assert chunking.plan_rows(hidden, vocab, torch.bfloat16, CUDA) == rows


def test_a_budget_counts_fp32_logits_on_a_gpu():
    with config.patch(memory_budget=40_000):
        assert chunking.plan_rows(16, 1000, torch.bfloat16, CUDA) == 10
        assert chunking.plan_rows(16, 1000, torch.bfloat16, torch.device("cpu")) == 20


def test_rows_on_a_gpu_are_whole_tiles():
    assert chunking.gpu_rows(32768, 2816) == 2816
    assert chunking.gpu_rows(5000, 2816) == 2560
    assert chunking.gpu_rows(300, 100) == 100


def test_a_single_chunk_may_use_what_it_saves():
    def rows(tokens, gradient_dtype=torch.bfloat16):
        sizes = (4096, 128256, torch.bfloat16, CUDA)
        return chunking.plan_rows(*sizes, tokens=tokens, gradient_dtype=gradient_dtype)

    assert rows(4096) == 4096
    assert rows(4096, gradient_dtype=torch.float32) == 2816
    assert rows(8192) == 2816
    assert chunking.gpu_rows(0, 2816) == 1


def test_rows_asked_for_are_a_limit():
    with config.patch(batch_chunk_size=100):
        assert chunking.plan_rows(4096, 128256, torch.bfloat16, CUDA, 128, torch.bfloat16) == 100
    assert chunking.gpu_rows(128, 100) == 100
