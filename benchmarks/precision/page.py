"""docs/precision.md, from what was measured."""

import platform
import shlex
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path

import torch

from .cases import Case, Maker, Sizes
from .errors import OutOfRange
from .implementations import IMPLEMENTATIONS

PATH = Path(__file__).parents[2] / "docs" / "precision.md"
UNFUSED = list(IMPLEMENTATIONS).index("torch.compile")
NAMES = {torch.float32: "FP32", torch.bfloat16: "BF16", torch.float16: "FP16"}
Row = tuple[Case, str, list[Sequence[float] | None]]
"""A case, the dtype, and what was measured of each implementation, None for nothing."""

TOP = """\
# Precision

Written by `{command}` in {minutes:.0f} minutes; do not edit.
Measured on {machine} with torch {torch}, {date}.

Loss and gradients of a linear layer and a mean cross entropy, beside FP64 of the same inputs (those
that the implementation got, already rounded to its dtype).

- `torch.compile`: `F.cross_entropy(F.linear(hidden, weight, bias).float(), target)`, compiled
  without the pass.
- `lmhead_pass`: the same function, compiled with it.
- `F.linear_cross_entropy`: chunked by its options.
- `auto_chunker`: Inductor's, told to chunk whatever the sizes.

The last three go through the tokens in 8 chunks, where the case has no number of its own. A dash is
where an implementation did not apply."""
ERRORS = """
## Errors

Each cell has four errors: of the loss / of the gradient of hidden / of weight / of bias, in units
of the dtype's eps ({eps}). Rounding the exact value once costs
up to 0.5.

The error of a gradient is its largest, relative to its largest exact entry. In *nearly one-hot* and
*rare words*, where rows differ by orders of magnitude, it is that of each row (of one token, or one
word) relative to the row's own largest exact entry, and the cell has the worst row; rows below the
smallest normal number of the dtype do not count. In FP16 the loss is multiplied by 2^15 before the
backward, as a `GradScaler` does.
"""
WORST = """
The most by which an error is above that of `torch.compile` in the same case, over all cases:
"""
NOTES = """
- A CPU's BF16 product rounds each chunk's share of the weight's gradient. In *cancelling* these are
  larger than their sum: what rounding took from the rows of words that are targets, the pass adds.
  In FP32 and FP16 the shares are FP32.
- In BF16 and FP16 on CPUs `F.linear_cross_entropy` keeps its logits in FP32, which shows where they
  are large. The others round them to the dtype.

## FP16 under a GradScaler of 2^16

How many entries of all gradients underflow / overflow: are 0, where the exact value is at least
FP16's smallest number (6e-8), or infinite or NaN, where it is at most its largest (65504). *FP16*
has all tensors in FP16; *autocast* is FP32 tensors of the same values, and FP16 products. The
gradient of an FP16 loss, as `F.linear_cross_entropy` has, is FP16 too, where 2^16 is infinite.
"""
CASES = "\n## Cases\n"


def page(errors: list[Row], counts: list[Row], command: list[str], seconds: float) -> str:
    """The text of docs/precision.md."""
    top = TOP.format(
        command=shlex.join(command),
        minutes=seconds / 60,
        machine=_machine(),
        torch=torch.__version__,
        date=date.today(),
    )
    eps = ", ".join(f"{name} {torch.finfo(dtype).eps:.1e}" for dtype, name in NAMES.items())
    lines = [top, ERRORS.format(eps=eps)]
    lines += _table(
        ["case", "dtype", *IMPLEMENTATIONS],
        [[case.name, dtype, *map(_four, cells)] for case, dtype, cells in errors],
    )
    lines += [WORST, *_table(["dtype", *IMPLEMENTATIONS], _worst(errors)), NOTES]
    lines += _table(
        ["case", "dtype", *IMPLEMENTATIONS],
        [[case.name, dtype, *map(_two, cells)] for case, dtype, cells in counts],
    )
    cases = dict.fromkeys(case for case, *_ in errors + counts)
    lines += [CASES, *_table(["cases", "tokens x hidden x words", "what they are"], _about(cases))]
    return "\n".join(lines) + "\n"


def _machine() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} ({capability}, threads: {torch.get_num_threads()})"


def _table(head: list[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _worst(errors: list[Row]) -> Iterator[list[str]]:
    for name in NAMES.values():
        rows = [cells for _, dtype, cells in errors if dtype == name]
        yield [name, *(_four(_excess(rows, column)) for column in range(len(IMPLEMENTATIONS)))]


def _excess(rows: list[list[Sequence[float] | None]], column: int) -> list[float]:
    """Of each of the four errors in ``column``, the most by which it is above the unfused one."""
    pairs = [(row[column], row[UNFUSED]) for row in rows if row[column] is not None]
    excess = ([a - b for a, b in zip(cell, unfused, strict=True)] for cell, unfused in pairs)
    return [max(errors) for errors in zip(*excess, strict=True)]


def _four(errors: Sequence[float] | None) -> str:
    return "-" if errors is None else " / ".join(map(_short, errors))


def _two(counts: OutOfRange | None) -> str:
    return "-" if counts is None else " / ".join(map(str, counts))


def _short(error: float) -> str:
    return f"{error:.1f}" if error < 99.95 else f"{error:.0e}".replace("e+0", "e")


def _about(cases: Iterable[Case]) -> Iterator[list[str]]:
    names: dict[tuple[Sizes, Maker], list[str]] = {}
    for case in cases:
        names.setdefault((case.sizes, case.make), []).append(case.name)
    for (sizes, make), alike in names.items():
        yield [", ".join(alike), " x ".join(map(str, sizes)), " ".join(make.__doc__.split())]
