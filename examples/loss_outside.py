"""Compile a model that returns its logits, and take the loss outside of torch.compile.

    python examples/loss_outside.py

The logits are not computed. The loss that is taken of them is computed by the op, in chunks; so are
their argmax and the log-probability of a word. What else reads them computes them all.
"""

import logging

import torch
import torch.nn.functional as F
from gpt import GPT

import lmhead_pass  # noqa: F401  (the import is all it takes)

VOCAB, CONTEXT, BATCH = 8192, 128, 4

logging.basicConfig(format="%(name)s: %(message)s")
logging.getLogger("lmhead_pass").setLevel(logging.INFO)

torch.manual_seed(0)
model = torch.compile(GPT(VOCAB, CONTEXT, dim=64, depth=1))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
batch = torch.randint(VOCAB, (BATCH, CONTEXT + 1))
tokens, targets = batch[:, :-1], batch[:, 1:]

for step in range(5):
    logits = model(tokens)  # [BATCH, CONTEXT, VOCAB], not computed
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    right = (logits.argmax(-1) == targets).float().mean()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}, accuracy {right.item():.3f}")
