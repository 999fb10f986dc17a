"""``python -m tests.models.coverage`` writes docs/coverage.md from the table."""

from collections import Counter
from pathlib import Path
from typing import Any

from . import table

PATH = Path(__file__).parents[2] / "docs" / "coverage.md"
COMMAND = "python -m tests.models.coverage"
_LONGEST_REASON = 200


def page(recorded: dict[str, Any]) -> str:
    """The text of docs/coverage.md."""
    models = recorded["models"]
    return "\n".join(
        [
            "# Coverage",
            "",
            f"Written by `{COMMAND}` from `tests/models/expected.json`; do not edit.",
            "",
            "Every class of transformers that is a causal, masked or conditional-generation language",
            f"model, by the lists of its auto classes (transformers {recorded['transformers']}, torch",
            f"{recorded['torch']}). Each is built tiny and random by rules, and a training step of it is",
            "compiled in two ways: *labels*, `model(**inputs, labels=labels)` that returns the loss and",
            "the logits, as its author wrote it; *loss only*, a function that returns the loss alone.",
            "Where the loss is rewritten, loss, logits and every gradient equal those of the step that",
            "is not.",
            "",
            *_summary(models),
            "",
            *_reasons(models),
            "",
            "## Models",
            "",
            "A number is how many losses are rewritten.",
            "",
            "| architecture | class | labels | loss only | reason |",
            "|---|---|---|---|---|",
            *(_row(name, models[name]) for name in models if "not built" not in models[name]),
            "",
            "## Not built",
            "",
            "No rule makes a tiny configuration, or inputs, that these take. It says nothing about the",
            "pass.",
            "",
            "| architecture | class | what is missing |",
            "|---|---|---|",
            *(_not_built(name, models[name]) for name in models if "not built" in models[name]),
            "",
        ]
    )


def _summary(models: dict[str, Any]) -> list[str]:
    built = [entry for entry in models.values() if "not built" not in entry]
    kinds = Counter(entry["kind"] for entry in built)
    rows = [
        (kind, number, *(_rewritten(built, way, kind) for way in table.WAYS))
        for kind, number in kinds.most_common()
    ]
    rows.append(("all", len(built), *(_rewritten(built, way) for way in table.WAYS)))
    return [
        f"{len(models)} classes, of which {len(built)} are built and "
        f"{len(models) - len(built)} are not.",
        "",
        "| kind | built | rewritten with labels | rewritten as loss only |",
        "|---|---|---|---|",
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
    ]


def _rewritten(entries: list[dict[str, Any]], way: str, kind: str | None = None) -> int:
    return sum(
        bool(entry[way].get("rewrites")) for entry in entries if kind in (None, entry["kind"])
    )


def _reasons(models: dict[str, Any]) -> list[str]:
    """How many models are left alone for each reason."""
    counts = Counter(
        reason
        for entry in models.values()
        if (reason := _reason(entry)) and "not built" not in entry
    )
    if not counts:
        return []
    return [
        "| models | reason |",
        "|---|---|",
        *(f"| {number} | {reason} |" for reason, number in counts.most_common()),
    ]


def _row(class_name: str, entry: dict[str, Any]) -> str:
    ways = (_result(entry[way]) for way in table.WAYS)
    return f"| {entry['architecture']} | {class_name} | {' | '.join(ways)} | {_reason(entry)} |"


def _result(outcome: dict[str, Any]) -> str:
    return "failed" if "failed" in outcome else str(outcome["rewrites"] or "no")


def _reason(entry: dict[str, Any]) -> str:
    """Why the first way that is left alone is."""
    for way in table.WAYS:
        outcome = entry.get(way, {})
        if "failed" in outcome:
            return _cell(f"fails without lmhead_pass: {outcome['failed']}")
        if outcome and not outcome["rewrites"]:
            return _cell("; ".join(outcome["reasons"]) or "no loss over logits reached a graph")
    return ""


def _not_built(class_name: str, entry: dict[str, Any]) -> str:
    return f"| {entry['architecture']} | {class_name} | {_cell(entry['not built'])} |"


def _cell(text: str) -> str:
    text = " ".join(text.split())
    if len(text) > _LONGEST_REASON:
        text = text[: _LONGEST_REASON - 1] + "…"
    if text.count("`") % 2:
        text += "`"
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PATH.write_text(page(table.load()))
