"""Direct preference optimisation: log-probabilities of whole answers under two models.

    python examples/dpo_logprobs.py

Each answer's log-probability is a sum of log-probabilities of single words, so that no logits are
held, for the policy or for the reference. The loss is not linear in these sums: the backward
computes the policy's logits again, in chunks (a fourth matrix product).
"""

import copy
import logging

import torch
import torch.nn.functional as F
from gpt import GPT
from torch import Tensor, nn

import lmhead_pass  # noqa: F401  (the import is all it takes)

VOCAB, CONTEXT, PAIRS, BETA = 8192, 128, 2, 0.1

logging.basicConfig(format="%(name)s: %(message)s")
logging.getLogger("lmhead_pass").setLevel(logging.INFO)


@torch.compile
def answer_logprobs(model: nn.Module, tokens: Tensor, is_answer: Tensor) -> Tensor:
    """The log-probability of each answer, [B], of `tokens` and `is_answer`, both [B, T]."""
    logprobs = model(tokens[:, :-1]).log_softmax(-1)
    words = logprobs.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return (words * is_answer[:, 1:]).sum(-1)


torch.manual_seed(0)
policy = GPT(VOCAB, CONTEXT, dim=64, depth=1)
reference = copy.deepcopy(policy).requires_grad_(False)
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
tokens = torch.randint(VOCAB, (2 * PAIRS, CONTEXT))  # the chosen answers, then the rejected
is_answer = torch.arange(CONTEXT).expand_as(tokens) >= CONTEXT // 4  # behind the prompt

with torch.no_grad():
    expected = answer_logprobs(reference, tokens, is_answer)
for step in range(5):
    gained = answer_logprobs(policy, tokens, is_answer) - expected
    chosen, rejected = gained.chunk(2)
    loss = -F.logsigmoid(BETA * (chosen - rejected)).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}, margin {(chosen - rejected).mean().item():.3f}")
