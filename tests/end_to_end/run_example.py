"""Runs an example as Python would, but for Inductor's last step: graphs are run, not compiled.

``main`` takes from the command line: NAME RANK RANKS PORT ARGUMENT ...
"""

import functools
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch._inductor.compile_fx as inductor
from functorch.compile import make_boxed_func
from torch.fx import GraphModule

EXAMPLES = Path(__file__).parents[2] / "examples"


def _not_compiled(graph: GraphModule, *args: Any, **options: Any) -> Callable[..., Any]:
    return make_boxed_func(graph.forward)


def main() -> None:
    name, rank, ranks, port, *arguments = sys.argv[1:]
    os.environ |= {"RANK": rank, "WORLD_SIZE": ranks}  # as torchrun does
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    inductor.compile_fx = functools.partial(inductor.compile_fx, inner_compile=_not_compiled)
    sys.argv = [name, *arguments]
    sys.path[0] = str(EXAMPLES)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
