"""What a user's program does with the installed package, and the types that it sees.

``tox run -e wheel`` runs this, and has mypy look at it, outside of the repository.
"""

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from typing_extensions import assert_type

import lmhead_pass


def step(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(hidden @ weight.t(), target)


def main() -> None:
    assert "site-packages" in str(lmhead_pass.__file__), lmhead_pass.__file__
    assert Path(lmhead_pass.__file__).with_name("py.typed").exists()
    assert lmhead_pass.__version__ == version("lmhead_pass")
    assert_type(lmhead_pass.config.batch_chunk_size, int | None)
    assert_type(lmhead_pass.config.get_config_copy(), dict[str, Any])

    @lmhead_pass.config.patch({"min_vocab_size": 7})
    def patched() -> int:
        return lmhead_pass.config.min_vocab_size

    assert_type(patched(), int)
    assert patched() == 7

    inputs = torch.randn(8, 16), torch.randn(5000, 16, requires_grad=True), torch.arange(8)
    with lmhead_pass.config.patch(strict=True):
        explanation = lmhead_pass.explain(step, *inputs)
        assert_type(explanation.rewritten, list[str])
        assert_type(str(explanation), str)
        assert len(explanation.rewritten) == 1, explanation
        compiled: Callable[..., torch.Tensor] = torch.compile(step)
        loss = compiled(*inputs)
    torch.testing.assert_close(loss, step(*inputs))
    loss.backward()  # type: ignore[no-untyped-call]
    counted = torch._dynamo.utils.counters["lmhead_pass"]["rewritten"]
    assert counted == 1, counted
    subprocess.run([sys.executable, "-I", "-m", "lmhead_pass", "env"], check=True)


if __name__ == "__main__":
    main()
