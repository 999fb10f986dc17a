"""One training run, reported as lines of JSON on stdout.  demo.py starts two of them."""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from gpt import GPT
from stdlib_text import VOCAB
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

BATCH, CONTEXT = 16, 256  # 4,096 tokens a step: their logits are 256 MiB


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokens", type=Path, help="the text: a flat file of int32")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--lmhead-pass", action="store_true", help="import lmhead_pass first")
    args = parser.parse_args()

    if args.lmhead_pass:
        import lmhead_pass  # noqa: F401  (the import is all it takes)

    # Embedding gradients are otherwise summed in whatever order the threads come along.
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    model = GPT(VOCAB, CONTEXT)
    model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.95), fused=True)
    text = torch.from_file(
        str(args.tokens), size=args.tokens.stat().st_size // 4, dtype=torch.int32
    )
    dice = torch.Generator().manual_seed(args.seed)  # its own, so that nothing else turns it

    def step() -> tuple[float, float]:
        """Train on one batch; return the loss and the norm of its gradient."""
        starts = torch.randint(len(text) - CONTEXT, (BATCH, 1), generator=dice)
        window = text[starts + torch.arange(CONTEXT + 1)].long()  # [BATCH, CONTEXT + 1]
        loss = model(window[:, :-1], window[:, 1:])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), norm.item()

    for _ in range(args.steps):
        start = time.perf_counter()
        loss, norm = step()
        seconds = time.perf_counter() - start
        print(json.dumps({"loss": loss, "norm": norm, "seconds": seconds}), flush=True)

    moments = [entry for state in optimizer.state.values() for entry in state.values()]
    lasting = sum(tensor.nbytes for tensor in [*model.parameters(), *moments])
    summary = {
        "rewritten": counters["lmhead_pass"]["rewritten"],
        "peak_bytes": lasting + peak_bytes(step),
    }
    print(json.dumps(summary), flush=True)


if __name__ == "__main__":
    main()
