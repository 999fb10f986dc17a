"""What the pass takes where it saves nothing, on a CPU.

    python benchmarks/overheads.py

step        milliseconds of a training step with a loss outside of the compiled model, beyond what
            the same step takes with the loss inside: with the pass and without, at sizes so small
            that nothing else counts. The op runs in both, so that the difference of these two is
            what lazy logits take.
watching    the two readings of the weight that show whether it has changed, as a share of a step of
            2048 tokens x 512 hidden x 32000 words in FP32
generation  time for a token of a model with a static cache, under no_grad: the ratio to the same
            without the pass

Medians over rounds in which each runs once (``timing.py``).
"""

import argparse
import contextlib
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report
import torch
import torch.nn.functional as F
from heads import Inputs, compiled_head, make_inputs
from timing import Step, alternate, ratio, seconds
from torch import Tensor, nn

import lmhead_pass

TINY, LARGE = (16, 16, 512), (2048, 512, 32000)
TOKENS = 32


def loss_inside(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = F.linear(torch.tanh(hidden), weight)
    return F.cross_entropy(logits[:-1], target[1:])


def logits_alone(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.linear(torch.tanh(hidden), weight)


def with_the_pass(is_ours: bool) -> contextlib.AbstractContextManager[None]:
    """A block in which a first call is compiled with the pass, or without it."""
    return contextlib.nullcontext() if is_ours else lmhead_pass.disabled()


def make_training_step(inputs: Inputs, is_ours: bool, is_inside: bool) -> Step:
    model = compiled_head(loss_inside if is_inside else logits_alone)

    def run() -> None:
        result = model(*inputs)
        loss = result if is_inside else F.cross_entropy(result[:-1], inputs.target[1:])
        loss.backward()
        inputs.hidden.grad = inputs.weight.grad = None

    with with_the_pass(is_ours):
        run()
    return run


def step(rounds: int) -> float:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    inputs = make_inputs(*TINY, torch.float32)
    with lmhead_pass.config.patch(min_vocab_size=1):
        steps = {
            (is_ours, is_inside): make_training_step(inputs, is_ours, is_inside)
            for is_ours in (True, False)
            for is_inside in (True, False)
        }
        times = {
            key: 1e3 * statistics.median(of)
            for key, of in alternate(steps, 50 * rounds, seconds).items()
        }
    torch.set_num_threads(threads)
    outside = {is_ours: times[is_ours, False] - times[is_ours, True] for is_ours in (True, False)}
    print(
        f"step        {outside[True]:.2f} ms outside beyond inside with the pass, "
        f"{outside[False]:.2f} ms without: lazy logits take {outside[True] - outside[False]:.2f} ms"
    )
    return outside[True] - outside[False]


def watching(rounds: int) -> float:
    inputs = make_inputs(*LARGE, torch.float32)
    watched = [inputs.weight.detach()]
    steps: dict[str, Step] = {
        "watch": lambda: torch.ops.lmhead_pass.fingerprint(watched),
        "step": make_training_step(inputs, is_ours=True, is_inside=False),
    }
    steps["watch"]()
    share = 2 * ratio(alternate(steps, rounds, seconds), "watch", "step")
    print(f"watching    {100 * share:.2f} % of a step")
    return share


def make_generation(model: nn.Module, cache: Callable[[], Any], is_ours: bool) -> Step:
    def decode(token: Tensor, position: Tensor, past: Any) -> Tensor:
        logits = model(token, cache_position=position, past_key_values=past).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    compiled, past = compiled_head(decode), cache()

    @torch.no_grad()
    def run() -> None:
        past.reset()
        token = torch.ones(1, 1, dtype=torch.int64)
        for position in range(TOKENS):
            token = compiled(token, torch.tensor([position]), past)

    with with_the_pass(is_ours):
        run()
    return run


def generation(rounds: int) -> float:
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    config = LlamaConfig(
        vocab_size=32000, hidden_size=512, intermediate_size=1408, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=TOKENS,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()

    def cache() -> Any:
        return StaticCache(config=config, max_cache_len=TOKENS)

    steps = {
        "lmhead_pass": make_generation(model, cache, is_ours=True),
        "compile": make_generation(model, cache, is_ours=False),
    }
    times = alternate(steps, 3 * rounds, seconds)
    each = 1e3 * statistics.median(times["compile"]) / TOKENS
    share = ratio(times, "lmhead_pass", "compile")
    print(f"generation  {share:.3f} of {each:.1f} ms for a token")
    return share


PARTS = {"step": step, "watching": watching, "generation": generation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    print(*report.about().values(), sep="; ")
    found = [{"part": part, "value": PARTS[part](options.rounds)} for part in options.parts]
    if options.json:
        report.write(options.json, found)


if __name__ == "__main__":
    main()
