"""``python -m lmhead_pass env`` and ``python -m lmhead_pass estimate``."""

import argparse
import sys
from collections.abc import Sequence

import torch

from .registration import why_not_run

_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


def _at_least_one(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lmhead_pass")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help="print what a bug report needs to know of this environment")
    estimate = commands.add_parser("estimate", help="print what the pass would save a head")
    estimate.add_argument("--tokens", type=_at_least_one, required=True, help="of a batch")
    estimate.add_argument("--hidden", type=_at_least_one, required=True, help="hidden size")
    estimate.add_argument("--vocab", type=_at_least_one, required=True, help="words")
    estimate.add_argument("--dtype", choices=_DTYPES, required=True, help="of head and logits")
    estimate.add_argument("--device", choices=("cpu", "cuda", "xpu"), default="cpu")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; ``arguments`` are those of the command line."""
    from .command_line import environment, estimate, show
    from .op import MemoryBudgetTooSmall

    given = _parser().parse_args(arguments)
    if given.command == "env":
        show(environment(why_not_run))
    else:
        dtype, device = _DTYPES[given.dtype], torch.device(given.device)
        try:
            tables = estimate(given.tokens, given.hidden, given.vocab, dtype, device)
        except MemoryBudgetTooSmall as error:
            sys.exit(str(error))
        show(tables)


if __name__ == "__main__":
    main(sys.argv[1:])
