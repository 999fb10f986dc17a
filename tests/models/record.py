"""``python -m tests.models.record [class name ...]`` writes the table and docs/coverage.md.

With names, only these models run; the rest of the table stays. Ends with an error if a rewritten
model differs from the unfused one: such a table is not written.
"""

import sys
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
        found = run_isolated(class_name, kind)
        models[class_name] = table.entry(architecture, kind, found)
        print(f"{class_name}: {_line(models[class_name])}", flush=True)
        differing += [f"{class_name}, {text}" for text in table.differences(found)]
    if differing:
        sys.exit("\n".join(["rewritten and unfused models differ:", *differing]))
    table.save(
        {
            "transformers": transformers.__version__,
            "torch": torch.__version__.split("+")[0],
            "models": {name: models[name] for name in known},
        }
    )
    coverage.PATH.write_text(coverage.page(table.load()))


def _line(entry: dict[str, Any]) -> str:
    if "not built" in entry:
        return f"not built: {entry['not built']}"
    ways = (entry[way] for way in table.WAYS)
    return ", ".join(str(way.get("rewrites", way.get("failed"))) for way in ways)


if __name__ == "__main__":
    main(sys.argv[1:])
