"""Two processes: gradients are those of one process with the whole batch."""

import os

import pytest

from lmhead_pass import compat

from ..process import interpreter

# What the log says of the loss, and how many are rewritten.
_NO_HEAD = "the logits are an input of this graph"  # Dynamo cuts between head and loss
_DTENSOR = "is a DTensor, not a plain tensor"
CASES = {
    "ddp": ("rewritten: ", 1),
    "ddp_in_buckets": (
        ("rewritten: ", 1) if compat.DDP_PARTS_RETURN_SUBCLASSES else ("borders of its buckets", 0)
    ),
    "ddp_unused": ("rewritten: ", 1),
    "ddp_static": ("rewritten: ", 1),
    "fsdp": ("rewritten: ", 1),
    "fsdp_mixed": ("rewritten: ", 1),
    "fsdp_resharded": ("rewritten: ", 1),
    "fsdp_by_module": (_NO_HEAD, 0),
    "tensor_parallel": (_DTENSOR, 0),
    "tensor_parallel_loss": (_DTENSOR, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_two_processes(case, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = tmp_path / "script.py"
    script.write_text("from tests.end_to_end.parallel_step import main\nmain()\n")
    done = interpreter("tests.end_to_end.parallel_step").run(
        *([str(script), str(rank), str(tmp_path), case] for rank in range(2)),
        environment=environment,
    )
    reason, count = CASES[case]
    for process in done:
        output = process.stdout + process.stderr
        assert process.returncode == 0, output
        assert reason in output, output
        assert f"rewritten {count}" in output, output
