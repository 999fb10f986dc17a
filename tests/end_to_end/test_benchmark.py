"""The benchmarks at small sizes: that they run, and what they write."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.timing import alternate, ratio

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPT = FOLDER / "gpu.py"
# Few, since each is compiled for each mode.
IMPLEMENTATIONS = ["floor", "lmhead_pass", "torch_lce", "liger"]
MODES = ["train", "forward", "frozen", "by_row", "returned"]
ABOUT = {"tokens": 16, "hidden": 8, "vocab": 4100, "dtype": "float32"}


@pytest.mark.slow
def test_gpu_benchmark(tmp_path):
    program = [sys.executable, SCRIPT, "--device", "cpu", "--sizes", "16x8x4100", "--rounds", "2"]
    program += ["--dtype", "float32", "--out", tmp_path, "--impls", *IMPLEMENTATIONS]
    program += ["--modes", *MODES]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    (file,) = tmp_path.glob("cpu-*.json")
    report = json.loads(file.read_text())
    assert {*report} == {"gpu", "torch", "triton", "date", "command", "rows", "skipped"}
    assert file.stem == f"cpu-{report['date']}"
    assert "| 16 x 8 x 4100 float32 | train | floor | " in file.with_suffix(".md").read_text()

    rows = {(row["mode"], row["impl"]): row for row in report["rows"]}
    everything = {*rows} | {(row["mode"], row["impl"]) for row in report["skipped"]}
    assert everything == {(mode, name) for mode in MODES for name in IMPLEMENTATIONS}
    assert {*rows} >= {(mode, name) for mode in MODES for name in IMPLEMENTATIONS[:2]}
    for (mode, name), row in rows.items():
        assert {**row, **ABOUT} == row
        assert row["median_ms"] > 0
        assert row["floor_ratio"] > 0
        assert row["peak_bytes"] > 0
        has_error = mode != "forward" and name != "floor"
        assert row["grad_error"] < 1e-4 if has_error else row["grad_error"] is None


def test_steps_take_turns():
    done = []
    clock = iter(range(100))
    steps = {name: lambda name=name: done.append(name) for name in "ab"}

    def measure(step):
        step()
        return next(clock)

    times = alternate(steps, 2, measure)
    assert "".join(done) == "abbaab"
    assert times == {"a": [3, 4], "b": [2, 5]}  # the first round is dropped
    assert ratio(times, "a", "b") == pytest.approx((3 / 2 + 4 / 5) / 2)


def test_a_table_of_results(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import report
    import tables

    rows = [
        {"impl": name, "dtype": "float32", "ratio": number, "peak_bytes": number * 1e6}
        for name, number in {"floor": 0.5, "compile": 1, "lmhead_pass": 2}.items()
    ]
    about = {"command": "C", "machine": "M", "torch": "T", "date": "D", "rows": rows}
    before = "above\n<!-- benchmarks/results/cpu.json -->\nold\n<!-- end -->\nbelow"
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    assert tables.with_tables(before) == before  # without results
    (tmp_path / "cpu.json").write_text(json.dumps(about))
    after = tables.with_tables(before)
    assert after == tables.with_tables(after)
    assert after.splitlines() == [
        "above",
        "<!-- benchmarks/results/cpu.json -->",
        "| | FP32 memory | FP32 time |",
        "|---|---|---|",
        "| `torch.compile` | 1 MB | 1.00 |",
        "| with `lmhead_pass` | 2 MB | 2.00 |",
        "| the three products alone |  | 0.50 |",
        "",
        "`C`: M, torch T, D.",
        "<!-- end -->",
        "below",
    ]


def test_tables_of_pages_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import tables

    pages = [FOLDER.parent / "README.md", *(FOLDER.parent / "docs").glob("*.md")]
    texts = {page.name: page.read_text() for page in pages}
    assert {name: tables.with_tables(text) for name, text in texts.items()} == texts


@pytest.mark.slow
def test_cpu_benchmark(tmp_path):
    file = tmp_path / "cpu.json"
    program = [sys.executable, FOLDER / "cpu.py", "--tokens", "16", "--hidden", "8"]
    program += ["--vocab", "4100", "--rounds", "1", "--dtypes", "float32", "--json", file]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = {row["impl"]: row for row in json.loads(file.read_text())["rows"]}
    assert {*rows} >= {"lmhead_pass", "compile", "floor"}
    assert rows["compile"]["ratio"] == 1
    assert all(row["peak_bytes"] > 16 * 4100 for row in rows.values())
