"""``python -m tests.models.coverage`` writes docs/coverage.md from the table."""

from collections import Counter
from pathlib import Path
from typing import Any

from . import table

PATH = Path(__file__).parents[2] / "docs" / "coverage.md"
COMMAND = "python -m tests.models.coverage"
_LONGEST_REASON = 200


_TOP = """\
# Coverage

Written by `{command}` from `tests/models/expected.json`; do not edit.

Every class of transformers that is a causal, masked or conditional-generation language model, by
the lists of its auto classes (transformers {transformers}, torch {torch}). Each is built tiny and
random by rules, and a training step of it is compiled in two ways: *labels*,
`model(**inputs, labels=labels)`, which returns the loss and the logits, as its author wrote it;
*loss only*, a function that returns the loss alone. In both, rewritten or not, loss, logits and
every gradient equal those of the same step without the pass. `tox run -e models` checks it.
"""
_MODELS = """
## Models

A number is how many losses are rewritten.

| architecture | class | labels | loss only | reason |
|---|---|---|---|---|"""
_NOT_BUILT = """
## Not built

No rule makes a tiny configuration of these, or inputs that they take. That says nothing about the
pass.

| architecture | class | the first attempt's failure |
|---|---|---|"""


def page(recorded: dict[str, Any]) -> str:
    """The text of docs/coverage.md."""
    models = recorded["models"]
    built = {name: entry for name, entry in models.items() if "not built" not in entry}
    top = _TOP.format(
        command=COMMAND, transformers=recorded["transformers"], torch=recorded["torch"]
    )
    lines = [top, *_summary(models, built), *_reasons(built)]
    lines += [_MODELS, *(_row(name, entry) for name, entry in built.items())]
    lines += [_NOT_BUILT]
    lines += (_not_built(name, models[name]) for name in models if name not in built)
    return "\n".join(lines) + "\n"


def _summary(models: dict[str, Any], built: dict[str, Any]) -> list[str]:
    entries = list(built.values())
    rows = [
        (kind, number, *(_rewritten(entries, way, kind) for way in table.WAYS))
        for kind, number in Counter(entry["kind"] for entry in entries).most_common()
    ]
    rows.append(("all", len(built), *(_rewritten(entries, way) for way in table.WAYS)))
    return [
        f"{len(models)} classes, of which {len(built)} are built.",
        "",
        "| kind | built | rewritten with labels | rewritten as loss only |",
        "|---|---|---|---|",
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
    ]


def _rewritten(entries: list[dict[str, Any]], way: str, kind: str | None = None) -> int:
    return sum(
        bool(entry[way].get("rewrites")) for entry in entries if kind in (None, entry["kind"])
    )


def _reasons(built: dict[str, Any]) -> list[str]:
    """How many models are left alone for each reason."""
    counts = Counter(reason for entry in built.values() if (reason := _reason(entry)))
    if not counts:
        return []
    lines = [f"| {number} | {reason} |" for reason, number in counts.most_common()]
    return ["", "| models | reason why they are left alone |", "|---|---|", *lines]


def _row(class_name: str, entry: dict[str, Any]) -> str:
    ways = (_result(entry[way]) for way in table.WAYS)
    return f"| {entry['architecture']} | {class_name} | {' | '.join(ways)} | {_reason(entry)} |"


def _result(outcome: dict[str, Any]) -> str:
    return "failed" if "failed" in outcome else str(outcome["rewrites"] or "no")


def _reason(entry: dict[str, Any]) -> str:
    """Why the first way that is left alone is."""
    for way in table.WAYS:
        outcome = entry[way]
        if "failed" in outcome:
            return _cell(f"fails: {outcome['failed']}")
        if not outcome["rewrites"]:
            return _cell(_plain(outcome["reasons"]))
    return ""


def _plain(reasons: list[str]) -> str:
    """The refusals; if head and loss are in different graphs, the graph breaks."""
    breaks = [reason for reason in reasons if reason.startswith("graph break: ")]
    refusals = [reason for reason in reasons if reason not in breaks]
    if breaks and all("input of this graph" in refusal for refusal in refusals):
        # Of several breaks the last is the nearest to the loss.
        return f"head and loss are in different graphs; {breaks[-1]}"
    return "; ".join(refusals) or "no loss over logits reached a graph"


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
