"""A few small steps on a GPU, through every kernel, for ``compute-sanitizer``.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python benchmarks/gpu_steps.py
"""

import sys

import torch

import lmhead_pass  # noqa: F401  registers the op

DEVICE = "cuda"
TOKENS, HIDDEN, VOCAB, ROWS = 300, 72, 5003, 128  # of which nothing divides another


def step(dtype: torch.dtype, reduction: str, softcap: float | None, measures: list[str]) -> float:
    hidden = torch.randn(TOKENS, HIDDEN, device=DEVICE, dtype=dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, device=DEVICE, dtype=dtype).mul_(0.2).requires_grad_()
    target = torch.randint(VOCAB, (TOKENS,), device=DEVICE)
    target[::7] = -100
    loss, *_ = torch.ops.lmhead_pass.linear_cross_entropy_and_measures(
        *(hidden, weight, None, target, *[None] * 5, reduction, -100, 0.0, 0.5, softcap, "tanh"),
        *(dtype, ROWS, measures),
    )
    loss.sum().backward()
    return loss.sum().item()


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("there is no GPU here")
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for reduction in ("mean", "none"):
            for softcap, measures in ((None, []), (30.0, []), (None, ["argmax", "entropy"])):
                print(
                    dtype, reduction, softcap, measures, step(dtype, reduction, softcap, measures)
                )
