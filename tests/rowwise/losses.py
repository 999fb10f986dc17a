"""Losses that no fused form serves, as users write them. Each takes hidden states ``[B, T, H]``,
a weight ``[V, H]``, targets ``[B, T]``, and those of a teacher: hidden states, a weight, logits."""

import torch
import torch.nn.functional as F


def given_teacher(h, w, y, h2, w2, z):
    log_p, p = F.log_softmax(F.linear(h, w) / 2, -1), F.softmax(z / 2, -1)
    return 4 * F.kl_div(log_p, p, reduction="batchmean")


def teacher_without_gradient(h, w, y, h2, w2, z):
    with torch.no_grad():
        p = F.linear(h2, w2).softmax(-1)
    return (p * (p.log() - F.linear(h, w).log_softmax(-1))).sum(-1).mean()


def jensen_shannon(h, w, y, h2, w2, z):
    a, b = F.linear(h, w).log_softmax(-1), F.linear(h2, w2).log_softmax(-1)
    mean = torch.logaddexp(a, b) - 0.6931471805599453
    halves = [F.kl_div(mean, x, log_target=True, reduction="batchmean") for x in (a, b)]
    return sum(halves) / 2


def topk_distillation(h, w, y, h2, w2, z):
    values, words = z.topk(4, -1)
    chosen = F.linear(h, w).log_softmax(-1).gather(-1, words)
    return -(values.softmax(-1) * chosen).sum(-1).mean()


def focal(h, w, y, h2, w2, z):
    p = F.linear(h, w).softmax(-1).gather(-1, y[..., None]).squeeze(-1)
    return (-((1 - p) ** 2) * p.log()).mean()


def confident(h, w, y, h2, w2, z):
    """Weighted by its own detached probability."""
    logits = F.linear(h, w)
    loss = F.cross_entropy(logits.transpose(1, 2), y, reduction="none")
    weights = logits.softmax(-1).gather(-1, y[..., None]).squeeze(-1).detach()
    return (loss * weights).mean() + logits.std(-1).mean()


def entropy_bonus(h, w, y, h2, w2, z):
    logits = F.linear(h, w)
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten()) - 0.01 * entropy.mean()


def of_masked_rows(h, w, y, h2, w2, z):
    logits = F.linear(h, w)
    loss = F.cross_entropy(logits.transpose(1, 2), y, reduction="none")
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    mask = (y > 20).float()
    return ((loss - 0.1 * entropy) * mask).sum() / mask.sum()


def shifted(h, w, y, h2, w2, z):
    logits = F.linear(h, w)[:, :-1].contiguous()
    loss = F.cross_entropy(logits.view(-1, logits.size(-1)), y[:, 1:].reshape(-1))
    return loss + 0.1 * logits.std(-1).mean()


def ignored_rows(h, w, y, h2, w2, z):
    logits = F.linear(h, w).flatten(0, 1)
    y = torch.where(y > 60, -100, y).flatten()
    return F.cross_entropy(logits, y, label_smoothing=0.1) + logits.std(-1).mean()


def smoothed_by_hand(h, w, y, h2, w2, z):
    log_p = F.linear(h, w).log_softmax(-1)
    wanted = torch.full_like(log_p, 0.1 / (log_p.size(-1) - 1)).scatter_(-1, y[..., None], 0.9)
    return -(wanted * log_p).sum(-1).mean()


def masked_vocabulary(h, w, y, h2, w2, z):
    logits = F.linear(h, w)
    mask = torch.zeros(logits.size(-1), dtype=torch.bool)
    mask[90:] = True
    logits = logits.masked_fill(mask, -1e4)
    return (
        F.cross_entropy(logits.flatten(0, 1), y.flatten() % 90) + logits.softmax(-1).std(-1).mean()
    )


def written_in_place(h, w, y, h2, w2, z):
    logits = F.linear(h, w)
    logits[..., 100:] = -5.0
    logits.div_(2.0)
    logits[y > 100] = 0.0
    return logits.clamp(-3, 3).square().mean() + logits.std(-1).sum()


def soft_targets(h, w, y, h2, w2, z):
    return F.cross_entropy(F.linear(h, w).flatten(0, 1), z.softmax(-1).flatten(0, 1))


def brier(h, w, y, h2, w2, z):
    hot = F.one_hot(y, w.size(0)).to(h.dtype)
    return (F.linear(h, w).softmax(-1) - hot).square().sum(-1).mean()


def several_labels(h, w, y, h2, w2, z):
    return F.binary_cross_entropy_with_logits(F.linear(h, w), (z > 0).to(h.dtype))


def squared_ratio(h, w, y, h2, w2, z):
    """Each row has an upstream gradient that depends on its result."""
    logits = F.linear(h, w)
    spread = logits.std(-1)
    return (spread / spread.detach().mean()).square().mean() * logits.amax(-1).exp().mean()


def sum_of_heads(h, w, y, h2, w2, z):
    """As LoRA on the head, unmerged."""
    logits = h @ w.t() + 0.5 * F.linear(h2, w2)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def nucleus(h, w, y, h2, w2, z):
    p = F.linear(h, w).softmax(-1).sort(-1, descending=True).values
    return (p * (p.cumsum(-1) < 0.9)).sum(-1).square().mean()


LOSSES = (
    *(given_teacher, teacher_without_gradient, jensen_shannon, topk_distillation, focal),
    *(confident, entropy_bonus, of_masked_rows, shifted, ignored_rows, smoothed_by_hand),
    *(masked_vocabulary, written_in_place, soft_targets, brier, several_labels, squared_ratio),
    *(sum_of_heads, nucleus),
)
