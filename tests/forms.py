"""Ways to write a head and its loss: what must be rewritten, and what must not.

Each is a function of hidden ``[B, S, H]``, weight ``[V, H]``, bias ``[V]`` and target ``[B, S]``.
"""

import operator

import torch
import torch.nn as nn
import torch.nn.functional as F

V = 97


def inputs(dtype=torch.float32, batch=3, length=7, hidden=16):
    """Leaves hidden, weight, bias, and a target."""
    shapes = ((batch, length, hidden), (V, hidden), (V,))
    leaves = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    return *leaves, torch.randint(V, (batch, length))


def flat(logits, target, loss=F.cross_entropy, **options):
    return loss(logits.reshape(-1, logits.size(-1)), target.reshape(-1), **options)


HEADS = {
    "linear": lambda h, w, b, y: flat(F.linear(h, w), y),
    "linear_bias": lambda h, w, b, y: flat(F.linear(h, w, b), y),
    "linear_keywords": lambda h, w, b, y: flat(F.linear(input=h, weight=w, bias=b), y),
    "matmul_t": lambda h, w, b, y: flat(h @ w.t(), y),
    "matmul_T": lambda h, w, b, y: flat(torch.matmul(h, w.T), y),
    "matmul_mT": lambda h, w, b, y: flat(h.matmul(w.mT), y),
    "matmul_transpose": lambda h, w, b, y: flat(torch.matmul(h, w.transpose(0, 1)), y),
    "matmul_permute": lambda h, w, b, y: flat(torch.matmul(h, w.permute(1, 0)), y),
    "mm": lambda h, w, b, y: F.cross_entropy(torch.mm(h.view(-1, h.size(-1)), w.t()), y.view(-1)),
    "mm_method": lambda h, w, b, y: F.cross_entropy(h.flatten(0, 1).mm(w.t()), y.flatten()),
    "addmm": lambda h, w, b, y: F.cross_entropy(
        torch.addmm(b, h.flatten(0, 1), w.t()), y.flatten()
    ),
    "addmm_method": lambda h, w, b, y: F.cross_entropy(b.addmm(h.flatten(0, 1), w.T), y.flatten()),
    "einsum": lambda h, w, b, y: flat(torch.einsum("bsh,vh->bsv", h, w), y),
    "einsum_dots": lambda h, w, b, y: flat(torch.einsum("... d, v d -> ... v", h, w), y),
    "einsum_swapped": lambda h, w, b, y: flat(torch.einsum("vh,bsh->bsv", w, h), y),
    "einsum_transposed": lambda h, w, b, y: flat(torch.einsum("bsh,hv->bsv", h, w.t()), y),
    "einsum_classes_second": lambda h, w, b, y: F.cross_entropy(
        torch.einsum("bsh,vh->bvs", h, w), y
    ),
    "inner": lambda h, w, b, y: flat(torch.inner(h, w), y),
    "conv1d": lambda h, w, b, y: F.cross_entropy(F.conv1d(h.mT, w.unsqueeze(-1), b), y),
    "bias_added": lambda h, w, b, y: flat(F.linear(h, w) + b, y),
    "bias_added_first": lambda h, w, b, y: flat(b + h @ w.t(), y),
    "bias_added_in_rows": lambda h, w, b, y: flat(F.linear(h, w).add(b[None, None]), y),
    "bias_added_in_place": lambda h, w, b, y: flat(F.linear(h, w).add_(b), y),
    "bias_twice": lambda h, w, b, y: flat(F.linear(h, w, b) - b.detach().flip(0), y),
    "bias_of_classes_second": lambda h, w, b, y: F.cross_entropy((h @ w.t()).mT + b[:, None], y),
    "bias_scaled": lambda h, w, b, y: flat(F.linear(h, w, b) * 0.3 + b, y),
    "weight_cut": lambda h, w, b, y: flat(F.linear(h, w[:90], b[:90]), y % 90),
    "weight_cast": lambda h, w, b, y: flat(F.linear(h, w.type_as(h)), y),
}

CHAINS = {
    "view": lambda z, y: F.cross_entropy(z.view(-1, V), y.view(-1)),
    "view_sizes": lambda z, y: F.cross_entropy(z.view(z.size(0) * z.size(1), -1), y.view(-1)),
    "reshape_function": lambda z, y: F.cross_entropy(torch.reshape(z, (-1, V)), y.reshape(-1)),
    "reshape_keyword": lambda z, y: F.cross_entropy(z.reshape(shape=(-1, V)), y.reshape(-1)),
    "flatten": lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()),
    "flatten_function": lambda z, y: F.cross_entropy(torch.flatten(z, 0, -2), torch.flatten(y)),
    "flatten_keywords": lambda z, y: F.cross_entropy(
        z.flatten(start_dim=0, end_dim=1), y.flatten()
    ),
    "contiguous": lambda z, y: F.cross_entropy(z.contiguous().view(-1, V), y.view(-1)),
    "float": lambda z, y: F.cross_entropy(z.float().view(-1, V), y.view(-1)),
    "to_dtype": lambda z, y: F.cross_entropy(z.view(-1, V).to(torch.float32), y.view(-1)),
    "to_keyword": lambda z, y: F.cross_entropy(z.view(-1, V).to(dtype=torch.float32), y.view(-1)),
    "type_as": lambda z, y: F.cross_entropy(
        z.type_as(torch.zeros((), dtype=torch.float32)).view(-1, V), y.view(-1)
    ),
    "unsqueeze": lambda z, y: F.cross_entropy(z.unsqueeze(0).squeeze(0).view(-1, V), y.view(-1)),
    "unflatten": lambda z, y: F.cross_entropy(
        z.flatten(0, 1).unflatten(0, (z.size(0), z.size(1))).flatten(0, 1), y.flatten()
    ),
    "shifted": lambda z, y: F.cross_entropy(
        z[..., :-1, :].contiguous().view(-1, V), y[..., 1:].contiguous().view(-1)
    ),
    "shifted_plain": lambda z, y: F.cross_entropy(z[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1)),
    "shifted_twice": lambda z, y: F.cross_entropy(
        z[:, 1:][..., :-1, :].reshape(-1, V), y[:, 1:-1].reshape(-1)
    ),
    "last_token": lambda z, y: F.cross_entropy(z[:, -1], y[:, -1]),
    "last_token_all": lambda z, y: F.cross_entropy(z[:, -1, :], y[:, -1]),
    "one_row": lambda z, y: F.cross_entropy(z[0, 1], y[0, 1]),
    "every_other": lambda z, y: F.cross_entropy(z[:, ::2].reshape(-1, V), y[:, ::2].reshape(-1)),
    "new_axis": lambda z, y: F.cross_entropy(
        z[:, None, 1:].squeeze(1).reshape(-1, V), y[:, 1:].reshape(-1)
    ),
    "slice_after_view": lambda z, y: F.cross_entropy(z.view(-1, V)[3:-2], y.view(-1)[3:-2]),
    "whole_vocabulary_slice": lambda z, y: F.cross_entropy(
        z[..., :V].reshape(-1, V), y.reshape(-1)
    ),
    "permuted": lambda z, y: F.cross_entropy(z.permute(0, 2, 1), y),
    "transposed": lambda z, y: F.cross_entropy(z.transpose(1, 2), y),
    "transposed_negative": lambda z, y: F.cross_entropy(torch.transpose(z, -1, -2), y),
    "mT": lambda z, y: F.cross_entropy(z.mT, y),
    "swapaxes": lambda z, y: F.cross_entropy(z.swapaxes(1, 2), y),
    "movedim": lambda z, y: F.cross_entropy(z.movedim(-1, 1), y),
    "batch_second": lambda z, y: F.cross_entropy(
        z.transpose(0, 1).reshape(-1, V), y.t().reshape(-1)
    ),
    "batch_second_shifted": lambda z, y: F.cross_entropy(
        z.transpose(0, 1)[:-1].reshape(-1, V), y.t()[1:].reshape(-1)
    ),
    "classes_second_sliced": lambda z, y: F.cross_entropy(z.permute(0, 2, 1)[:, :, 1:], y[:, 1:]),
    "classes_second_reshaped": lambda z, y: F.cross_entropy(
        z.permute(0, 2, 1)[..., None], y[..., None]
    ),
    "detached_target": lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten().detach()),
    "clamped_target": lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten().clamp(min=3)),
    "padded_labels": lambda z, y: F.cross_entropy(
        z.view(-1, V), F.pad(y, (0, 1), value=-100)[..., 1:].contiguous().view(-1)
    ),
}


CHAINS |= {
    "divided": lambda z, y: flat(z / 0.7, y),
    "multiplied": lambda z, y: flat(0.0625 * z, y),
    "divided_by_method": lambda z, y: flat(z.div(2).float(), y),
    "negated": lambda z, y: flat(-z, y),
    "shifted_values": lambda z, y: flat(3 - (z - 2) * 0.5, y),
    "softcap": lambda z, y: flat(torch.tanh(z / 30) * 30, y),
    "softcap_method": lambda z, y: flat(z.div(5.0).tanh().mul(-5.0), y),
    "sigmoid_softcap": lambda z, y: flat(30 * torch.sigmoid(z / 7.5), y),
    "sigmoid_softcap_shifted": lambda z, y: flat(23 * torch.sigmoid((z + 5) / 7.5), y),
    "softcap_of_scaled": lambda z, y: flat(2 * torch.tanh((0.5 * z - 1) / 2) + 7, y),
    "temperature": lambda z, y: flat(z / torch.tensor(1.5), y),
    "temperature_by_row": lambda z, y: flat(z * torch.linspace(0.5, 2, z.size(1))[:, None], y),
    "vocabulary_cut": lambda z, y: flat(z[..., :90], y % 90),
    "vocabulary_cut_at_both_ends": lambda z, y: flat(z[..., 3:90].float(), y % 87),
    "vocabulary_narrowed": lambda z, y: flat(z.narrow(-1, 0, 90), y % 90),
    "padding_masked": lambda z, y: flat(
        z.masked_fill(torch.arange(V) >= 90, float("-inf")), y % 90
    ),
    "row_by_number": lambda z, y: F.cross_entropy(z.select(1, 2), y[:, 2]),
    "rows_by_index": lambda z, y: F.cross_entropy(
        z[:, torch.tensor([2, 0, 2])].flatten(0, 1), y[:, [2, 0, 2]].flatten()
    ),
    "rows_by_index_select": lambda z, y: flat(
        z.index_select(1, torch.tensor([1, 3])), y[:, [1, 3]]
    ),
    "rows_narrowed": lambda z, y: flat(torch.narrow(z, 1, 1, 3), y[:, 1:4]),
    "chunk": lambda z, y: flat(z.chunk(2, dim=1)[1], y.chunk(2, 1)[1]),
    "split": lambda z, y: flat(torch.split(z, 2, 1)[0], y[:, :2]),
    "split_sizes": lambda z, y: flat(z.split([1, z.size(1) - 1], dim=1)[1], y[:, 1:]),
    "tensor_split": lambda z, y: flat(z.tensor_split(3, 1)[2], y.tensor_split(3, 1)[2]),
    "unbind": lambda z, y: F.cross_entropy(z.unbind(0)[1], y[1]),
    "expanded": lambda z, y: flat(z.expand(-1, -1, V), y),
    "viewed_as_itself": lambda z, y: flat(z.view_as(z) / 2, y),
}


def written(z, write):
    write(z)
    return z


def mask_padding(z):
    z[..., 90:] = float("-inf")


def mask_and_return(z):
    mask_padding(z)
    return z


def divide_a_slice(z):
    z = z[:, 1:]
    z.div_(0.5)
    return z


# Logits are written to in place.
WRITES = {
    "div_": lambda z, y: flat(written(z, lambda z: z.div_(0.7)), y),
    "mul_result": lambda z, y: flat(z.mul_(0.25), y),
    "div_operator": lambda z, y: flat(operator.itruediv(z, 2.0), y),
    "through_a_view": lambda z, y: flat(written(z, lambda z: z.view(-1, V).mul_(0.5)), y),
    "after_a_view": lambda z, y: F.cross_entropy(
        written(z.view(-1, V), lambda _: z.mul_(0.5)), y.view(-1)
    ),
    "before_a_slice": lambda z, y: flat(written(z, lambda z: z.sub_(1))[:, :-1], y[:, 1:]),
    "of_a_slice": lambda z, y: flat(divide_a_slice(z), y[:, 1:]),
    "after_a_slice": lambda z, y: flat(written(z[:, 1:], lambda _: z.mul_(3)), y[:, 1:]),
    "of_a_cast": lambda z, y: flat(written(z.float(), lambda z: z.mul_(0.5)), y),
    "padding_then_through_a_view": lambda z, y: flat(
        written(mask_and_return(z), lambda z: z.view(-1, V).mul_(0.5)), y % 90
    ),
    "padding_after_a_view": lambda z, y: F.cross_entropy(
        written(z.view(-1, V), lambda rows: (mask_padding(z), rows.mul_(0.5))), y.view(-1) % 90
    ),
    "tanh_": lambda z, y: flat(z.div_(5).tanh_() * 5, y),
    "padding": lambda z, y: flat(written(z, mask_padding), y % 90),
    "padding_then_negative_loss": lambda z, y: (
        (-written(z, mask_padding).log_softmax(-1)).gather(-1, (y % 90)[..., None]).mean()
    ),
    "padding_then_bias": lambda z, y: flat(
        written(z, mask_padding) + torch.linspace(-1, 1, V, dtype=z.dtype), y % 90
    ),
    "padding_then_mask": lambda z, y: flat(
        written(z, mask_padding).masked_fill(torch.arange(V) == 85, float("-inf")), y % 85
    ),
    "padding_of_a_view": lambda z, y: flat(
        written(z, lambda z: mask_padding(z.view(-1, V))), y % 90
    ),
    "after_the_loss": lambda z, y: (flat(z.float(), y), z.mul_(2))[0],
}


def _class_weight(z):
    return torch.linspace(0.5, 2.0, V, dtype=z.dtype)


LOSSES = {
    "function": lambda z, y: F.cross_entropy(z, y),
    "keywords": lambda z, y: F.cross_entropy(input=z, target=y, reduction="mean"),
    "module": lambda z, y: nn.CrossEntropyLoss()(z, y),
    "module_options": lambda z, y: nn.CrossEntropyLoss(ignore_index=3, label_smoothing=0.1)(z, y),
    "sum": lambda z, y: F.cross_entropy(z, y, reduction="sum") / 7,
    "none": lambda z, y: (F.cross_entropy(z, y, reduction="none") * torch.arange(len(y))).sum(),
    "legacy": lambda z, y: F.cross_entropy(z, y, size_average=False),
    "ignore_index": lambda z, y: F.cross_entropy(z, y, ignore_index=5),
    "class_weight": lambda z, y: F.cross_entropy(z, y, weight=_class_weight(z)),
    "class_weight_positional": lambda z, y: F.cross_entropy(z, y, _class_weight(z)),
    "smoothing": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.2),
    "smoothing_weight_none": lambda z, y: F.cross_entropy(
        z, y, _class_weight(z), label_smoothing=0.2, reduction="none"
    ).square().sum(),
    "log_softmax": lambda z, y: F.nll_loss(F.log_softmax(z, -1), y),
    "log_softmax_dim_1": lambda z, y: F.nll_loss(F.log_softmax(z, dim=1), y),
    "log_softmax_torch": lambda z, y: F.nll_loss(torch.log_softmax(z, 1), y, reduction="sum"),
    "log_softmax_method": lambda z, y: F.nll_loss(z.log_softmax(-1), y, ignore_index=2),
    "log_softmax_special": lambda z, y: F.nll_loss(torch.special.log_softmax(z, -1), y),
    "log_softmax_dtype": lambda z, y: F.nll_loss(F.log_softmax(z, -1, dtype=torch.float32), y),
    "log_softmax_module": lambda z, y: nn.NLLLoss()(nn.LogSoftmax(dim=-1)(z), y),
    "log_softmax_weight": lambda z, y: F.nll_loss(F.log_softmax(z, -1), y, _class_weight(z)),
    "log_softmax_none": lambda z, y: F.nll_loss(F.log_softmax(z, -1), y, reduction="none").sum(),
    "log_softmax_twice": lambda z, y: F.cross_entropy(F.log_softmax(z, -1), y),
}  # fmt: skip


def nll(z, y):
    """Per-row losses by hand."""
    return z.logsumexp(-1) - z.gather(-1, y.unsqueeze(-1)).squeeze(-1)


def selective_log_softmax(z, y):
    """As in TRL: a loop over sequences, so that no log_softmax of all logits is held."""
    chosen = z.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    return chosen - torch.stack([torch.logsumexp(row, dim=-1) for row in z])


def _mask(y):
    return (y % 3 > 0).float()


# Log-probabilities of the targets, written otherwise than as nll_loss: [B, S, V] -> [B, S].
LOG_PROBABILITIES = {
    "gather": lambda z, y: F.log_softmax(z, -1).gather(-1, y.unsqueeze(-1)).squeeze(-1),
    "gather_function": lambda z, y: torch.gather(z.log_softmax(-1), 2, y[..., None])[..., 0],
    "gather_keywords": lambda z, y: torch.gather(
        z.log_softmax(-1), dim=-1, index=y[..., None]
    ).squeeze(-1),
    "take_along_dim": lambda z, y: torch.take_along_dim(
        z.log_softmax(-1), y[..., None], dim=-1
    ).squeeze(-1),
    "negated": lambda z, y: -(-F.log_softmax(z, -1)).gather(-1, y[..., None]).squeeze(-1),
    "arange": lambda z, y: F.log_softmax(z.flatten(0, 1), -1)[
        torch.arange(y.numel()), y.flatten()
    ].view_as(y),
    "arange_twice": lambda z, y: z.log_softmax(-1)[
        torch.arange(z.size(0))[:, None], torch.arange(z.size(1))[None], y
    ],
    "one_hot": lambda z, y: (F.one_hot(y, V) * F.log_softmax(z, -1)).sum(-1),
    "one_hot_cast": lambda z, y: (z.log_softmax(-1) * F.one_hot(y, V).to(z.dtype)).sum(dim=-1),
    "softmax_log": lambda z, y: torch.softmax(z, -1).log().gather(-1, y[..., None])[..., 0],
    "logsumexp": lambda z, y: -nll(z, y),
    "logsumexp_kept": lambda z, y: (
        z.gather(-1, y[..., None]) - z.logsumexp(-1, keepdim=True)
    ).squeeze(-1),
    "normalised": lambda z, y: (z - z.logsumexp(-1, keepdim=True)).gather(-1, y[..., None])[..., 0],
    "one_hot_of_logits": lambda z, y: (F.one_hot(y, V) * z).sum(-1) - torch.logsumexp(z, -1),
    "selective": selective_log_softmax,
    "categorical": lambda z, y: torch.distributions.Categorical(
        logits=z, validate_args=False
    ).log_prob(y),
    "cross_entropy": lambda z, y: -F.cross_entropy(z.mT, y, reduction="none"),
    "softcapped": lambda z, y: (
        (20 * torch.tanh(z / 20)).log_softmax(-1).gather(2, y[..., None])[..., 0]
    ),
    "scaled": lambda z, y: -nll(z / 0.7, y),
    "negative_scale": lambda z, y: -nll(z * -0.3, y),
    "written": lambda z, y: -nll(z.div_(0.7), y),
}

# What is made of them.
PER_TOKEN = {
    "mean": lambda p, y: -p.mean(),
    "masked": lambda p, y: -(p * _mask(y)).sum() / _mask(y).sum(),
    "where": lambda p, y: -torch.where(y % 3 > 0, p, 0.0).sum() / _mask(y).sum(),
    "where_not": lambda p, y: -torch.where(y % 3 == 0, 0, p).sum(-1).mean(),
    "where_method": lambda p, y: -p.where(y[:, :1] > 30, 0).mean(),
    "masked_fill": lambda p, y: -p.masked_fill(y % 3 == 0, 0).mean(-1).sum(),
    "by_sequence": lambda p, y: -((p * _mask(y)).sum(-1) / _mask(y).sum(-1)).mean(),
    "weights": lambda p, y: (p * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(),
    "items": lambda p, y: -p.sum() / torch.tensor(y.numel() - 2),
    "ratio": lambda p, y: (-torch.exp(p - p.detach()) * _mask(y)).sum() / _mask(y).sum(),
    "preference": lambda p, y: -F.logsigmoid((p[:1].sum(1) - p[1:].sum(1)) * 0.1).mean(),
    "clipped": lambda p, y: torch.min(
        torch.exp(p + 4.0), torch.exp(p + 4.0).clamp(0.8, 1.2)
    ).mean(),
}
