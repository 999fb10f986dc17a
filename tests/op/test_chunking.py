"""How many rows make a chunk."""

import pytest
import torch

import lmhead_pass
from lmhead_pass.op.chunking import even_rows, gpu_rows, plan_rows

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_settings_come_first():
    with lmhead_pass.config.patch(batch_chunk_size=77, memory_budget=1):
        assert plan_rows(512, 32000, torch.float32, CPU) == 77
    with lmhead_pass.config.patch(memory_budget=32000 * 4 * 10 + 1):
        assert plan_rows(512, 32000, torch.float32, CPU) == 10
        assert plan_rows(512, 32000, torch.bfloat16, CPU) == 20
    with lmhead_pass.config.patch(memory_budget=1):
        assert plan_rows(512, 32000, torch.float32, CPU) == 1


@pytest.mark.parametrize(("hidden", "vocab"), [(64, 4096), (512, 32000), (4096, 128256)])
def test_planned_scratch_is_small_beside_what_must_be_held(hidden, vocab):
    scratch = plan_rows(hidden, vocab, torch.float32, CPU) * vocab * 4
    assert scratch <= max(48 << 20, vocab * hidden)  # a quarter of the FP32 weight gradient


@pytest.mark.parametrize("rows", [0, 1, 9, 10, 11, 19, 20, 21, 1000])
def test_chunks_are_about_even(rows):
    size = even_rows(rows, most=10)
    assert 1 <= size <= 10
    assert -(-rows // size) == -(-rows // 10)


def test_planned_rows_of_a_large_head_keep_scratch_below_1_5_gb():
    rows = plan_rows(8192, 128000, torch.bfloat16, CUDA)
    assert rows == 2816
    assert 4 * rows * 128000 + (32 << 20) < 1.5e9  # FP32 logits, and cuBLAS's own scratch


@pytest.mark.parametrize(
    ("hidden", "vocab", "rows"), [(4096, 128256, 2816), (4096, 32000, 4096), (2304, 256000, 1408)]
)
def test_planned_rows(hidden, vocab, rows):
    assert plan_rows(hidden, vocab, torch.bfloat16, CUDA) == rows


def test_a_budget_counts_fp32_logits_on_a_gpu():
    with lmhead_pass.config.patch(memory_budget=40_000):
        assert plan_rows(16, 1000, torch.bfloat16, CUDA) == 10
        assert plan_rows(16, 1000, torch.bfloat16, torch.device("cpu")) == 20


def test_rows_on_a_gpu_are_whole_tiles():
    assert gpu_rows(32768, 2816) == 2816
    assert gpu_rows(5000, 2816) == 2560
    assert gpu_rows(300, 100) == 100


def test_a_single_chunk_may_use_what_it_saves():
    def rows(tokens, gradient_dtype=torch.bfloat16):
        sizes = (4096, 128256, torch.bfloat16, CUDA)
        return plan_rows(*sizes, tokens=tokens, gradient_dtype=gradient_dtype)

    assert rows(4096) == 4096
    assert rows(4096, gradient_dtype=torch.float32) == 2816
    assert rows(8192) == 2816
    assert gpu_rows(0, 2816) == 1


def test_rows_asked_for_are_a_limit():
    with lmhead_pass.config.patch(batch_chunk_size=100):
        assert plan_rows(4096, 128256, torch.bfloat16, CUDA, 128, torch.bfloat16) == 100
    assert gpu_rows(128, 100) == 100
