"""Distil a larger GPT into a smaller one: a KL divergence beside the cross entropy.

    python examples/distillation.py

The logits of student and teacher are never held: what reads them is run in chunks of rows, and the
log says so.
"""

import logging

import torch
import torch.nn.functional as F
from gpt import GPT
from torch import Tensor, nn

import lmhead_pass  # noqa: F401  (the import is all it takes)

VOCAB, CONTEXT, BATCH = 8192, 128, 4
TEMPERATURE, SHARE = 2.0, 0.5

logging.basicConfig(format="%(name)s: %(message)s")
logging.getLogger("lmhead_pass").setLevel(logging.INFO)


@torch.compile
def distil(student: nn.Module, teacher: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """The loss, a scalar, of `tokens` and `targets`, both [B, T]."""
    with torch.no_grad():
        wanted = teacher(tokens).flatten(0, 1)  # [B T, VOCAB]
    logits = student(tokens).flatten(0, 1)
    imitation = F.kl_div(
        (logits / TEMPERATURE).log_softmax(-1),
        (wanted / TEMPERATURE).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    loss = F.cross_entropy(logits, targets.flatten())
    return SHARE * TEMPERATURE**2 * imitation + (1 - SHARE) * loss


torch.manual_seed(0)
student = GPT(VOCAB, CONTEXT, dim=64, depth=1)
teacher = GPT(VOCAB, CONTEXT, dim=128, depth=2).requires_grad_(False)
optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
batch = torch.randint(VOCAB, (BATCH, CONTEXT + 1))

for step in range(5):
    loss = distil(student, teacher, batch[:, :-1], batch[:, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")
