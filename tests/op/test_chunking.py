"""How many rows make a chunk."""

import pytest
import torch

import lmhead_pass
from lmhead_pass.op import holding
from lmhead_pass.op.chunking import even_rows, gpu_chunks, plan_rows

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True, params=[False, True], ids=["logits", "exponentials"])
def is_hopper(request, monkeypatch):
    monkeypatch.setattr(
        holding, "_is_hopper", lambda device: request.param and device.type == "cuda"
    )
    return request.param


def test_the_setting_comes_first():
    with lmhead_pass.config.patch(batch_chunk_size=77, memory_budget=1):
        assert plan_rows(512, 32000, torch.float32, CPU) == 77


@pytest.mark.parametrize(("hidden", "vocab"), [(64, 4096), (512, 32000), (4096, 128256)])
def test_planned_scratch_is_small_beside_what_must_be_held(hidden, vocab):
    scratch = plan_rows(hidden, vocab, torch.float32, CPU) * vocab * 4
    assert scratch <= max(44 << 20, vocab * hidden)  # a quarter of the FP32 weight gradient


@pytest.mark.parametrize("rows", [0, 1, 9, 10, 11, 19, 20, 21, 1000])
def test_chunks_are_about_even(rows):
    size = even_rows(rows, most=10)
    assert 1 <= size <= 10
    assert -(-rows // size) == -(-rows // 10)


def test_planned_rows_of_a_large_head_keep_scratch_below_1_5_gb(is_hopper):
    rows = plan_rows(8192, 128000, torch.bfloat16, CUDA)
    assert rows == (4096 if is_hopper else 2816)
    # With cuBLAS's own scratch.
    assert (2 if is_hopper else 4) * rows * 128000 + (32 << 20) < 1.5e9


@pytest.mark.parametrize(
    ("hidden", "vocab", "rows"), [(4096, 128256, 2816), (4096, 32000, 4096), (2304, 256000, 1408)]
)
def test_planned_rows(hidden, vocab, rows, is_hopper):
    rows = min(4096, 2 * rows) if is_hopper else rows
    assert plan_rows(hidden, vocab, torch.bfloat16, CUDA) == rows


def test_what_the_triton_product_cannot_read_is_planned_as_logits(is_hopper):
    for hidden, dtype in ((4100, torch.bfloat16), (4096, torch.float32)):
        assert plan_rows(hidden, 128256, dtype, CUDA) == 2816


@pytest.mark.parametrize("rows", [0, 1, 99, 100, 101, 250, 300])
def test_chunks_on_a_gpu_are_full_but_for_the_first(rows):
    chunks = gpu_chunks(rows, 100)
    assert [row for chunk in chunks for row in range(rows)[chunk]] == list(range(rows))
    sizes = [chunk.stop - chunk.start for chunk in chunks]
    assert sizes[1:] == [100] * len(sizes[1:])
    assert sizes[:1] <= [100]


def test_a_single_chunk_may_use_what_it_saves(is_hopper):
    def rows(tokens, gradient_dtype=torch.bfloat16):
        sizes = (4096, 128256, torch.bfloat16, CUDA)
        return plan_rows(*sizes, tokens=tokens, gradient_dtype=gradient_dtype)

    if is_hopper:
        assert rows(4096) == 5652
        assert rows(8192) == 8192
        assert rows(8192, gradient_dtype=torch.float32) == rows(16384) == 4096
    else:
        assert rows(4096) == 4096
        assert rows(8192) == rows(4096, gradient_dtype=torch.float32) == 2816


def test_rows_asked_for_are_a_limit():
    with lmhead_pass.config.patch(batch_chunk_size=100):
        assert plan_rows(4096, 128256, torch.bfloat16, CUDA, 128, torch.bfloat16) == 100
