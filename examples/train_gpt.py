"""Train a small GPT on the source of Python's standard library.

    python examples/train_gpt.py            # with lmhead_pass
    python examples/train_gpt.py --plain    # without

demo.py starts both and compares them.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from gpt import GPT
from stdlib_text import VOCAB, write_tokens
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

CONTEXT = 256


def peak_bytes(step: Callable[[], object]) -> int:
    """The most bytes of tensors alive at one moment of `step`, beyond those it started with."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":  # an allocation, or a release as a negative number
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def read_tokens(path: Path | None) -> torch.Tensor:
    """All tokens of the text, [N] of int32: those in `path`, or made of the standard library."""
    with tempfile.TemporaryDirectory() as folder:
        if path is None:
            path = Path(folder, "tokens")
            write_tokens(path)
        size = path.stat().st_size // 4
        return torch.from_file(str(path), size=size, dtype=torch.int32).clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plain", action="store_true", help="do not import lmhead_pass")
    parser.add_argument("--steps", type=int, default=32, help="default: 32")
    parser.add_argument("--batch", type=int, default=16, help="windows of 256 tokens in a step")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--tokens", type=Path, help="a flat file of int32, instead of the library")
    parser.add_argument("--json", action="store_true", help="report in lines of JSON")
    args = parser.parse_args()

    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("lmhead_pass").setLevel(logging.INFO)
    if not args.plain:
        import lmhead_pass  # noqa: F401  (the import is all it takes)

    # Embedding gradients are otherwise summed in whatever order the threads come along.
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    model = GPT(VOCAB, CONTEXT)
    model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.95), fused=True)
    text = read_tokens(args.tokens)
    dice = torch.Generator().manual_seed(args.seed)  # its own, so that nothing else turns it

    def step() -> tuple[float, float]:
        """Train on one batch; return the loss and the norm of its gradient."""
        starts = torch.randint(len(text) - CONTEXT, (args.batch, 1), generator=dice)
        window = text[starts + torch.arange(CONTEXT + 1)].long()  # [batch, CONTEXT + 1]
        loss = model(window[:, :-1], window[:, 1:])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), norm.item()

    def report(**figures: float) -> None:
        line = "  ".join(f"{name} {figure:.6g}" for name, figure in figures.items())
        print(json.dumps(figures) if args.json else line, flush=True)

    for _ in range(args.steps):
        start = time.perf_counter()
        loss, norm = step()
        report(loss=loss, norm=norm, seconds=time.perf_counter() - start)

    moments = [entry for state in optimizer.state.values() for entry in state.values()]
    lasting = sum(tensor.nbytes for tensor in [*model.parameters(), *moments])
    rewritten = counters["lmhead_pass"]["rewritten"]
    report(rewritten=rewritten, peak_bytes=lasting + peak_bytes(step))
    if not args.plain and not rewritten:
        sys.exit("lmhead_pass rewrote nothing.")


if __name__ == "__main__":
    main()
