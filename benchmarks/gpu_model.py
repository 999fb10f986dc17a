"""What a training step takes on a Hopper GPU beyond its three products, as formulas.

    python benchmarks/gpu_model.py      # the table of docs/gpu.md

With N tokens, H hidden, V words and c chunks, in bytes that go through memory:

    exponentials    N V logits, each EPILOGUE_PS longer in its product than there without
    gradients       4 N V: 16-bit exponentials read, 16-bit gradients written
    sums            8 V H (c - 1): the FP32 sum of the weight's gradient, read and written by each
                    chunk after the first; half of it goes on beside the product
    kernels         what is left: some ten small kernels for a step, four for a chunk

Under a ``memory_budget`` below the FP32 sum, blocks of words take the first product, the
exponentials and the gradients a second time:

    by words        a third of the products, and both of these lines once more

A prediction is up to 0.05 too high: a GPU at its power limit multiplies faster after a pass that
only moves bytes. ``tests/end_to_end/test_gpu_model.py`` holds it against what was measured.
"""

import math
from typing import NamedTuple

SIZES = [(4096, 4096, 128256), (16384, 4096, 128256), (8192, 2304, 256000), (32768, 8192, 128000)]
EPILOGUE_PS = 0.8
HIDDEN_SHARE_OF_SUMS = 0.5
SHARE_OF_BANDWIDTH = 0.87
STEP_MS, CHUNK_MS = 0.1, 0.05
BUDGET = 2_000_000_000


class Chip(NamedTuple):
    bandwidth: float
    """Bytes per second that a copy moves, read and written."""
    rate: float
    """FLOP per second of large BF16 products."""


CHIPS = {"H100": Chip(3.05e12, 740e12), "H200": Chip(4.3e12, 745e12)}


def products_ms(chip: Chip, tokens: int, hidden: int, vocab: int) -> float:
    return 1e3 * 6 * tokens * hidden * vocab / chip.rate


def extra_ms(chip: Chip, tokens: int, hidden: int, vocab: int, rows: int) -> dict[str, float]:
    """Of chunks of ``rows``."""
    logits, chunks = tokens * vocab, math.ceil(tokens / rows)
    return {
        "exponentials": 1e-9 * EPILOGUE_PS * logits,
        "gradients": 1e3 * 4 * logits / (SHARE_OF_BANDWIDTH * chip.bandwidth),
        "sums": 1e3 * HIDDEN_SHARE_OF_SUMS * 8 * vocab * hidden * (chunks - 1) / chip.bandwidth,
        "kernels": STEP_MS + CHUNK_MS * chunks,
    }


def by_words_ms(chip: Chip, tokens: int, hidden: int, vocab: int, rows: int) -> dict[str, float]:
    """The same for chunks of ``rows``, with the weight's gradient for some words at a time."""
    extra = extra_ms(chip, tokens, hidden, vocab, rows)
    again = products_ms(chip, tokens, hidden, vocab) / 3
    return {**extra, "by words": again + extra["exponentials"] + extra["gradients"]}


def scratch_bytes(tokens: int, hidden: int, vocab: int, rows: int) -> tuple[int, int]:
    """Of exponentials, and of the FP32 sum, which one chunk does not have."""
    return 2 * min(rows, tokens) * vocab, 4 * vocab * hidden if tokens > rows else 0


def main() -> None:
    print("| tokens x hidden x vocabulary | GPU | products | exponentials | gradients | sums |"
          " kernels | x products |")  # fmt: skip
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for sizes in SIZES:
        for name, chip in CHIPS.items():
            floor, extra = products_ms(chip, *sizes), extra_ms(chip, *sizes, rows_of(*sizes))
            ratio = 1 + sum(extra.values()) / floor
            shares = " | ".join(f"{milliseconds:.2f}" for milliseconds in extra.values())
            what = " x ".join(map(str, sizes))
            print(f"| {what} | {name} | {floor:.1f} ms | {shares} | {ratio:.3f} |")
    print()
    for name, chip in CHIPS.items():
        rows, words = chunks_within(BUDGET, *SIZES[-1])
        extra = by_words_ms(chip, *SIZES[-1], rows)
        ratio = 1 + sum(extra.values()) / products_ms(chip, *SIZES[-1])
        print(f"{name}, {SIZES[-1]}, {BUDGET} bytes: {rows} rows, {words} words, {ratio:.2f}")


def rows_of(tokens: int, hidden: int, vocab: int) -> int:
    """Rows of a chunk, as the op plans them where exponentials are held."""
    return chunks_within(None, tokens, hidden, vocab)[0]


def chunks_within(
    budget: int | None, tokens: int, hidden: int, vocab: int
) -> tuple[int, int | None]:
    """Rows and words of a chunk under a ``memory_budget``."""
    import torch

    from lmhead_pass import config
    from lmhead_pass.op import holding, plan_chunks

    before, holding._is_hopper = holding._is_hopper, lambda device: True
    try:
        with config.patch(memory_budget=budget):
            dtype, device = torch.bfloat16, torch.device("cuda")
            return plan_chunks(hidden, vocab, dtype, device, tokens=tokens, gradient_dtype=dtype)
    finally:
        holding._is_hopper = before


if __name__ == "__main__":
    main()
