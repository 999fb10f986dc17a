"""The table of what is expected of each model: ``expected.json``, written by ``record``."""

import json
import os
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("expected.json")
COMMAND = "python -m tests.models.record"
WAYS = ("labels", "loss only")
ASPECTS = ("rewrites", "graphs", "reasons")
WITH_INDUCTOR = os.environ.get("MODELS_BACKEND") == "inductor"


def load() -> dict[str, Any]:
    """``{"transformers": release, "torch": release, "models": {class name: entry}}``."""
    return json.loads(PATH.read_text())


def save(table: dict[str, Any]) -> None:
    """Write ``table``, so that two of them can be compared line by line."""
    PATH.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")


def entry(architecture: str, kind: str, found: dict[str, Any]) -> dict[str, Any]:
    """What the table keeps of what ``running.run`` found."""
    kept: dict[str, Any] = {"architecture": architecture, "kind": kind}
    if "not built" in found:
        return kept | {"not built": found["not built"]}
    for way in WAYS:
        outcome = found[way]
        if "failed" in outcome:
            kept[way] = {"failed": outcome["failed"]}
        else:
            kept[way] = {name: outcome[name] for name in ASPECTS}
    return kept


def differences(found: dict[str, Any]) -> list[str]:
    """What differs from the unfused model, in a sentence each."""
    return [
        f"{way}: {difference}"
        for way in WAYS
        for difference in found.get(way, {}).get("differences", ())
    ]


def changes(
    expected: dict[str, Any], found: dict[str, Any], aspects: tuple[str, ...] = ASPECTS
) -> list[str]:
    """How what ``running.run`` found is not what the table expects, in a sentence each.

    Messages of errors are not compared: they are other people's.
    """
    found = entry(expected["architecture"], expected["kind"], found)
    if ("not built" in found) != ("not built" in expected):
        return [f"{_or_built(found)}; expected: {_or_built(expected)}"]
    return [
        f"{way}: {aspect} {now.get(aspect)}, expected {before.get(aspect)}"
        for way in WAYS
        for aspect in aspects
        if (now := found.get(way, {})).get(aspect) != (before := expected.get(way, {})).get(aspect)
    ]


def _or_built(entry: dict[str, Any]) -> str:
    return f"not built ({entry['not built']})" if "not built" in entry else "built"
