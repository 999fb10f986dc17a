"""Time and memory of losses that no fused form serves, against the same compiled without the pass.

python benchmarks/row_wise.py [--rounds 5] [--tokens 4096] [NAME ...]
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import lmhead_pass
from benchmarks.memory import peak_bytes
from benchmarks.timing import alternate, ratio

HIDDEN, VOCAB = 512, 32000


def kl_given_teacher(h: Tensor, w: Tensor, y: Tensor, h2: Tensor, w2: Tensor, z: Tensor) -> Tensor:
    student, teacher = F.log_softmax(h @ w.t() / 2, -1), F.softmax(z / 2, -1)
    return 4 * F.kl_div(student, teacher, reduction="batchmean")


def kl_two_heads(h: Tensor, w: Tensor, y: Tensor, h2: Tensor, w2: Tensor, z: Tensor) -> Tensor:
    student, teacher = (h @ w.t()).log_softmax(-1), (h2 @ w2.t()).log_softmax(-1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def focal(h: Tensor, w: Tensor, y: Tensor, h2: Tensor, w2: Tensor, z: Tensor) -> Tensor:
    p = (h @ w.t()).softmax(-1).gather(-1, y[:, None]).squeeze(-1)
    return (-((1 - p) ** 2) * p.log()).mean()


def dft(h: Tensor, w: Tensor, y: Tensor, h2: Tensor, w2: Tensor, z: Tensor) -> Tensor:
    loss = F.cross_entropy(h @ w.t(), y, reduction="none")
    return (loss * (-loss).exp().detach()).mean()


def dft_and_std(h: Tensor, w: Tensor, y: Tensor, h2: Tensor, w2: Tensor, z: Tensor) -> Tensor:
    logits = h @ w.t()
    loss = F.cross_entropy(logits, y, reduction="none")
    return (loss * (-loss).exp().detach()).mean() + 0.1 * logits.std(-1).mean()


def entropy_bonus(h: Tensor, w: Tensor, y: Tensor, h2: Tensor, w2: Tensor, z: Tensor) -> Tensor:
    logits = h @ w.t()
    log_p = logits.log_softmax(-1)
    return F.cross_entropy(logits, y) + 0.01 * (log_p.exp() * log_p).sum(-1).mean()


def jensen_shannon(h: Tensor, w: Tensor, y: Tensor, h2: Tensor, w2: Tensor, z: Tensor) -> Tensor:
    a, b = (h @ w.t()).log_softmax(-1), (h2 @ w2.t()).log_softmax(-1)
    mean = torch.logaddexp(a, b) - 0.6931471805599453
    halves = [F.kl_div(mean, x, log_target=True, reduction="batchmean") for x in (a, b)]
    return (halves[0] + halves[1]) / 2


LOSSES = (kl_given_teacher, kl_two_heads, focal, dft, dft_and_std, entropy_bonus, jensen_shannon)


def compare(loss: Callable[..., Tensor], tokens: int, rounds: int) -> str:
    """One line on a step of ``loss``, with and without the pass."""
    torch.manual_seed(0)
    h, w, h2, w2 = (0.05 * torch.randn(n, HIDDEN) for n in (tokens, VOCAB, tokens, VOCAB))
    y, z = torch.randint(VOCAB, (tokens,)), torch.zeros(1)
    if loss is kl_given_teacher:
        z = torch.randn(tokens, VOCAB)
    trained = (h, w, h2, w2) if loss in (kl_two_heads, jensen_shannon) else (h, w)
    for tensor in trained:
        tensor.requires_grad_()

    def step(function: Callable[..., Tensor]) -> Callable[[], None]:
        def run() -> None:
            for tensor in trained:
                tensor.grad = None
            function(h, w, y, h2, w2, z).backward()

        return run

    fused = step(torch.compile(lambda *batch: loss(*batch)))
    unfused = step(torch.compile(lambda *batch: loss(*batch)))
    fused()
    with lmhead_pass.disabled():
        unfused()
    times = alternate({"fused": fused, "unfused": unfused}, rounds, _seconds)
    of_gradients, whole = 4 * sum(t.numel() for t in trained), 4 * tokens * VOCAB
    shares = []
    for run in (fused, unfused):
        for tensor in trained:
            tensor.grad = None
        shares.append((peak_bytes(run) - of_gradients) / whole)
    return (
        f"{loss.__name__:17} time {ratio(times, 'fused', 'unfused'):.2f} of unfused; beyond "
        f"gradients {shares[0]:.0%} of one FP32 tensor of logits, unfused {shares[1]:.0%}"
    )


def _seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[loss.__name__ for loss in LOSSES])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for loss in LOSSES:
        if loss.__name__ in options.names:
            print(compare(loss, options.tokens, options.rounds), flush=True)
