"""Rates of the parts of a step on a GPU: products in TFLOP/s, row kernels in 10^9 logits a second.

    python benchmarks/gpu_parts.py      # writes benchmarks/results/<gpu>-<date>-parts.json

Products take turns in one run, since the clocks of a GPU move; each rate is of the median time.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch
from gpu import device_milliseconds
from torch import Tensor

from lmhead_pass.op.kernels import triton_exponential_kernels as of_exponentials
from lmhead_pass.op.kernels import triton_products as products
from lmhead_pass.op.kernels import triton_row_kernels as of_logits
from lmhead_pass.op.kernels.wide_products import multiply_into
from lmhead_pass.op.problem import padded_width

SIZES = ["4096x4096x128256", "2816x2304x256000", "4096x8192x128000", "4096x4096x50257"]
DEVICE = torch.device("cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="rows x hidden x vocabulary")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no GPU here")
    report = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    name = report["gpu"].lower().removeprefix("nvidia ").replace(" ", "-")
    options.out.mkdir(parents=True, exist_ok=True)
    for sizes in options.sizes:
        rows, hidden, vocab = map(int, sizes.split("x"))
        flops = 2 * rows * hidden * vocab
        steps, kernels = parts(rows, hidden, vocab)
        rates = {
            f"{part} TFLOP/s": flops / milliseconds / 1e9
            for part, milliseconds in median_ms(steps, options.rounds).items()
        }
        rates |= {
            f"{part} 10^9 logits/s": rows * vocab / milliseconds / 1e6
            for part, milliseconds in median_ms(kernels, options.rounds).items()
        }
        report[sizes] = {part: round(rate) for part, rate in rates.items()}
        print(sizes, json.dumps(report[sizes], indent=1))
        file = options.out / f"{name}-{date.today()}-parts.json"
        file.write_text(json.dumps(report, indent=1) + "\n")


def parts(rows: int, hidden: int, vocab: int) -> tuple[dict[str, Callable], dict[str, Callable]]:
    """Products, and row kernels."""

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=dtype)

    x, weight = random(rows, hidden), random(vocab, hidden).mul_(hidden**-0.5)
    narrow = torch.empty(rows, padded_width(vocab, x.dtype), device=DEVICE, dtype=x.dtype)
    wide = torch.empty(rows, padded_width(vocab, torch.float32), device=DEVICE)
    logits, words = wide[:, :vocab], narrow[:, :vocab]
    largest, total = torch.empty(2, -(-vocab // products.TILE_WORDS), rows, device=DEVICE)
    word = torch.randint(vocab, (rows,), device=DEVICE, dtype=torch.int32)
    ignored, ones = word < 0, torch.ones(rows, device=DEVICE)
    target_logit, loss, row_max, log_sum = torch.zeros(4, rows, device=DEVICE)
    gradient, weight_sum = torch.empty_like(weight), random(vocab, hidden, dtype=torch.float32)
    one, terms = torch.ones((), device=DEVICE), of_logits.Terms()
    halves = narrow.view(torch.float16)

    def into_fp32(out: Tensor, a: Tensor, b: Tensor, add: bool) -> Callable[[], None]:
        return lambda: multiply_into(out, a, b, add)

    into_fp32(logits, x, weight.t(), False)()
    of_product = {
        "logits in BF16": lambda: torch.mm(x, weight.t(), out=words),
        "logits in FP32": into_fp32(logits, x, weight.t(), False),
        "exponentials": lambda: products.exponentials(
            x, weight, word, None, None, 1.0, largest, total, halves
        ),
        "exponentials, loss alone": lambda: products.exponentials(
            x, weight, word, None, None, 1.0, largest, total, None
        ),
        "hidden": lambda: torch.mm(words, weight),
        "weight in BF16": lambda: torch.mm(words.t(), x, out=gradient),
        "weight added to FP32": into_fp32(weight_sum, words.t(), x, True),
        "weight, scaled": lambda: products.weight_gradient(words, x, None, one, gradient),
        "weight, added and scaled": lambda: products.weight_gradient(
            words, x, weight_sum, one, gradient
        ),
    }
    saved = (row_max, log_sum)
    of_rows = {
        "exponentials to gradients": lambda: of_exponentials.exponential_gradients(
            halves,
            narrow,
            largest,
            target_logit,
            word,
            ignored,
            ones,
            *saved,
            None,
            1.0,
            ones,
            None,
        ),
        "FP32 logits to losses and gradients": lambda: of_logits.row_gradients(
            logits, word.long(), terms, wide.view(x.dtype)[:, :vocab], ones, loss=loss
        ),
        "FP32 logits to losses": lambda: of_logits.row_losses(
            logits, word.long(), terms, loss, *saved
        ),
    }
    for block_bytes in (1 << 14, 1 << 15, 1 << 16):  # 8, 16 and 32 warps
        of_rows[f"FP32 logits to losses and gradients, {block_bytes // 4} columns"] = partial(
            in_blocks, block_bytes, of_rows["FP32 logits to losses and gradients"]
        )
    return of_product, of_rows


def in_blocks(block_bytes: int, step: Callable[[], None]) -> None:
    before, of_logits._BLOCK_BYTES = of_logits._BLOCK_BYTES, block_bytes
    try:
        step()
    finally:
        of_logits._BLOCK_BYTES = before


def median_ms(steps: dict[str, Callable], rounds: int) -> dict[str, float]:
    for step in steps.values():
        step()  # compiles
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(device_milliseconds(step))
    return {name: statistics.median(of_step) for name, of_step in times.items()}


if __name__ == "__main__":
    main()
