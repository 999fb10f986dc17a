"""What README calls train.py: the reader's own script."""

import torch
import torch.nn.functional as F

import lmhead_pass  # noqa: F401


@torch.compile
def step(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(hidden @ weight.t(), target)


weight = torch.randn(5000, 16, requires_grad=True)
step(torch.randn(512, 16), weight, torch.arange(512)).backward()
