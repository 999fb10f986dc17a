"""Time and memory of one training step of the head on a CPU, compiled with and without the pass.

    python benchmarks/cpu.py                       # 2048 x 512 x 32000, as in the README
    python benchmarks/cpu.py --tokens 4096 --dtypes float32

Every implementation runs once in each round, so that a machine whose speed drifts does not favour
one; a ratio is the median over rounds of the ratio within a round. Memory is the peak of the bytes
that tensors take on top of inputs and gradients, counted by the profiler in one more step.
"""

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date

import torch
import torch.nn.functional as F
from memory import peak_bytes

import lmhead_pass

Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()

    rows = [row for dtype in options.dtypes for row in measure(options, getattr(torch, dtype))]
    about = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "date": str(date.today()),
        "command": shlex.join(["python", *sys.argv]),
    }
    print(f"{options.tokens} tokens x {options.hidden} hidden x {options.vocab} words")
    print(*about.values(), sep="; ")
    print("dtype     implementation  median ms  x compiled  scratch MB")
    for row in rows:
        line = "{dtype:9} {impl:14} {median_ms:10.1f} {ratio:11.2f} {scratch_mb:11.1f}"
        print(line.format(**row))
    if options.json:
        with open(options.json, "w") as file:
            json.dump({**about, "rows": rows}, file, indent=1)


def measure(options: argparse.Namespace, dtype: torch.dtype) -> list[dict]:
    steps = implementations(options, dtype)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # compiles
    for _ in range(options.rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return [
        {
            "dtype": str(dtype).removeprefix("torch."),
            "impl": name,
            "median_ms": 1e3 * statistics.median(times[name]),
            "ratio": statistics.median(
                a / b for a, b in zip(times[name], times["compiled"], strict=True)
            ),
            "scratch_mb": peak_bytes(step) / 1e6,
        }
        for name, step in steps.items()
    ]


def implementations(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Step]:
    """Steps on the same inputs: each computes the loss and all gradients, and drops them."""
    generator = torch.Generator().manual_seed(0)
    shape = (options.tokens, options.hidden, options.vocab)
    tokens, hidden_size, vocab = shape
    hidden = torch.randn(tokens, hidden_size, generator=generator).to(dtype)
    weight = (0.05 * torch.randn(vocab, hidden_size, generator=generator)).to(dtype)
    target = torch.randint(vocab, (tokens,), generator=generator)
    leaves = hidden.requires_grad_(), weight.requires_grad_()

    def head(hidden, weight, target):
        return F.cross_entropy(F.linear(hidden, weight).float(), target)

    def step(loss) -> Step:
        def run() -> None:
            loss(hidden, weight, target).backward()
            for leaf in leaves:
                leaf.grad = None

        return run

    def floor() -> None:
        with torch.no_grad():
            logits = hidden @ weight.t()
            logits @ weight
            logits.t() @ hidden

    # Two functions, since Dynamo keeps compiled code with the function's code.
    def rewritten(*inputs):
        return head(*inputs)

    def unfused(*inputs):
        return head(*inputs)

    def compiled(function) -> Step:
        run = step(torch.compile(function, dynamic=False))
        run()
        return run

    steps = {"lmhead_pass": compiled(rewritten)}
    with lmhead_pass.disabled():
        steps["compiled"] = compiled(unfused)
    steps["three products"] = floor
    if hasattr(F, "linear_cross_entropy"):  # from torch 2.13 on; without options it is not chunked
        chunked = torch.nn.LinearCrossEntropyOptions()
        steps["torch chunked"] = step(
            lambda *inputs: F.linear_cross_entropy(*inputs, options=chunked)
        )
    return steps


if __name__ == "__main__":
    main()
