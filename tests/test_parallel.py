"""Two processes: gradients are those of one process with the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# How many losses are rewritten; where Dynamo cuts the graph between head and loss, none.
REWRITTEN = {"ddp": 1, "ddp_in_buckets": 1, "fsdp": 1, "fsdp_mixed": 1, "fsdp_by_module": 0}


@pytest.mark.parametrize("case", REWRITTEN)
def test_gradients_of_two_processes(case, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.parallel_step", str(rank), str(tmp_path), case],
            cwd=Path(__file__).parents[1],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        assert f"rewritten {REWRITTEN[case]}" in output, output
