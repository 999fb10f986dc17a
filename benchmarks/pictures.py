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
from matplotlib.ticker import MaxNLocator

COLOURS = {"compile": "#e8762d", "lmhead_pass": "#3b8ee0"}
NAMES = {"compile": "torch.compile", "lmhead_pass": "with lmhead_pass"}
WORDS = {"tokens": "tokens", "vocab": "words"}
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
        memory = against_size(rows, "MB at the peak", lambda row: row["peak_bytes"] / 1e6)
        save(memory, folder / "memory-against-size.svg")
        if all("seconds" in row for row in rows):
            time = against_size(rows, "seconds", lambda row: row["seconds"])
            save(time, folder / "time-against-size.svg")


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


def against_size(rows: list[Row], label: str, value: Callable[[Row], float]) -> Figure:
    """A number of a step of the head against tokens and against words, the other fixed."""
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True)
    for axes, what, other in zip(panels, ("tokens", "vocab"), ("vocab", "tokens"), strict=True):
        # Both sweeps are in one file: the fixed size is that which goes with the most others.
        fixed = max(
            sorted({row[other] for row in rows}),
            key=lambda size: len({row[what] for row in rows if row[other] == size}),
        )
        for name in COLOURS:
            points = sorted(
                (row[what], value(row))
                for row in rows
                if row["impl"] == name and row[other] == fixed
            )
            axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[name], label=NAMES[name])
        axes.set(xlabel=f"{WORDS[what]} (with {fixed:,} {WORDS[other]})", xlim=0)
        axes.xaxis.set_major_formatter(lambda size, _: f"{size:,.0f}")
        axes.xaxis.set_major_locator(MaxNLocator(4))
    panels[0].set(ylabel=label, ylim=0)
    legend(panels[0])
    return figure


def legend(axes: Axes) -> None:
    """Above the axes, where it hides nothing."""
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderpad=0)
