"""Memory and time of a training step of the head on a CPU, against tokens and against vocabulary.

    python benchmarks/sizes.py    # some 15 minutes; writes benchmarks/results/sizes.json

Memory is as in cpu.py. Time is that of the processor with one thread, not of the clock on the wall,
and the least of some rounds: what else runs on the machine only adds. ``--rounds 0``
leaves it out.
"""

import argparse
import time
from pathlib import Path

import report
import torch
from heads import Step, make_inputs, make_step
from memory import peak_bytes
from timing import alternate

HIDDEN = 256
TOKENS = {"vocab": 32000, "tokens": [512, 1024, 2048, 4096]}
WORDS = {"tokens": 1024, "vocab": [8000, 16000, 32000, 64000, 128000]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS["tokens"])
    parser.add_argument("--words", type=int, nargs="+", default=WORDS["vocab"])
    parser.add_argument("--out", type=Path, default=report.FOLDER / "sizes.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [(tokens, TOKENS["vocab"]) for tokens in options.tokens]
    sizes += [(WORDS["tokens"], words) for words in options.words]
    rows = []
    for tokens, vocab in dict.fromkeys(sizes):
        rows += measure(tokens, vocab, options.rounds)
        report.write(options.out, rows)  # a run that is cut off leaves what it has
        print(*rows[-2:], sep="\n", flush=True)


def measure(tokens: int, vocab: int, rounds: int) -> list[dict]:
    inputs = make_inputs(tokens, HIDDEN, vocab, torch.float32)
    steps = {name: make_step(name, inputs) for name in ("lmhead_pass", "compile")}
    times = alternate(steps, rounds, processor_seconds) if rounds else {}
    return [
        {
            "tokens": tokens,
            "hidden": HIDDEN,
            "vocab": vocab,
            "dtype": "float32",
            "impl": name,
            "peak_bytes": peak_bytes(step),
            **({"seconds": min(times[name])} if times else {}),
        }
        for name, step in steps.items()
    ]


def processor_seconds(step: Step) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


if __name__ == "__main__":
    main()
