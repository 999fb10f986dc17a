"""Time, memory and error of a language model's head and loss on a GPU, beside its peers.

    python benchmarks/gpu.py                                # four shapes in BF16
    python benchmarks/gpu.py --device cpu --sizes 64x32x5000 --rounds 1    # does it run at all

All implementations of a shape and mode run in turn, forwards and then backwards (A B B A), in one
process, on the same inputs, since the clocks of a GPU move; the first round is dropped. The floor
is the bare products that the mode needs. The device is kept busy while the host prepares a step, so
that times are the device's. Peak bytes are those beyond the inputs: gradients are in them. The
error is the largest of the gradients of a sample of tokens and words, relative to the largest exact
one; exact is FP64, but for the log-sum-exp of each token, which is taken from FP32 logits (an error
near 1e-6; BF16 gradients have one near 1e-3).

Modes: "train" is forward and backward, "forward" is without gradients, "frozen" is forward and
backward for the hidden states alone, "by_row" is forward and backward of losses with reduction
"none", and "returned" is "train" of a function that returns its logits too, unread. Each shape and
mode has ``--seconds``: once these are over, no implementation is begun, and no round. What an
implementation cannot run is a row that says so, and results are written after each shape and mode:
a run that is cut off leaves what it has.
"""

import argparse
import json
import os
import statistics
import sys
import time
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

# Before torch is imported: memory that is cut in pieces would look like memory that is needed.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import heads
import memory
import torch
import torch._inductor.config
import torch.nn.functional as F
from heads import Inputs, LossFunction, Step, compiled_head, head, rewritten
from torch import Tensor

import lmhead_pass

SIZES = ["4096x4096x128256", "16384x4096x128256", "8192x2304x256000", "32768x8192x128000"]
MODES = ["train", "forward", "frozen", "by_row", "returned"]
DEFAULT_MODES = MODES[:3]
IMPLEMENTATIONS = [
    "floor", "lmhead_pass", "quack", "liger_sm90", "cce", "cce_exact", "liger", "torch_lce",
    "auto_chunker", "compile",
]  # fmt: skip
SAMPLE = 32
HEAD_START_CYCLES = 20_000_000  # some 10 ms, in which the host gets ahead of the device


class Skipped(Exception):
    """Why an implementation does not run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="tokens x hidden x vocabulary")
    parser.add_argument("--modes", nargs="+", default=DEFAULT_MODES, choices=MODES)
    parser.add_argument("--impls", nargs="+", default=IMPLEMENTATIONS, choices=IMPLEMENTATIONS)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--spread", type=float, default=1.0, help="standard deviation of logits")
    parser.add_argument("--seconds", type=float, default=120, help="of each shape and mode")
    parser.add_argument("--label", default="", help="what the files' names end in")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()

    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU here; --device cpu shows that it runs")
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    rows, skipped = [], []
    for sizes in options.sizes:
        inputs = make_inputs(*map(int, sizes.split("x")), dtype, device, options.spread)
        for mode in options.modes:
            measured, left_out = measure(
                inputs, mode, options.impls, options.rounds, options.seconds
            )
            rows += measured
            skipped += left_out
            report = write_report(options.out, options.label, device, rows, skipped)
        del inputs
    print(markdown(report))


def write_report(
    folder: Path, label: str, device: torch.device, rows: list[dict], skipped: list[dict]
) -> dict:
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    report = {
        "gpu": gpu,
        "torch": torch.__version__,
        "triton": triton_version(),
        "date": str(date.today()),
        "command": " ".join(["python", *sys.argv]),
        "rows": rows,
        "skipped": skipped,
    }
    folder.mkdir(parents=True, exist_ok=True)
    name = gpu.lower().removeprefix("nvidia ").replace(" ", "-")
    file = folder / f"{name}-{report['date']}{label}.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    file.with_suffix(".md").write_text(markdown(report))
    return report


def make_inputs(tokens: int, hidden: int, vocab: int, dtype, device, spread: float) -> Inputs:
    """The same numbers each time, none of them 0: zeros would let a GPU run faster."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    target = torch.randint(vocab, (tokens,), generator=generator, device=device)
    weight = random(vocab, hidden).mul_(spread * hidden**-0.5)
    return Inputs(random(tokens, hidden).requires_grad_(), weight, target)


def measure(
    inputs: Inputs, mode: str, names: list[str], rounds: int, seconds: float
) -> tuple[list[dict], list[dict]]:
    """Figures of the implementations that run, and the reasons of those that do not."""
    end = time.monotonic() + seconds
    inputs.weight.requires_grad_(mode not in ("forward", "frozen"))
    exact = None if mode == "forward" else sampled_gradients(inputs)
    about = {
        "tokens": inputs.hidden.size(0),
        "hidden": inputs.hidden.size(1),
        "vocab": inputs.weight.size(0),
        "dtype": str(inputs.hidden.dtype).removeprefix("torch."),
        "mode": mode,
    }
    steps: dict[str, Step] = {}
    figures: dict[str, dict] = {}
    skipped = []
    for name in names:
        try:
            if time.monotonic() > end:
                raise Skipped(f"the {seconds:g} seconds of this step are over")
            step = bare_products(inputs, mode) if name == "floor" else loss_step(name, inputs, mode)
            step()  # compiles
            error = None if name == "floor" or exact is None else gradient_error(exact)
            drop_gradients(inputs)
            figures[name] = {"peak_bytes": peak_bytes(step, inputs), "grad_error": error}
            steps[name] = step
        except Exception as error:  # each fails in ways of its own
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            skipped.append({**about, "impl": name, "reason": reason})
            print("skipped:", skipped[-1], file=sys.stderr)
        drop_gradients(inputs)
        if inputs.hidden.is_cuda:
            torch.cuda.empty_cache()

    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        if number > 1 and time.monotonic() > end:
            break
        for name in sorted(steps, key=names.index, reverse=number % 2 == 1):
            elapsed = milliseconds(steps[name], inputs)
            drop_gradients(inputs)
            if number:
                times[name].append(elapsed)
    rows = []
    for name in steps:
        row = {**about, "impl": name, "median_ms": statistics.median(times[name])}
        if "floor" in times:
            pairs = zip(times[name], times["floor"], strict=True)
            row["floor_ratio"] = statistics.median(ours / floor for ours, floor in pairs)
        rows.append({**row, **figures[name]})
    return rows, skipped


def bare_products(inputs: Inputs, mode: str) -> Step:
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()

    def run() -> None:
        logits = hidden @ weight.t()
        gradients = []
        if mode != "forward":
            gradients.append(logits @ weight)
        if mode not in ("forward", "frozen"):
            gradients.append(logits.t() @ hidden)

    return run


def loss_step(name: str, inputs: Inputs, mode: str) -> Step:
    if mode in ("by_row", "returned") and name not in ("lmhead_pass", "compile", "auto_chunker"):
        raise Skipped(f"not compared in mode {mode}")
    loss = loss_function(name, HEADS.get(mode, head))

    def run() -> None:
        with torch.set_grad_enabled(mode != "forward"):
            result = loss(*inputs)
        value = result[0] if mode == "returned" else result
        if mode != "forward":
            value.sum().div(value.numel()).backward()

    return run


def loss_function(name: str, head: LossFunction) -> LossFunction:
    return {
        "lmhead_pass": lambda: rewritten(head),
        "compile": lambda: unfused(head, auto_chunker=False),
        "auto_chunker": lambda: unfused(head, auto_chunker=True),
        "torch_lce": torch_lce,
        "liger": liger,
        "liger_sm90": liger_sm90,
        "quack": quack,
        "cce": lambda: cce("high"),
        "cce_exact": lambda: cce(None),
    }[name]()


def losses_by_row(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), target, reduction="none")


def loss_and_logits(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.float(), target), logits


HEADS = {"by_row": losses_by_row, "returned": loss_and_logits}


def unfused(head: LossFunction, auto_chunker: bool) -> LossFunction:
    compiled = compiled_head(head)

    def run(*inputs: Tensor) -> Tensor:
        # Settings are read where the first call compiles.
        with (
            lmhead_pass.disabled(),
            torch._inductor.config.patch({"auto_chunker.enable": auto_chunker}),
        ):
            return compiled(*inputs)

    return run


def torch_lce() -> LossFunction:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Skipped(f"torch {torch.__version__} has no chunked F.linear_cross_entropy")
    return heads.torch_lce()


def liger() -> LossFunction:
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError as error:
        raise Skipped(str(error)) from error
    # Without it the weight's gradient is summed in BF16.
    return partial(liger_fused_linear_cross_entropy, accum_dtype=torch.float32)


def liger_sm90() -> LossFunction:
    try:
        from liger_kernel.ops.cutedsl.ops import fused_linear_cross_entropy_sm90 as sm90
    except ImportError as error:
        raise Skipped(str(error)) from error
    return sm90.LigerFusedLinearCrossEntropySM90Function.apply


def quack() -> LossFunction:
    try:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy
    except ImportError as error:
        raise Skipped(str(error)) from error
    return chunked_linear_cross_entropy


def cce(filter_eps: str | None) -> LossFunction:
    """None: without leaving out small gradients."""
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise Skipped(str(error)) from error
    return partial(linear_cross_entropy, filter_eps=filter_eps)


class Sample(NamedTuple):
    """Some rows of a tensor, and the exact gradients of these rows in FP64."""

    tensor: Tensor
    rows: Tensor
    gradient: Tensor


def sampled_gradients(inputs: Inputs) -> list[Sample]:
    """Of hidden, and of weight where it has a gradient."""
    hidden, weight, target = inputs.hidden.detach(), inputs.weight.detach(), inputs.target
    wide = weight.float()
    log_sums = torch.cat([(part.float() @ wide.t()).logsumexp(1) for part in hidden.split(512)])
    del wide

    def grad_logits(tokens: Tensor, words: Tensor) -> Tensor:
        logits = hidden[tokens].double() @ weight[words].double().t()
        hits = (target[tokens].unsqueeze(1) == words).double()
        return ((logits - log_sums[tokens].double().unsqueeze(1)).exp() - hits) / target.numel()

    def some(size: int) -> Tensor:
        return torch.linspace(0, size - 1, min(SAMPLE, size), device=hidden.device).long()

    tokens = some(hidden.size(0))
    every_word = torch.arange(weight.size(0), device=hidden.device).split(8192)
    gradient = sum(grad_logits(tokens, words) @ weight[words].double() for words in every_word)
    samples = [Sample(inputs.hidden, tokens, gradient)]
    if inputs.weight.requires_grad:
        words = target[some(hidden.size(0))]  # words that occur, whose gradient is not tiny
        every_token = torch.arange(hidden.size(0), device=hidden.device)
        gradient = grad_logits(every_token, words).t() @ hidden.double()
        samples.append(Sample(inputs.weight, words, gradient))
    return samples


def gradient_error(samples: list[Sample]) -> float:
    def error(sample: Sample) -> float:
        difference = sample.tensor.grad[sample.rows] - sample.gradient
        return (difference.abs().amax() / sample.gradient.abs().amax()).item()

    return max(error(sample) for sample in samples)


def drop_gradients(inputs: Inputs) -> None:
    inputs.hidden.grad = inputs.weight.grad = None


def peak_bytes(step: Step, inputs: Inputs) -> int:
    if not inputs.hidden.is_cuda:
        return memory.peak_bytes(step)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def milliseconds(step: Step, inputs: Inputs) -> float:
    if not inputs.hidden.is_cuda:
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)
    return device_milliseconds(step)


def device_milliseconds(step: Step) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START_CYCLES)
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def markdown(report: dict) -> str:
    lines = [
        "{gpu}, torch {torch}, triton {triton}, {date}. `{command}`".format(**report),
        "",
        "| tokens x hidden x vocabulary | mode | implementation | ms | x floor | peak MB | error |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for row in report["rows"]:
        ratio = f"{row['floor_ratio']:.3f}" if "floor_ratio" in row else ""
        error = "" if row["grad_error"] is None else f"{row['grad_error']:.1e}"
        what = "{tokens} x {hidden} x {vocab} {dtype} | {mode} | {impl}".format(**row)
        figures = f"{row['median_ms']:.2f} | {ratio} | {row['peak_bytes'] / 1e6:.0f} | {error}"
        lines.append(f"| {what} | {figures} |")
    for row in report["skipped"]:
        what = "{tokens} x {hidden} x {vocab} {dtype} | {mode} | {impl}".format(**row)
        lines.append(f"| {what} | not run: {row['reason'].replace('|', '/')} | | | |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
