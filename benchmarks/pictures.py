"""The pictures of docs, drawn from benchmarks/results: ``pages.py`` has the command.

They are transparent, and of colours that can be read on white and on black.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import report
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {"compile": "#e8762d", "lmhead_pass": "#3b8ee0"}
NAMES = {"compile": "torch.compile", "lmhead_pass": "with lmhead_pass"}
GREY = "#7d8590"
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "lmhead_pass",  # the same results make the same file
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY
    ),
    "grid.color": GREY,
}
Row = dict[str, Any]


def draw_all(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        save(step_memory(report.read("step_memory")), folder / "step-memory.svg")
        rows = report.read("sizes")["rows"]
        for what, label in (("tokens", "tokens"), ("vocab", "words in the vocabulary")):
            save(against(rows, what, label), folder / f"against-{what}.svg")


def save(figure: Figure, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, transparent=True, metadata={"Date": None})
    # matplotlib ends lines with spaces, which nobody wants in a repository.
    file.write_text("\n".join(line.rstrip() for line in file.read_text().splitlines()) + "\n")


def step_memory(measured: dict[str, Any]) -> Figure:
    """The bytes of tensors over one training step."""
    figure, axes = plt.subplots(figsize=(8, 3.4))
    for name in COLOURS:
        rows = [row for row in measured["rows"] if row["impl"] == name]
        shares = [100 * row["share_of_step"] for row in rows]
        live = [row["bytes"] / 1e6 for row in rows]
        axes.fill_between(shares, live, step="post", color=COLOURS[name], alpha=0.25, linewidth=0)
        label = f"{NAMES[name]}: at most {max(live):.0f} MB"
        axes.step(shares, live, where="post", color=COLOURS[name], linewidth=1.4, label=label)
    axes.set(xlabel="% of one training step", ylabel="MB of tensors", xlim=(0, 100), ylim=(0, None))
    legend(axes)
    return figure


def against(rows: list[Row], what: str, label: str) -> Figure:
    """Peak memory and time of a step of the head against ``what``, the rest fixed."""
    other = "tokens" if what == "vocab" else "vocab"
    # Both sweeps are in one file: the fixed size is that which goes with the most others.
    fixed = max(
        {row[other] for row in rows},
        key=lambda size: len({row[what] for row in rows if row[other] == size}),
    )
    chosen = [row for row in rows if row[other] == fixed]
    figure, (memory, time) = plt.subplots(1, 2, figsize=(8, 3.2))
    draw(memory, chosen, what, lambda row: row["peak_bytes"] / 1e6)
    memory.set(xlabel=label, ylabel="MB at the peak of a step", ylim=(0, None), xlim=(0, None))
    draw(time, chosen, what, lambda row: row["ratio"])
    time.set(xlabel=label, ylabel="time, torch.compile = 1", ylim=(0, 1.5), xlim=(0, None))
    legend(memory)
    return figure


def legend(axes: Axes) -> None:
    """Above the axes, where it hides nothing."""
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderpad=0)


def draw(axes: Axes, rows: list[Row], what: str, value: Callable[[Row], float]) -> None:
    for name in COLOURS:
        points = sorted((row[what], value(row)) for row in rows if row["impl"] == name)
        axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[name], label=NAMES[name])
