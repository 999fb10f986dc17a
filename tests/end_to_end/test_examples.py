"""Each example runs, says what it rewrites, and trains.

Graphs are run as they are, without Inductor's compiler (``run_example.py``).
"""

import array
import os
import random
import re
import socket
import subprocess
import sys

import pytest

from ..process import interpreter

MODULE = "tests.end_to_end.run_example"
# What each has to say of its losses.
SAYS = {
    "train_gpt.py": ["rewritten: cross_entropy"],
    "loss_outside.py": ["deferred: linear", "rewritten: cross_entropy", "rewritten: argmax"],
    "dpo_logprobs.py": ["rewritten: gather", "logits computed again in the backward"],
    "distillation.py": ["rewritten: kl_div", ", with cross_entropy", "chunked: "],
    "huggingface_trainer.py": ["deferred: linear", "rewritten: gather", "eval_accuracy"],
    "lightning_module.py": ["rewritten: cross_entropy"],
}
NEEDS = {"huggingface_trainer.py": "transformers", "lightning_module.py": "lightning"}


def run(folder, name: str, *arguments: str, ranks: int = 1) -> list[str]:
    """What each rank prints, then what it logs."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    script = folder / "script.py"
    script.write_text(f"from {MODULE} import main\nmain()\n")
    done = interpreter(MODULE).run(
        *([str(script), name, str(rank), str(ranks), port, *arguments] for rank in range(ranks)),
        environment={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for process in done:
        assert process.returncode == 0, process.stdout + process.stderr
    return [process.stdout + process.stderr for process in done]


def losses(output: str) -> list[str]:
    return re.findall(r"\bloss'?:? '?([\d.]+)", output)


@pytest.mark.parametrize("name", SAYS)
def test_example(name, tmp_path):
    pytest.importorskip(NEEDS.get(name, "torch"))
    arguments = []
    if name == "train_gpt.py":
        text = tmp_path / "tokens"
        text.write_bytes(array.array("i", [random.randrange(300) for _ in range(600)]).tobytes())
        arguments = ["--tokens", str(text), "--steps", "4", "--batch", "1"]
    (output,) = run(tmp_path, name, *arguments)
    for words in SAYS[name]:
        assert words in output, output
    if name != "lightning_module.py":  # which prints the last alone
        first, *_, last = map(float, losses(output))
        assert last < first, output


def test_parallel_examples(tmp_path):
    """Both ways to share the work of the same steps come to the same losses."""
    outputs = {name: run(tmp_path, name, ranks=2) for name in ("ddp.py", "fsdp2.py")}
    for first, second in outputs.values():
        assert "rewritten: cross_entropy" in first and not losses(second)
    ddp, fsdp2 = (losses(first) for first, _ in outputs.values())
    assert ddp == fsdp2 and len(ddp) == 5 and float(ddp[-1]) < float(ddp[0])


def test_inspect_rewrite(tmp_path):
    # torch reads TORCH_TRACE when it is imported.
    code = f"from {MODULE} import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect_rewrite.py", "0", "1", "0"],
        env={**os.environ, "TORCH_TRACE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    for words in (
        "lmhead_pass: 1 rewritten, 0 left alone",
        "before:\n%logits",
        "torch.ops.lmhead_pass.linear_cross_entropy.default",
        "{'rewritten': 1}",
        "lmhead_pass_before, lmhead_pass_after",
    ):
        assert words in output, output
