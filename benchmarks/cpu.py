"""Time and memory of one training step of the head on a CPU, compiled with and without the pass.

    python benchmarks/cpu.py --tokens 4096 --rounds 5    # the table of README
    python benchmarks/cpu.py --dtypes float32            # 2048 tokens x 512 hidden x 32000 words

Time is that of forward and backward, as a ratio to the function compiled without the pass: the
median over rounds in which each runs once (``timing.py``). Memory is the peak of the bytes of
tensors that the step allocates, counted by the profiler in one more step: the gradients are in it,
inputs and weight are not.
"""

import argparse
import statistics
from pathlib import Path

import report
import torch
from heads import available, make_inputs, make_step
from memory import peak_bytes
from timing import alternate, ratio, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()

    rows = [row for dtype in options.dtypes for row in measure(options, dtype)]
    print(f"{options.tokens} tokens x {options.hidden} hidden x {options.vocab} words")
    print(*report.about().values(), sep="; ")
    print("dtype     implementation  median ms  x compile  peak MB")
    for row in rows:
        line = "{dtype:9} {impl:14} {median_ms:10.1f} {ratio:10.2f} {peak_mb:8.1f}"
        print(line.format(**row, peak_mb=row["peak_bytes"] / 1e6))
    if options.json:
        report.write(options.json, rows)


def measure(options: argparse.Namespace, dtype: str) -> list[dict]:
    shape = options.tokens, options.hidden, options.vocab
    inputs = make_inputs(*shape, getattr(torch, dtype))
    steps = {name: make_step(name, inputs) for name in available()}
    times = alternate(steps, options.rounds, seconds)
    return [
        {
            **dict(zip(("tokens", "hidden", "vocab"), shape, strict=True)),
            "dtype": dtype,
            "impl": name,
            "median_ms": 1e3 * statistics.median(times[name]),
            "ratio": ratio(times, name, "compile"),
            "peak_bytes": peak_bytes(step),
        }
        for name, step in steps.items()
    ]


if __name__ == "__main__":
    main()
