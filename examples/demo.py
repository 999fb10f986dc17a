"""Train a small GPT twice from one seed: compiled plainly, and compiled with lmhead_pass.

Shows the two loss curves side by side and what the second run saved.  Exits non-zero when the
curves part by more than rounding, or when lmhead_pass did not rewrite the model.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.progress import BarColumn, Progress, TimeRemainingColumn
from rich.table import Table
from stdlib_text import VOCAB, write_tokens

# How far apart, relatively, the two runs may be: in the loss of every step, and in the norm of the
# first gradient, which both runs take at the very same parameters.  Another order of summation
# moves either by about one float32 epsilon, 1.2e-7, and training lets that grow: at most to 2e-7
# in correct runs of these settings (two seeds, one of them over 128 steps), or to 1.3e-6 at twice
# the learning rate.  A wrong gradient is well outside.  With one of the head's two gradients 1%
# too large, the losses were 6e-4 apart within 32 steps and the first norms more than 1e-3.  With
# both too large the losses agree, for Adam divides a common factor out; the norms are 1e-2 apart.
TOLERANCE = 1e-5

PEAK_MEANS = (
    "Peak memory: the most tensors alive at one moment of a training step, "
    "weights, Adam's moments, gradients and activations together."
)
PLAIN, OURS = "plain", "lmhead_pass"
Report = dict[str, float]
console = Console()


def reports(name: str, folder: Path, options: list[str]) -> Iterator[Report]:
    """Run train_gpt.py in a process of its own and yield its reports as they come.

    A process of its own keeps the import of lmhead_pass out of the plain run.  Its cache of
    compiled graphs starts empty, since a graph taken from a cache never meets the pass.
    """
    command = [sys.executable, str(Path(__file__).with_name("train_gpt.py")), *options]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / f"{name}-cache")}
    log = folder / f"{name}.log"
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as worker,
    ):
        assert worker.stdout
        yield from map(json.loads, worker.stdout)
    if worker.returncode:
        sys.exit(f"{log.read_text()}The {name} run failed.")


def shown(step: int, steps: int) -> bool:
    """Whether a step is printed: the first, the last and about eight between are."""
    return step in (1, steps) or step % max(1, steps // 8) == 0


def train(name: str, folder: Path, options: list[str], steps: int) -> tuple[list[Report], Report]:
    """Run train_gpt.py under a progress bar; return its steps and its closing summary."""
    columns = f"{name:>11}", BarColumn(), "{task.description}", TimeRemainingColumn(), "left"
    seen: list[Report] = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("compiling", total=steps + 1)
        for report in reports(name, folder, [*options, "--steps", str(steps)]):
            seen.append(report)
            if "loss" in report:
                status = f"step {len(seen)} of {steps}, loss {report['loss']:.3f}"
                if progress.disable and shown(len(seen), steps):
                    console.print(f"{name:>11}  {status}")
            progress.update(task, advance=1, description=status)
    *curve, summary = seen
    return curve, summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=32, help="default: 32")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps must be at least 1")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = folder / "tokens"
        count = write_tokens(tokens)
        console.print(f"Text: {count:,} tokens of the standard library; vocabulary {VOCAB:,}.")
        options = ["--json", "--tokens", str(tokens), "--seed", str(args.seed)]
        plain, plain_summary = train(PLAIN, folder, [*options, "--plain"], args.steps)
        ours, our_summary = train(OURS, folder, options, args.steps)

    losses = Table("step", PLAIN, OURS, "difference", title="Loss")
    for step, (a, b) in enumerate(zip(plain, ours, strict=True), start=1):
        if shown(step, args.steps):
            difference = f"{b['loss'] - a['loss']:+.1e}"
            losses.add_row(str(step), f"{a['loss']:.6f}", f"{b['loss']:.6f}", difference)
    console.print(losses)

    # The first half of the steps is for compiling and warming up.
    seconds = [
        median(report["seconds"] for report in run[args.steps // 2 :]) for run in (plain, ours)
    ]
    peaks = [summary["peak_bytes"] / 2**20 for summary in (plain_summary, our_summary)]
    costs = Table("", PLAIN, OURS, "saved", title="Cost of a step", caption=PEAK_MEANS)
    for title, unit, (before, after) in (("time", "s", seconds), ("peak memory", "MiB", peaks)):
        saved = f"{before - after:.3g} {unit} ({1 - after / before:.0%})"
        costs.add_row(title, f"{before:.3g} {unit}", f"{after:.3g} {unit}", saved)
    console.print(costs)

    if plain_summary["rewritten"] or not our_summary["rewritten"]:
        sys.exit("lmhead_pass should have rewritten the model in its own run, and only there.")
    pairs = {"losses": [(a["loss"], b["loss"]) for a, b in zip(plain, ours, strict=True)]}
    pairs["first gradient norms"] = [(plain[0]["norm"], ours[0]["norm"])]
    for what, values in pairs.items():
        gaps = [abs(b / a - 1) for a, b in values]
        console.print(f"The {what} are at most {max(gaps):.1e} apart, relatively.")
        if not all(gap <= TOLERANCE for gap in gaps):  # put this way, a NaN fails too
            sys.exit(f"The {what} differ by more than rounding: {TOLERANCE:.0e} is allowed.")


if __name__ == "__main__":
    main()
