"""The bytes of tensors alive during a training step of the demo's GPT, with and without the pass.

    python benchmarks/step_memory.py    # some 3 minutes; writes results/step_memory.json

Counted by the profiler, in the third step: forward, backward and optimizer. Weights and the
optimizer's state, which live always, are left out.
"""

import argparse
import contextlib
import sys
from pathlib import Path

import report
import torch
from memory import timeline

import lmhead_pass

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from gpt import GPT

BATCH, CONTEXT, VOCAB = 16, 256, 16_384  # those of examples/train_gpt.py


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--out", type=Path, default=report.FOLDER / "step_memory.json")
    options = parser.parse_args()
    rows = []
    for name, context in (
        ("compile", lmhead_pass.disabled()),
        ("lmhead_pass", contextlib.nullcontext()),
    ):
        torch._dynamo.reset()
        with context:
            points = measure(options.batch)
        length = points[-1][0]
        rows += [
            {"impl": name, "share_of_step": round(second / length, 4), "bytes": live}
            for second, live in thinned(points)
        ]
        print(f"{name}: at most {max(live for _, live in points) / 1e6:.1f} MB")
    report.write(options.out, rows, batch=options.batch, context=CONTEXT, vocab=VOCAB)


def measure(batch: int) -> list[tuple[float, int]]:
    torch.manual_seed(0)
    model = torch.compile(GPT(VOCAB, CONTEXT))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(VOCAB, (batch, CONTEXT + 1))

    def step() -> None:
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    return timeline(step)


def thinned(points: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """The points that a picture needs: the highest, the last, and those where the bytes have moved
    by half a percent of the highest."""
    highest = max(points, key=lambda point: point[1])
    kept = points[:1]
    for point in points[1:]:
        moved = abs(point[1] - kept[-1][1])
        if moved > highest[1] / 200 or point in (highest, points[-1]):
            kept.append(point)
    return kept


if __name__ == "__main__":
    main()
