"""What forms of sums are made of: losses of each token, and masks."""

import torch
import torch.nn.functional as F

from .. import forms


def nll_by_hand(z, y):
    return z.logsumexp(-1) - z.gather(-1, y.unsqueeze(-1)).squeeze(-1)


def in_one_row(z, y):
    return forms.flat(z, y, reduction="none")


def per_token(z, y):
    return in_one_row(z, y).view(y.shape)


def kept(y, dtype=torch.float32):
    return (y > 20).to(dtype)


def metrics(losses, y):
    """Of losses that go into a sum, too."""
    return losses.detach().max(), losses.mean().detach(), (losses.detach() * kept(y)).sum(-1)


def losses_of_rows(z, y, reduction="none"):
    pairs = zip(z, y, strict=True)
    return [F.cross_entropy(row, target, reduction=reduction) for row, target in pairs]
