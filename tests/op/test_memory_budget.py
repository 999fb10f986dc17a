"""What a budget is spent on, and what it says when it is too small."""

import pytest
import torch

import lmhead_pass
from lmhead_pass.op import holding, memory_budget
from lmhead_pass.op.memory_budget import Chunks, MemoryBudgetTooSmall, plan_chunks

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True, params=[False, True], ids=["logits", "exponentials"])
def is_hopper(request, monkeypatch):
    monkeypatch.setattr(
        holding, "_is_hopper", lambda device: request.param and device.type == "cuda"
    )
    return request.param


def plan(budget, hidden, vocab, dtype, device=CPU, gradient=None, **options):
    with lmhead_pass.config.patch(memory_budget=budget):
        return plan_chunks(
            hidden, vocab, dtype, device, gradient_dtype=gradient or dtype, **options
        )


def test_the_number_of_rows_comes_first():
    with lmhead_pass.config.patch(batch_chunk_size=77):
        assert plan(1, 512, 32000, BF16) == Chunks(77)


def test_logits_alone_where_no_sum_is_needed():
    assert plan(32000 * 4 * 10 + 1, 512, 32000, FP32) == Chunks(10)
    assert plan(32000 * 2 * 10 + 1, 512, 32000, BF16, gradient=FP32) == Chunks(10)


def test_a_budget_counts_what_is_held_on_a_gpu(is_hopper):
    assert plan(40_000, 16, 1000, BF16, CUDA, FP32) == Chunks(20 if is_hopper else 10)
    assert plan(40_000, 16, 1000, BF16, CPU, FP32) == Chunks(20)


@pytest.mark.parametrize(("budget", "rows"), [(128000, 1), (2 * 128000 - 1, 1), (2 * 128000, 2)])
def test_a_budget_of_one_row_per_chunk_is_warned_of_once(budget, rows, caplog):
    memory_budget._warn_of_single_rows.cache_clear()
    for _ in range(2):
        assert plan(budget, 512, 32000, FP32) == Chunks(rows)
    assert caplog.messages == [
        f"lmhead_pass.config.memory_budget = {budget} leaves one row per chunk: a row of logits "
        "takes 128000 bytes here. That is slow. For 128 rows, set it to 16384000; with None it is "
        "planned from the sizes"
    ] * (rows == 1)


def test_one_chunk_has_no_sum():
    assert plan(2 * 64 * 32000, 512, 32000, BF16, tokens=64) == Chunks(64)
    # Not if there may be more rows in the next call.
    assert plan(2 * 64 * 32000, 512, 32000, BF16, tokens=64, is_dynamic=True).words < 32000


def test_the_sum_counts():
    of_sum = 4 * 512 * 32000
    for dtype in (BF16, FP16):
        assert plan(of_sum + 2 * 32000 * 100, 512, 32000, dtype, tokens=4096) == Chunks(100)
    least = of_sum + 2 * 32000
    assert plan(least, 512, 32000, FP16, tokens=4096) == Chunks(1)
    with pytest.raises(MemoryBudgetTooSmall, match=f"at least {least:,}"):
        plan(least - 1, 512, 32000, FP16, tokens=4096)
    # Label smoothing is not known block by block.
    with pytest.raises(MemoryBudgetTooSmall, match=f"at least {least:,}"):
        plan(least - 1, 512, 32000, BF16, tokens=4096, needs_whole_rows=True)


BUDGETS = [1 << 22, 1 << 23, 1 << 25, 1 << 28, 1 << 30, 2_000_000_000]


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize(("hidden", "vocab"), [(8192, 128000), (2304, 256000), (64, 5000)])
def test_less_than_the_sum_is_spent_on_blocks_of_words(hidden, vocab, device, is_hopper):
    """The sum of 32768 x 8192 x 128000 takes 4.2 GB; 2 GB are enough without it."""
    of_logit = 2 if is_hopper or device == CPU else 4
    planned = 0
    for budget in BUDGETS:
        try:
            rows, words = plan(budget, hidden, vocab, BF16, device, tokens=32768)
        except MemoryBudgetTooSmall:
            assert budget <= 1 << 23
            continue
        planned += 1
        assert rows >= 1
        assert rows * vocab * of_logit + (0 if words else 4 * vocab * hidden) <= budget
        if words is not None:
            assert words % 256 == 0 or words == vocab
            assert rows * words * of_logit + 6 * words * hidden <= budget
    assert planned >= 4
    if vocab == 128000:
        assert words >= 128000 / 5
        assert rows >= 1900


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("tokens", [0, 4096])
@pytest.mark.parametrize("needs_whole_rows", [False, True])
@pytest.mark.parametrize(("hidden", "vocab"), [(2304, 256000), (64, 5003), (4096, 64)])
def test_the_least_is_what_works(hidden, vocab, dtype, device, tokens, needs_whole_rows):
    sizes = (hidden, vocab, dtype, device)
    options = {"tokens": tokens, "needs_whole_rows": needs_whole_rows}
    with pytest.raises(MemoryBudgetTooSmall, match=r"config\.memory_budget is 1 bytes") as error:
        plan(1, *sizes, **options)
    least = int(str(error.value).rpartition(" ")[2].replace(",", ""))
    assert plan(least, *sizes, **options).rows >= 1
    with pytest.raises(MemoryBudgetTooSmall, match=f"at least {least:,}"):
        plan(least - 1, *sizes, **options)
