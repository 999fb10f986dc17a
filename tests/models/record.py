"""``python -m tests.models.record [class name ...]`` writes the table and docs/coverage.md.

With names, only these models run; the rest of the table stays. Ends with an error if a rewritten
model differs from the unfused one.
"""

import sys
import time
from typing import Any

import torch
import transformers

from . import coverage, table
from .architectures import architectures
from .isolated import run_isolated


def main(names: list[str]) -> None:
    """Run the models and write what they did."""
    known = architectures()
    models = table.load()["models"] if names else {}
    differing = []
    for class_name in names or known:
        architecture, kind = known[class_name]
        start = time.monotonic()
        found = run_isolated(class_name, kind)
        models[class_name] = table.entry(architecture, kind, found)
        seconds = f"{time.monotonic() - start:.1f} s"
        line = f"{class_name}: {_line(models[class_name])} ({seconds})"
        print(line, *_left_alone(found), sep="\n  ", flush=True)
        differing += [f"{class_name}, {text}" for text in table.differences(found)]
    table.save(
        {
            "transformers": transformers.__version__,
            "torch": torch.__version__.split("+")[0],
            "models": {name: models[name] for name in known},
        }
    )
    coverage.PATH.write_text(coverage.page(table.load()))
    if differing:
        sys.exit("\n".join(["rewritten and unfused models differ:", *differing]))


def _left_alone(found: dict[str, Any]) -> list[str]:
    """Why losses are left alone, with the places in the source that the table leaves out."""
    outcomes = (found.get(way, {}) for way in table.WAYS)
    return list(dict.fromkeys(text for outcome in outcomes for text in outcome.get("details", ())))


def _line(entry: dict[str, Any]) -> str:
    if "not built" in entry:
        return f"not built: {entry['not built']}"
    ways = (entry[way] for way in table.WAYS)
    return ", ".join(str(way.get("rewrites", way.get("failed"))) for way in ways)


if __name__ == "__main__":
    main(sys.argv[1:])
