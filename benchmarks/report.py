"""Results as JSON, with what they were measured on and by which command."""

import json
import platform
import shlex
import sys
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "results"


def about() -> dict[str, str]:
    """The machine, the versions, the date and the command."""
    script, *arguments = sys.argv
    return {
        "machine": f"{_cpu()}, threads: {torch.get_num_threads()}",
        "torch": torch.__version__,
        "date": str(date.today()),
        "command": shlex.join(["python", f"benchmarks/{Path(script).name}", *arguments]),
    }


def write(file: Path, rows: Iterable[dict[str, Any]], **more: Any) -> None:
    """Write ``rows``, and what else there is, to ``file``, a row a line."""
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    head = json.dumps({**about(), **more}, indent=1)[:-2]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n')


def read(name: str) -> dict[str, Any]:
    """The results in ``benchmarks/results/NAME.json``."""
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return found


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
