"""Losses taken of the logits that a compiled model returns, with the pass and without, on a CPU.

    python benchmarks/outside.py                   # 4096 tokens x 512 hidden x 32000 words: memory
    python benchmarks/outside.py --tokens 2048 --rounds 5 --losses shifted    # and time

The model is a head alone, compiled; the loss is taken in plain Python. Memory is what a step takes
beyond its gradients, as a share of the logits' bytes; time is the ratio to the same without the
pass, the median over rounds in which each runs once (``timing.py``).
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import report
import torch
import torch.nn.functional as F
from heads import Inputs, Step, compiled_head, make_inputs
from memory import peak_bytes
from timing import alternate, ratio, seconds
from torch import Tensor

import lmhead_pass

Loss = Callable[[Callable[..., Tensor], Inputs], Tensor]


def logits_alone(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.linear(hidden, weight)


def with_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.float(), target), logits


def shifted(model: Callable[..., Tensor], inputs: Inputs) -> Tensor:
    return F.cross_entropy(model(*inputs)[:-1].float(), inputs.target[1:])


def gathered(model: Callable[..., Tensor], inputs: Inputs) -> Tensor:
    log_probabilities = model(*inputs).log_softmax(-1)
    return -log_probabilities.gather(-1, inputs.target[:, None]).mean()


def second(model: Callable[..., Tensor], inputs: Inputs) -> Tensor:
    loss, logits = model(*inputs)
    weight = torch.linspace(0.5, 1.5, logits.size(-1))
    return loss + F.cross_entropy(logits, inputs.target, weight=weight)


def pieces(model: Callable[..., Tensor], inputs: Inputs, reduction: str = "mean") -> Tensor:
    parts = zip(model(*inputs).chunk(16), inputs.target.chunk(16), strict=True)
    losses = [F.cross_entropy(part, of_part, reduction=reduction) for part, of_part in parts]
    return torch.stack(losses).sum()


def policy(model: Callable[..., Tensor], inputs: Inputs) -> Tensor:
    """A ratio of probabilities and an entropy, as in GRPO."""
    log_probabilities = model(*inputs).log_softmax(-1)
    ours = log_probabilities.gather(-1, inputs.target[:, None])
    entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
    return -((ours - ours.detach()).exp()).mean() - 0.01 * entropy.mean()


def distilled(model: Callable[..., Tensor], inputs: Inputs) -> Tensor:
    """The head is its own teacher: with half the hidden states, and under no_grad."""
    logits = model(*inputs)
    with torch.no_grad():
        teacher = model(inputs.hidden / 2, *inputs[1:])
    student, wanted = (logits / 2).log_softmax(-1), (teacher / 2).log_softmax(-1)
    return F.kl_div(student, wanted, reduction="batchmean", log_target=True)


LOSSES: dict[str, tuple[Callable, Loss]] = {
    "shifted": (logits_alone, shifted),
    "gathered": (logits_alone, gathered),
    "second": (with_loss, second),
    "policy": (logits_alone, policy),
    "distilled": (logits_alone, distilled),
    **{
        f"16 pieces, {reduction}": (
            logits_alone,
            lambda model, inputs, reduction=reduction: pieces(model, inputs, reduction),
        )
        for reduction in ("mean", "sum", "none")
    },
}


def make_step(name: str, inputs: Inputs, is_ours: bool) -> Step:
    model, loss = LOSSES[name]
    compiled = compiled_head(model)

    def run() -> None:
        loss(compiled, inputs).backward()
        inputs.hidden.grad = inputs.weight.grad = None

    if is_ours:
        run()
    else:
        with lmhead_pass.disabled():  # which counts where the first call compiles
            run()
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=0, help="0 measures no time")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    inputs = make_inputs(options.tokens, options.hidden, options.vocab, torch.float32)
    gradients = inputs.hidden.nbytes + inputs.weight.nbytes
    logits = 4 * options.tokens * options.vocab
    print(f"{options.tokens} tokens x {options.hidden} hidden x {options.vocab} words, float32")
    print(*report.about().values(), sep="; ")
    rows = []
    for name in options.losses:
        steps = {
            "lmhead_pass": make_step(name, inputs, is_ours=True),
            "compile": make_step(name, inputs, is_ours=False),
        }
        peaks = {key: (peak_bytes(step) - gradients) / logits for key, step in steps.items()}
        row = {"loss": name, "memory": peaks["lmhead_pass"], "without": peaks["compile"]}
        line = f"{name:18} memory {row['memory']:.3f}, without {row['without']:.3f}"
        if options.rounds:
            times = alternate(steps, options.rounds, seconds)
            row["time"] = ratio(times, "lmhead_pass", "compile")
            line += f"; time {row['time']:.2f}"
        print(line, flush=True)
        rows.append(row)
    if options.json:
        sizes = {"tokens": options.tokens, "hidden": options.hidden, "vocab": options.vocab}
        report.write(options.json, rows, **sizes)


if __name__ == "__main__":
    main()
