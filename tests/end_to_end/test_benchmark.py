"""The GPU's benchmark, at a size for the CPU: that it runs, and what it writes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
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
