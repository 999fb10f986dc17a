"""The tables of README and docs are what ``benchmarks/pages.py`` makes of the committed results."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as where its scripts are run
    return importlib.import_module("tables")


def test_tables_are_those_of_the_results(tables):
    found = 0
    for page in PAGES:
        text = page.read_text()
        assert tables.with_tables(text) == text, page
        found += text.count("<!-- benchmarks/results/")
    assert found == len(tables.TABLES)


def test_each_table_has_its_results(tables):
    report = importlib.import_module("report")
    assert [name for name in tables.TABLES if not (report.FOLDER / f"{name}.json").exists()] == []


def test_predictions_are_those_of_the_formulas(tables, capsys):
    importlib.import_module("gpu_model").main()
    predicted = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(predicted) > 8
    assert "\n".join(predicted) in (ROOT / "docs" / "gpu.md").read_text()
