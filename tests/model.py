"""A language model of one layer."""

import torch
from torch import nn

from .forms import V, flat


class Model(nn.Module):
    """Embedding, one layer, head, loss: returns the loss alone."""

    def __init__(self, tied=False, bias=False, frozen=False):
        super().__init__()
        self.embedding = nn.Embedding(V, 16)
        self.layer = nn.Linear(16, 16)
        self.head = nn.Linear(16, V, bias=bias)
        if tied:
            self.head.weight = self.embedding.weight
        if frozen:
            self.head.requires_grad_(False)

    def forward(self, tokens, reduction="mean", autocast=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = torch.tanh(self.layer(self.embedding(tokens)))
            logits = self.head(hidden).float()
            loss = flat(logits[:, :-1], tokens[:, 1:], reduction=reduction)
        return loss
