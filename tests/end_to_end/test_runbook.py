"""The page for the first hours on a GPU, rehearsed without one: each command, at a toy size."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from lmhead_pass.op import holding

from ..device import DEVICE

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "docs" / "gpu-runbook.md").read_text().splitlines()
COMMANDS = [line.strip() for line in LINES if re.match(r" {4,}(\S+=\S+ |python )", line)]
WITHOUT_A_GPU = pytest.mark.skipif(DEVICE != "cpu", reason="would run at full size")


@pytest.fixture
def script(monkeypatch):
    """A function that runs a script of the benchmarks' folder."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def run(name, *arguments):
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        module.main()

    return run


def arguments(command):
    """The script, or module, and its arguments."""
    words = shlex.split(command)
    return words[words.index("python") + 1 :]


def test_the_page_has_commands():
    scripts = {arguments(command)[0] for command in COMMANDS}
    assert scripts == {"-m", *(f"benchmarks/gpu{part}.py" for part in ("", "_parts", "_steps"))}
    assert len(COMMANDS) >= 10


OF_GPU = [command for command in COMMANDS if arguments(command)[0] == "benchmarks/gpu.py"]


@WITHOUT_A_GPU
@pytest.mark.parametrize("command", OF_GPU)
def test_benchmark(command, script, tmp_path, capsys):
    """As it stands on the page, but on the CPU with the floor alone: what others do is compiled."""
    _, *given = arguments(command)
    with pytest.raises(SystemExit, match="there is no GPU here"):
        script("gpu", *given)
    toy = ["--device", "cpu", "--sizes", "16x8x4100", "--rounds", "1", "--dtype", "float32"]
    script("gpu", *given, *toy, "--impls", "floor", "--out", str(tmp_path))
    table = capsys.readouterr().out
    assert "| 16 x 8 x 4100 float32 | " in table
    assert "not run" not in table
    assert len(list(tmp_path.glob("cpu-*"))) == 2


@WITHOUT_A_GPU
def test_steps_that_are_over_are_rows(script, tmp_path, capsys):
    toy = ["--device", "cpu", "--sizes", "16x8x4100", "--modes", "forward", "--seconds", "0"]
    script("gpu", *toy, "--impls", "floor", "--dtype", "float32", "--out", str(tmp_path))
    assert "| forward | floor | not run: Skipped: the 0 seconds" in capsys.readouterr().out


@WITHOUT_A_GPU
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in Triton's interpreter
def test_parts(script, monkeypatch):
    for command in COMMANDS:
        if "gpu_parts.py" in command:
            with pytest.raises(SystemExit, match="there is no GPU here"):
                script("gpu_parts", *arguments(command)[1:])
    module = importlib.import_module("gpu_parts")
    monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(holding, "_is_hopper", lambda device: True)
    for steps in module.parts(16, 16, 301):
        for step in steps.values():
            step()


@WITHOUT_A_GPU
def test_steps(script, monkeypatch):
    script  # noqa: B018  puts the folder on the path
    module = importlib.import_module("gpu_steps")
    monkeypatch.setattr(module, "DEVICE", "cpu")
    assert module.step(torch.float32, "none", 30.0, ["argmax", "entropy"]) > 0


def test_names_of_tests_exist():
    tests = (ROOT / "tests" / "end_to_end" / "test_gpu.py").read_text()
    named = re.findall(r"`(test_\w+)`", "\n".join(LINES))
    assert named
    assert all(f"def {name}(" in tests for name in named)
