"""Which chunk loop runs where, and what that takes to import."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lmhead_pass.op.kernels import aten_loop as aten
from lmhead_pass.op.kernels import dispatch

pytest.importorskip("triton")


@pytest.fixture
def lines():
    """What the package logs."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    log = logging.getLogger("lmhead_pass")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    dispatch.loop_for.cache_clear()
    yield records
    dispatch.loop_for.cache_clear()
    log.removeHandler(handler)
    log.setLevel(level)


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_gpus_run_triton(device, lines):
    assert dispatch.loop_for(device).__name__ == "lmhead_pass.op.kernels.triton_loop"
    assert lines == []


def test_cpu_runs_aten(lines):
    assert dispatch.loop_for("cpu") is aten
    assert lines == []


def test_other_devices_run_aten_and_say_so_once(lines):
    assert dispatch.loop_for("mps") is dispatch.loop_for("mps") is aten
    assert lines == [
        "the chunk loop runs in plain ATen on mps, which is slower: there are no Triton kernels "
        "for mps"
    ]


def test_gpus_without_triton_run_aten_and_say_so(lines, monkeypatch):
    kernels = Path(dispatch.__file__).parent
    for name in [file.stem for file in kernels.glob("triton_*.py")]:
        monkeypatch.delitem(sys.modules, f"lmhead_pass.op.kernels.{name}", raising=False)
        monkeypatch.delattr(f"lmhead_pass.op.kernels.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert dispatch.loop_for("cuda") is aten
    (line,) = lines
    assert line.startswith(
        "the chunk loop runs in plain ATen on cuda, which is slower: Triton cannot be imported"
    )


PROGRAM = """
import sys
{before}
import torch
import lmhead_pass
args = torch.ones(3, 4), torch.ones(5, 4), None, torch.zeros(3, dtype=torch.long), *[None] * 5
op = torch.ops.lmhead_pass.linear_cross_entropy
print(op(*args, "mean", -100, 0.0, 1.0, None, "tanh", torch.float32, 2).item())
imported = {{"triton", "numpy"}} & {{name for name, module in sys.modules.items() if module}}
assert not {{name for name in imported if "{before}" or name == "triton"}}, imported
"""


@pytest.mark.parametrize(
    "before", ["", "sys.modules['triton'] = sys.modules['numpy'] = None"], ids=["with", "without"]
)
def test_neither_triton_nor_numpy_is_needed(before):
    """In a fresh process: nothing on the way to a loss on the CPU imports Triton."""
    program = [sys.executable, "-W", "ignore", "-c", PROGRAM.format(before=before)]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(torch.tensor(5.0).log().item())
