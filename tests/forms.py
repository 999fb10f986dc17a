"""Ways to write a head and its loss: what must be rewritten, and what must not.

Each is a function of hidden ``[B, S, H]``, weight ``[V, H]``, bias ``[V]`` and target ``[B, S]``.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

V = 97


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
