"""See the package."""

import argparse
import functools
import sys
import time
from collections.abc import Iterator

import torch
import torch._inductor.config

from . import errors
from .cases import CASES, LOSS_SCALED, Case, Inputs, Sizes
from .implementations import IMPLEMENTATIONS, Loss, train
from .page import NAMES, PATH, page

LOSS_SCALE = 2.0**15  # of FP16: no larger, since F.linear_cross_entropy holds it in FP16
GRAD_SCALER = 2.0**16


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision")
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    parser.add_argument("--write", action="store_true", help=f"write {PATH.name}")
    options = parser.parse_args()

    start = time.perf_counter()
    # What comes out of a cache does not tell whether it is in chunks.
    with torch._inductor.config.patch(force_disable_caches=True):
        measured = [
            (case, name, measure_errors(case, dtype))
            for case in CASES
            for dtype, name in NAMES.items()
            if options.only in case.name
        ]
        counted = [
            (case, "autocast" if autocast else "FP16", count_out_of_range(case, autocast))
            for case in LOSS_SCALED
            for autocast in (False, True)
            if options.only in case.name
        ]
    command = ["python", "-m", "benchmarks.precision", *sys.argv[1:]]
    text = page(measured, counted, command, time.perf_counter() - start)
    print(text)
    if options.write:
        PATH.write_text(text)


def measure_errors(case: Case, dtype: torch.dtype) -> list[list[float] | None]:
    inputs = case.inputs(dtype)
    exact = errors.exact(inputs)
    scale = LOSS_SCALE if dtype == torch.float16 else 1.0
    return [
        None if results is None else errors.errors(case, results, exact, dtype, scale)
        for results in train_all(case, inputs, scale)
    ]


def count_out_of_range(case: Case, autocast: bool) -> list[errors.OutOfRange | None]:
    inputs = case.inputs(torch.float16)
    exact = errors.exact(inputs)
    if autocast:
        inputs = inputs.to(torch.float32)
    return [
        None if results is None else errors.out_of_range(results, exact, GRAD_SCALER)
        for results in train_all(case, inputs, GRAD_SCALER, autocast)
    ]


def train_all(
    case: Case, inputs: Inputs, loss_scale: float, autocast: bool = False
) -> Iterator[errors.Results | None]:
    """The results of each implementation."""
    print(f"{case.name}, {inputs.hidden.dtype}", file=sys.stderr)
    for name in IMPLEMENTATIONS:
        chunks = 1 if name == "torch.compile" else case.chunks
        function = implementation(name, case.sizes, chunks, inputs.hidden.dtype, autocast)
        yield train(function, inputs, loss_scale)


@functools.cache
def implementation(
    name: str, sizes: Sizes, chunks: int, dtype: torch.dtype, autocast: bool
) -> Loss:
    """One for all cases that can share what it compiles."""
    return IMPLEMENTATIONS[name](sizes[0] // chunks, chunks, autocast)


if __name__ == "__main__":
    main()
