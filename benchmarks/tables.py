"""The tables of README and docs, made of benchmarks/results: ``pages.py`` has the command.

A table stands between two comments, the first of which names its results:
``<!-- benchmarks/results/cpu.json -->`` and ``<!-- end -->``. Without these results it stays.
"""

import re
from collections.abc import Callable
from typing import Any

import report

NAMES = {
    "compile": "`torch.compile`",
    "lmhead_pass": "with `lmhead_pass`",
    "torch_lce": "`F.linear_cross_entropy`, chunked",
    "floor": "the three products alone",
}
DTYPES = {"float32": "FP32", "bfloat16": "BF16"}


def with_tables(text: str) -> str:
    """``text`` with each of its tables made anew."""

    def made(match: re.Match[str]) -> str:
        begin, name = match["begin"], match["name"]
        if not (report.FOLDER / f"{name}.json").exists():
            return match[0]
        return f"{begin}\n{TABLES[name](report.read(name))}\n<!-- end -->"

    pattern = r"(?P<begin><!-- benchmarks/results/(?P<name>[\w-]+)\.json -->)\n.*?<!-- end -->"
    return re.sub(pattern, made, text, flags=re.DOTALL)


def cpu(measured: dict[str, Any]) -> str:
    rows = {(row["impl"], row["dtype"]): row for row in measured["rows"]}
    dtypes = [dtype for dtype in DTYPES if ("compile", dtype) in rows]
    head = [f"{DTYPES[dtype]} {what}" for dtype in dtypes for what in ("memory", "time")]
    lines = [f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for name in NAMES:
        figures = [
            figure
            for dtype in dtypes
            if (row := rows.get((name, dtype)))
            for figure in (
                # The products alone make no loss: their memory says nothing.
                "" if name == "floor" else f"{row['peak_bytes'] / 1e6:.0f} MB",
                f"{row['ratio']:.2f}",
            )
        ]
        if figures:
            lines.append(f"| {NAMES[name]} | {' | '.join(figures)} |")
    return "\n".join([*lines, "", SOURCE.format(**measured)])


def h200(measured: dict[str, Any]) -> str:
    """Of training steps at each size, and of other modes at the largest."""
    lines = [
        "| tokens x hidden x vocabulary | products | `lmhead_pass` | `compile` | Liger, SM90 | "
        "peak | peak of `compile` |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    steps: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in measured["rows"] + report.read("h200-2026-11-26-modes")["rows"]:
        size = "{tokens} x {hidden} x {vocab}".format(**row)
        steps.setdefault((row["mode"], size), {})[row["impl"]] = row
    largest = list(steps)[len([key for key in steps if key[0] == "train"]) - 1][1]
    for (mode, size), rows in steps.items():
        if mode != "train" and size != largest:
            continue
        names = ("lmhead_pass", "compile", "liger_sm90")
        ratios = [f"{rows[name]['floor_ratio']:.2f}" if name in rows else "" for name in names]
        peaks = [f"{rows[name]['peak_bytes'] / 1e9:.2f} GB" for name in names[:2]]
        products = f"{rows['floor']['median_ms']:.3g} ms"
        lines.append(f"| {' | '.join([MODES[mode] + size, products, *ratios, *peaks])} |")
    return "\n".join(lines)


def h200_large(modes: dict[str, Any]) -> str:
    """A sentence: the largest size, with the pass and without."""
    rows = report.read("h200-2026-11-26")["rows"] + modes["rows"]
    size = (32768, 8192, 128000)
    found = {
        (row["mode"], row["impl"]): (f"{row['floor_ratio']:.2f}", row["peak_bytes"])
        for row in rows
        if (row["tokens"], row["hidden"], row["vocab"]) == size
    }
    (ours, held), (theirs, held_without) = (found["train", i] for i in ("lmhead_pass", "compile"))
    (alone, little), (plain, much) = (found["forward", i] for i in ("lmhead_pass", "compile"))
    return "\n".join(
        (
            f"On an H200 a step of the head in BF16, {' x '.join(f'{n:,}' for n in size)} (tokens "
            f"x hidden x words), takes {ours} times the",
            f"three products alone and {held / 1e9:.1f} GB, gradients included; `torch.compile` "
            f"without the pass takes {theirs} and {held_without / 1e9:.1f} GB.",
            f"The loss alone takes {alone} times its product and {little / 1e6:.0f} MB, instead of "
            f"{plain} and {much / 1e9:.1f} GB (`python benchmarks/gpu.py`, torch",
            f"{modes['torch'].partition('+')[0]}, {modes['date']}). Other shapes are in "
            "[GPU](gpu.md).",
        )
    )


def h100(measured: dict[str, Any]) -> str:
    """A sentence: cut-cross-entropy, by hidden size."""
    ratios: dict[int, list[float]] = {}
    for row in measured["rows"]:
        if row["impl"] == "cce":
            ratios.setdefault(row["hidden"], []).append(row["floor_ratio"])
    narrow = min(ratios)
    wide = [ratio for hidden, of in ratios.items() if hidden != narrow for ratio in of]
    return (
        f"On the H100 cut-cross-entropy takes {min(wide):.1f} to {max(wide):.1f} times the "
        f"products, and {ratios[narrow][0]:.1f} with {narrow} hidden."
    )


def h200_spread(measured: dict[str, Any]) -> str:
    """A sentence: errors of gradients where logits are far apart."""

    def errors(name: str) -> str:
        found = [1e3 * row["grad_error"] for row in measured["rows"] if row["impl"] == name]
        return f"{min(found):.1f} to {max(found):.1f}e-3"

    return (
        "Gradients of logits with a standard deviation of 3 have errors of "
        f"{errors('lmhead_pass')} here and of {errors('compile')}\n"
        "under `compile`, which rounds logits to BF16 (`--spread 3`)."
    )


def h200_parts(measured: dict[str, Any]) -> str:
    parts = measured["4096x4096x128256"]
    per_second, logits = " TFLOP/s", " 10^9 logits/s"
    in_place = parts[f"exponentials to gradients{logits}"]

    def both(name: str, other: str) -> str:
        return f"{parts[name + per_second]} / {parts[other + per_second]} TFLOP/s"

    lines = (
        ("the library's logits in BF16 / in FP32", both("logits in BF16", "logits in FP32")),
        ("exponentials / for the loss alone", both("exponentials", "exponentials, loss alone")),
        (
            "the library's weight gradient, BF16 / added to FP32",
            both("weight in BF16", "weight added to FP32"),
        ),
        (
            "this project's, scaled / added and scaled",
            both("weight, scaled", "weight, added and scaled"),
        ),
        ("exponentials to gradients", f"{in_place}{logits} ({in_place * 4 / 1e3:.1f} TB/s)"),
        (
            "FP32 logits to losses and gradients",
            f"{parts[f'FP32 logits to losses and gradients{logits}']}{logits}",
        ),
    )
    return "\n".join(["| | |", "|---|--:|", *(f"| {what} | {rate} |" for what, rate in lines)])


def outside(measured: dict[str, Any]) -> str:
    lines = ["| loss | memory | without the pass | time |", "|---|--:|--:|--:|"]
    for row in measured["rows"]:
        figures = [f"{row[name]:.2f}" for name in ("memory", "without", "time")]
        lines.append(f"| {' | '.join([LOSSES[row['loss']], *figures])} |")
    return "\n".join([*lines, "", SOURCE.format(**measured)])


def overheads(measured: dict[str, Any]) -> str:
    found = {row["part"]: row["value"] for row in measured["rows"]}
    return "\n".join(
        (
            "| | |",
            "|---|--:|",
            f"| a loss taken outside: Python, in each step of any size | {found['step']:.2f} ms |",
            "| watching the weight, 2048 tokens x 512 hidden x 32000 words |"
            f" {100 * found['watching']:.1f} % of a step |",
            "| generating a token at a time (such heads are left as they are) |"
            f" {found['generation']:.3f} of the time without the pass |",
            "",
            SOURCE.format(**measured),
        )
    )


SOURCE = "`{command}`: {machine}, torch {torch}, {date}."
LOSSES = {
    "shifted": "a shifted cross entropy",
    "gathered": "the mean of log-probabilities",
    "second": "a loss inside, and a second one outside",
    "policy": "a ratio of probabilities, and an entropy (GRPO)",
    "distilled": "KL between two heads",
    **{f"16 pieces, {kind}": f"16 pieces, `{kind}`" for kind in ("mean", "sum", "none")},
}
MODES = {"train": "", "forward": "loss alone, ", "frozen": "frozen weight, "}
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "cpu": cpu,
    "h100-80gb-hbm3-2026-11-26": h100,
    "h200-2026-11-26": h200,
    "h200-2026-11-26-spread-3": h200_spread,
    "h200-2026-11-26-modes": h200_large,
    "h200-2026-11-26-parts": h200_parts,
    "outside": outside,
    "overheads": overheads,
}
