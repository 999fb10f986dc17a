"""The words of row-wise programs (``row_wise.py``): chains that treat rows apart, and near misses.

In the texts ``{x}`` is ``[*rows, n]``, ``{z}`` other numbers of the same form (of another head, a
teacher, or of the rows), ``{n}`` the words, ``{c}`` a word for each row, ``{r}`` the weights of
rows. The words are the last dimension.
"""

from collections.abc import Callable

# Logits ``[B, S, V]`` of one head.
HEADS = {
    "linear": "F.linear(hidden, weight)",
    "linear_bias": "F.linear(hidden, weight, bias)",
    "operator": "hidden @ weight.t()",
    "einsum": "torch.einsum('bsh,vh->bsv', hidden, weight)",
    "float": "F.linear(hidden.float(), weight.float())",
    "adapter": (
        "F.linear(hidden, weight) + 0.5 * F.linear(F.linear(hidden, weight[:3]), weight[:, :3])"
    ),
    "adapter_in_place": (
        "F.linear(hidden, weight, bias).add_((hidden @ weight[:2].t()) @ weight[:, :2].t())"
    ),
    "sum_of_heads": "F.linear(hidden, weight) + F.linear(torch.tanh(hidden), weight * 0.5)",
    "moved": "F.linear(hidden.transpose(0, 1), weight).transpose(0, 1)",
    "flat": "(hidden.flatten(0, 1) @ weight.t()).view({B}, {S}, {V})",
}
OTHERS = {
    "second_head": "F.linear(torch.tanh(hidden), weight * 0.5)",
    "second_head_detached": "F.linear(hidden * 0.5, weight.flip(0)).detach()",
    "second_head_of_other_sizes": "F.linear(hidden[..., :3], weight[:, :3].contiguous(), bias)",
    "teacher": "torch.sin(row.unsqueeze(-1) * torch.arange({V}))",
    "teacher_softmax": "(row.detach().unsqueeze(-1) * torch.arange({V}) % 3).softmax(-1)",
    "one_hot": "F.one_hot(target.clamp(min=0), {V}).to(hidden.dtype)",
    "of_rows": "row.unsqueeze(-1).expand(-1, -1, {V})",
    "of_words": "bias.expand({B}, {S}, {V})",
    "outer_product": "hidden[..., :1] * weight[:, 0]",
}
# ``[*rows, n]`` again.
STEPS = {
    "relu": "F.relu({x})",
    "gelu": "F.gelu({x})",
    "silu": "F.silu({x})",
    "sigmoid": "{x}.sigmoid()",
    "tanh": "torch.tanh({x})",
    "softplus": "F.softplus({x})",
    "exp": "{x}.clamp(max=3).exp()",
    "log1p": "{x}.abs().log1p()",
    "square": "{x}.square()",
    "power": "{x}.abs().add(0.1) ** 1.5",
    "leaky_relu": "F.leaky_relu({x}, 0.1)",
    "elu": "F.elu({x})",
    "sine": "{x}.sin()",
    "clamp": "{x}.clamp(-1, 1.5)",
    "maximum": "torch.maximum({x}, {z}.to({x}.dtype))",
    "softmax": "{x}.softmax(-1)",
    "log_softmax": "F.log_softmax({x} / 2, -1)",
    "softmin": "F.softmin({x}, -1)",
    "logsigmoid": "F.logsigmoid({x})",
    "cumsum": "{x}.cumsum(-1) / 8",
    "logcumsumexp": "torch.logcumsumexp({x}, -1)",
    "cummax": "{x}.cummax(-1).values",
    "sorted": "{x}.sort(-1, descending=True).values",
    "sorted_by_argsort": "{x}.gather(-1, {x}.argsort(-1))",
    "flipped": "{x}.flip(-1)",
    "standardised": "({x} - {x}.mean(-1, keepdim=True)) / ({x}.std(-1, keepdim=True) + 0.5)",
    "layer_norm": "F.layer_norm({x}, ({n},))",
    "normalised": "F.normalize({x}, dim=-1)",
    "less_than_mean": "torch.where({x} < {x}.mean(-1, keepdim=True), 0.0, {x})",
    "compared": "{x} * ({x} > 0)",
    "masked": "{x}.masked_fill({x} < -0.5, -2.0)",
    "top": "{x}.masked_fill({x} < {x}.topk(3).values[..., -1:], -4.0)",
    "nucleus": "{x} * ({x}.softmax(-1).cumsum(-1) < 0.8)",
    "rounded": "{x}.round()",
    "added": "{x} + {z}",
    "multiplied": "{x} * {z}",
    "difference": "{x} - {z}.detach()",
    "mixed": "torch.lerp({x}.float(), {z}.float(), 0.3)",
    "logaddexp": "torch.logaddexp({x}, {z}.to({x}.dtype))",
    "where_other": "torch.where({z} > 0.2, {x}, -1.0)",
    "pointwise_kl": "F.kl_div({x}.log_softmax(-1), {z}.softmax(-1), reduction='none')",
    "entropy_terms": "{x}.softmax(-1) * {x}.log_softmax(-1)",
    "entr": "torch.special.entr({x}.softmax(-1))",
    "by_rows": "{x} * {r}.unsqueeze(-1)",
    "by_known_rows": "{x} / {r}.detach().unsqueeze(-1)",
    "by_words": "{x} + torch.linspace(-1, 1, {n}, dtype={x}.dtype)",
    "by_scale": "{x} * scale",
    "chosen_moved": "{x} - {x}.gather(-1, {c}.unsqueeze(-1))",
    "scattered": "{x}.scatter(-1, {c}.unsqueeze(-1), 0.5)",
    "scattered_add": "{x}.scatter_add(-1, {c}.unsqueeze(-1), {r}.detach().unsqueeze(-1).to({x}))",
    "one_hot_subtracted": "{x}.softmax(-1) - F.one_hot({c}, {n})",
    "rows_masked": "torch.where({r}.unsqueeze(-1) > 0.7, {x}, 0.25)",
    "index_added": "{x}.index_add(-1, torch.tensor([1, 0]), {x}[..., :2])",
    "filled": "torch.full_like({x}, 0.5) + {x}",
    "by_zeros": "{x} + torch.zeros_like({x})",
    "double": "{x}.double()",
    "float": "{x}.float()",
    "bfloat16": "{x}.bfloat16()",
    "cloned": "{x}.clone()",
    "detached_factor": "{x} * {x}.detach()",
    "detached": "{x}.detach() + 0.5 * {x}",
    "straight_through": "{x} + ({x}.round() - {x}).detach()",
    "view_and_back": "{x}.unsqueeze(-1).squeeze(-1)",
    "moved_and_back": "{x}.movedim(-1, 0).sigmoid().movedim(0, -1)",
    "halves_swapped": "torch.cat([{x}[..., {n} // 2 :], {x}[..., : {n} // 2]], -1)",
    "stacked": "torch.stack([{x}, {x}.abs()]).amax(0)",
    "stacked_behind": "torch.stack([{x}, {z}.to({x}.dtype)], -1).sum(-1)",
    "split": "sum({x}.softmax(-1).mul(2).split(1)[:1]) + {x}",
    "repeated": "{x}.unsqueeze(-2).expand(*{x}.shape[:-1], 2, {n}).mean(-2)",
    "nan_to_num": "({x} / ({x} > -9)).nan_to_num(0.0)",
}
# ``[*rows, n']``, and n'.
RESIZING: dict[str, tuple[str, Callable[[int], int]]] = {
    "all_but_three": ("{x}[..., :-3]", lambda n: n - 3),
    "without_first": ("{x}[..., 1:]", lambda n: n - 1),
    "every_other": ("{x}[..., ::2]", lambda n: (n + 1) // 2),
    "narrowed": ("{x}.narrow(-1, 1, {n} - 2)", lambda n: n - 2),
    "half": ("{x}.chunk(2, -1)[0]", lambda n: (n + 1) // 2),
    "doubled": ("torch.cat([{x}, {x}.exp().neg()], -1)", lambda n: 2 * n),
    "with_other": ("torch.cat([{x}, {z}.to({x}.dtype)[..., :2]], -1)", lambda n: n + 2),
    "all_but_smallest": ("{x}.topk({n} - 2).values", lambda n: n - 2),
    "selected": ("{x}.index_select(-1, torch.arange({n} - 1))", lambda n: n - 1),
    "indexed": ("{x}[..., torch.arange(1, {n})]", lambda n: n - 1),
    "padded": ("F.pad({x}, (0, 2), value=-1.0)", lambda n: n + 2),
    "differences": ("{x}.diff(dim=-1)", lambda n: n - 1),
}
# Statements that write.
WRITES = {
    "mul_": "{x}.mul_(0.5)",
    "relu_": "{x}.relu_()",
    "clamp_": "{x}.clamp_(max=1.0)",
    "first_word": "{x}[..., 0] = 0.25",
    "some_words": "{x}[..., 2:4] = -1.0",
    "last_words": "{x}[..., -2:].mul_(0.5)",
    "masked": "{x}.masked_fill_({x} > 1.0, 1.0)",
    "by_mask": "{x}[{x} < -1.0] = 0.0",
    "by_mask_of_rows": "{x}[{c} > 3] = 0.5",
    "chosen": "{x}.scatter_(-1, {c}.unsqueeze(-1), -0.5)",
    "other_added": "{x}.add_({z}.detach().to({x}.dtype))",
    "copied": "{x}.copy_({x} * 2)",
    "filled": "{x}.fill_(0.5)",
    "viewed": "{x}.unsqueeze(0).add_(0.25)",
    "softmaxed": "{x}.sub_({x}.logsumexp(-1, keepdim=True))",
    "without_gradient": "with torch.no_grad():\n    {x}.mul_(0.5)",
    "first_row": "{x}[0] = 0.5",
}
# What mixes rows.
MIXING = {
    "centred_over_batch": "{x} - {x}.mean(0)",
    "largest_of_all": "{x} - {x}.amax().detach()",
    "cumulated_over_rows": "{x}.cumsum(0)",
    "rows_flipped": "{x} + {x}.flip(0)",
    "rows_rolled": "{x} + {x}.roll(1, 0)",
    "rows_sorted": "{x}.sort(0).values",
    "softmax_over_rows": "{x}.softmax(0)",
    "first_row_subtracted": "{x} - {x}[:1]",
    "reshaped": "{x}.reshape(-1).cumsum(0).view({x}.shape)",
    "multiplied_with_itself": "{x} @ {x}.mT @ {x}",
    "rows_picked": "{x}[torch.zeros({x}.size(0), dtype=torch.int64)]",
    "batch_norm": "F.batch_norm({x}.reshape(-1, {n}), None, None, training=True).view({x}.shape)",
}
# ``[*rows]``
ENDS = {
    "sum": "{x}.sum(-1)",
    "mean": "{x}.mean(-1)",
    "std": "{x}.std(-1)",
    "var": "{x}.var(-1, correction=0)",
    "amax": "{x}.amax(-1)",
    "min": "{x}.min(-1).values",
    "logsumexp": "{x}.logsumexp(-1)",
    "gathered": "{x}.gather(-1, {c}.unsqueeze(-1)).squeeze(-1)",
    "log_probability": "-{x}.log_softmax(-1).gather(-1, {c}[..., None])[..., 0]",
    "norm": "({x} + 2.0).norm(dim=-1)",
    "norm_of_one": "torch.linalg.vector_norm({x}, 1, -1)",
    "top": "{x}.topk(2).values.sum(-1)",
    "top_of_softmax": "({x}.softmax(-1).topk(3).values ** 2).sum(-1)",
    "word": "{x}[..., 1]",
    "words": "{x}[..., 1:3].prod(-1)",
    "picked": "{x}.index_select(-1, torch.tensor([2, 0])).sum(-1)",
    "count": "({x} > 0).sum(-1) * {x}.mean(-1)",
    "any": "torch.where(({x} > 1).any(-1), {x}.mean(-1), {x}.amax(-1))",
    "all": "({x} > -3).all(-1) * {x}.amin(-1)",
    "argmax": "{x}.argmax(-1) * 0.1 + {x}.mean(-1)",
    "median": "{x}.median(-1).values",
    "kth": "{x}.kthvalue(2, -1).values",
    "entropy": "-({x}.softmax(-1) * {x}.log_softmax(-1)).sum(-1)",
    "focal": "(1 - {x}.softmax(-1).gather(-1, {c}[..., None])[..., 0]) ** 2 * {x}.logsumexp(-1)",
    "kl": "F.kl_div({x}.log_softmax(-1), {z}.log_softmax(-1), None, None, 'none', True).sum(-1)",
    "soft": "-({z}.softmax(-1).detach() * {x}.log_softmax(-1)).sum(-1)",
    "cosine": "F.cosine_similarity({x}, {z} + 0.5, dim=-1)",
    "dot": "({x} * {z}).sum(-1)",
    "einsum": "torch.einsum('...v,...v->...', {x}, {z}.to({x}.dtype))",
    "brier": "({x}.softmax(-1) - F.one_hot({c}, {n})).square().sum(-1)",
    "margin": "({x}.topk(2).values * torch.tensor([1.0, -1.0])).sum(-1)",
    "chosen_cumulative": "{x}.softmax(-1).cumsum(-1).gather(-1, {c}[..., None]).squeeze(-1)",
    "var_mean": "sum(torch.var_mean({x}, -1))",
    "aminmax": "{x}.aminmax(dim=-1).max - {x}.detach().amin(-1)",
    "certain": (
        "-{x}.log_softmax(-1).gather(-1, {c}[..., None])[..., 0]"
        " * {x}.detach().softmax(-1).gather(-1, {c}[..., None])[..., 0]"
    ),
    "cross_entropy": (
        "F.cross_entropy({x}.flatten(0, -2), {c}.flatten(), reduction='none').view({c}.shape)"
    ),
}
# A single number.
WHOLE = {
    "mean": "{x}.mean()",
    "squares": "{x}.square().mean()",
    "sum": "{x}.softmax(-1).square().sum() / 7",
    "mean_of_std": "{x}.std(-1, keepdim=True).mean()",
    "mse": "F.mse_loss({x}, {z}.to({x}.dtype))",
    "smooth_l1": "F.smooth_l1_loss({x}, {z}.detach().to({x}.dtype), reduction='sum')",
    "binary": "F.binary_cross_entropy_with_logits({x}, ({z} > 0).to({x}.dtype))",
    "kl": "F.kl_div({x}.log_softmax(-1), {z}.softmax(-1).to({x}.dtype), reduction='batchmean')",
    "kl_of_logs": (
        "F.kl_div({x}.log_softmax(-1), {z}.log_softmax(-1), reduction='sum', log_target=True)"
    ),
    "soft_targets": "F.cross_entropy({x}.flatten(0, -2), {z}.softmax(-1).flatten(0, -2))",
    "cross_entropy": "F.cross_entropy({x}.flatten(0, -2), {c}.flatten())",
    "smoothed": "F.cross_entropy({x}.flatten(0, -2), {c}.flatten(), label_smoothing=0.2)",
    "nll": "F.nll_loss({x}.log_softmax(-1).flatten(0, -2), {c}.flatten(), reduction='sum')",
    "ignored": "F.cross_entropy({x}.flatten(0, -2), {c}.flatten(), ignore_index=3)",
    "largest": "{x}.amax()",
    "worst_row": "{x}.logsumexp(-1).max()",
    "over_sequences": "({x}.std(-1).sum(-1) / {r}.sum(-1)).mean()",
    "by_batch": "{x}.softmax(-1).square().sum((-1, 0)).mean()",
    "two_ends": "{x}.std(-1).mean() * {x}.logsumexp(-1).mean()",
}
# Small errors of what these read change what they give much.
STEEP = {
    *("STEPS.rounded", "STEPS.straight_through", "STEPS.less_than_mean", "STEPS.masked"),
    *("STEPS.top", "STEPS.nucleus", "STEPS.bfloat16", "ENDS.count", "ENDS.any", "ENDS.all"),
    *("ENDS.argmax", "WRITES.by_mask", "STEPS.sorted_by_argsort", "STEPS.where_other"),
}
