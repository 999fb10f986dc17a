"""How many rows make a chunk."""

import pytest
import torch

import lmhead_pass
from lmhead_pass.op.chunking import even_rows, plan_rows

CPU = torch.device("cpu")


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
