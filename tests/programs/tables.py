"""The words of the grammar: ways to write each part of a program.

In the texts ``{x}`` is the tensor at hand (logits, where nothing else is said), ``{V}`` its
vocabulary, ``{v}`` the dimension of that, ``{y}`` and ``{r}`` the targets and the weights of its
rows, ``{h}``, ``{w}``, ``{b}`` the head's input, weight ``[V, H]`` and bias, ``{wt}`` the weight
``[H, V]``, and ``{ignored}`` the target of ignored rows.
"""

TRANSPOSED = {
    "t": "{w}.t()",
    "T": "{w}.T",
    "mT": "{w}.mT",
    "transpose": "{w}.transpose(0, 1)",
    "permute": "{w}.permute(1, 0)",
}

HEADS = {
    "linear": "F.linear({h}, {w})",
    "linear_bias": "F.linear({h}, {w}, {b})",
    "linear_keywords": "F.linear(input={h}, weight={w}, bias={b})",
    "module": "head({h})",
    "operator": "{h} @ {wt}",
    "matmul": "torch.matmul({h}, {wt})",
    "method": "{h}.matmul({wt})",
    "einsum": "torch.einsum('...h,vh->...v', {h}, {w})",
    "einsum_swapped": "torch.einsum('vh,bsh->bsv', {w}, {h})",
}
HEADS_OF_FLAT_ROWS = {
    "mm": "torch.mm({h}.reshape(-1, {h}.size(-1)), {wt})",
    "addmm": "torch.addmm({b}, {h}.flatten(0, -2), {wt})",
    "addmm_method": "{b}.addmm({h}.flatten(0, 1), {wt})",
}
HEADS_VOCABULARY_SECOND = {"einsum_second": "torch.einsum('bsh,vh->bvs', {h}, {w})"}
ODD_HEADS = {
    "bias_apart": "F.linear({h}, {w}) + {b}",
    "bias_apart_matmul": "{h} @ {wt} + {b}",
    "bias_first": "{b} + {h} @ {wt}",
    "float_head": "F.linear({h}.float(), {w}.float())",
    "checkpointed": "checkpoint(F.linear, {h}, {w}, use_reentrant=False)",
    "products_summed": "({h}.unsqueeze(-2) * {w}).sum(-1)",
    "einsum_rows_moved": "torch.einsum('bsh,vh->sbv', {h}, {w}).transpose(0, 1)",
    "two_products": "F.linear({h}, {w}) + F.linear({h} * 0.5, {w})",
    "weight_scaled_in_call": "F.linear({h}, {w} * 0.5)",
    "no_grad_weight": "F.linear({h}, {w}.detach(), {b})",
}
ODD_HEADS_OF_FLAT_ROWS = {
    "addmm_beta": "torch.addmm({b}, {h}.flatten(0, -2), {wt}, beta=0.5, alpha=2)",
}
ODD_HEADS_VOCABULARY_SECOND = {
    "conv1d": "F.conv1d({h}.transpose(1, 2), {w}.unsqueeze(-1), {b})",
    "weight_first": "{w} @ {h}.mT",
}

# Before the head: of hidden states, weight, bias, targets.
PREPARATIONS = {
    "hidden_scaled": "hidden = hidden * 1.5",
    "hidden_tanh": "hidden = torch.tanh(hidden)",
    "hidden_norm": "hidden = F.layer_norm(hidden, hidden.shape[-1:])",
    "hidden_written": "hidden = hidden * 1\nhidden.add_(0.5)",
    "hidden_setitem": "hidden = hidden.clone()\nhidden[:, 0] = 0.5",
    "hidden_detached": "hidden = hidden.detach()",
    "hidden_relu": "hidden = F.relu(hidden * 1.0, inplace=True) - 0.5",
    "weight_written": "with torch.no_grad():\n    weight.mul_(0.9)",
    "bias_written": "with torch.no_grad():\n    bias.add_(0.5)",
    "weight_computed": "weight = weight * 1.25",
    "weight_like_hidden": "weight = weight.to(hidden.dtype)",
    "weight_joined": "weight = torch.cat([weight[:2] * 0.5, weight[2:]])",
    "weight_detached": "weight = weight.detach()",
    "weight_viewed": "weight = weight.unsqueeze(0)[0]",
    "bias_computed": "bias = bias * 1.25",
    "bias_like_hidden": "bias = bias.to(hidden.dtype)",
    "bias_detached": "bias = bias.detach()",
    "bias_viewed": "bias = bias.view(-1)",
    "target_ignored": "target = target.clone()\ntarget[:, 0] = {ignored}",
    "target_padded": "target = F.pad(target, (0, 1), value={ignored})[..., 1:]",
    "target_written": "target[:, -1] = 1",
    "target_where": "target = torch.where(row > 0.5, target, {ignored})",
    "views_of_inputs": "hidden = hidden.view_as(hidden)\nweight = weight[:]",
    "hidden_dropped": "hidden = hidden * (torch.rand(hidden.shape, dtype=torch.float64) > 0.3)",
    "target_drawn": (
        "target = torch.where(torch.rand(row.shape, dtype=torch.float64) > 0.3, target, 1)"
    ),
}
TIED = {
    "tied_embedding": "hidden = hidden + F.embedding(target % {V}, weight)",
    "tied_index": "hidden = hidden + weight[target % {V}]",
}

# Logits to [N, V]; rows to [N].
FLATTENINGS = {
    "reshape": "{x}.reshape(-1, {x}.size(-1))",
    "view": "{x}.contiguous().view(-1, {V})",
    "flatten": "{x}.flatten(0, -2)",
    "flatten_function": "torch.flatten({x}, 0, -2)",
    "reshape_function": "torch.reshape({x}, (-1, {V}))",
}

# For [B, S, V]: of logits, of rows, and the sizes of the rows that remain.
ROW_STEPS = {
    "shifted": ("{x}[..., :-1, :]", "{x}[..., 1:]", lambda b, s: (b, s - 1)),
    "shifted_plain": ("{x}[:, :-1]", "{x}[:, 1:]", lambda b, s: (b, s - 1)),
    "every_other": ("{x}[:, ::2]", "{x}[:, ::2]", lambda b, s: (b, (s + 1) // 2)),
    "last_rows": ("{x}[:, -2:]", "{x}[:, -2:]", lambda b, s: (b, 2)),
    "last_row": ("{x}[:, -1]", "{x}[:, -1]", lambda b, s: (b,)),
    "first_sequence": ("{x}[0]", "{x}[0]", lambda b, s: (s,)),
    "transposed_rows": ("{x}.transpose(0, 1)", "{x}.t()", lambda b, s: (s, b)),
    "unsqueezed": ("{x}.unsqueeze(0).squeeze(0)", "{x}", lambda b, s: (b, s)),
    "new_axis": ("{x}[:, None].squeeze(1)", "{x}", lambda b, s: (b, s)),
}
ODD_ROW_STEPS = {
    "indexed": ("{x}[[0, 0]]", "{x}[[0, 0]]", lambda b, s: (2, s)),
    "narrowed": ("{x}.narrow(1, 1, 2)", "{x}.narrow(1, 1, 2)", lambda b, s: (b, 2)),
    "selected": ("{x}.select(1, -1)", "{x}.select(1, -1)", lambda b, s: (b,)),
    "rolled": ("{x}.roll(1, 1)", "{x}", lambda b, s: (b, s)),
    "flipped": ("{x}.flip(1)", "{x}.flip(1)", lambda b, s: (b, s)),
    "repeated": ("torch.cat([{x}, {x}], 1)", "torch.cat([{x}, {x}], 1)", lambda b, s: (b, 2 * s)),
}
# For [N, V].
FLAT_ROW_STEPS = {
    "first_left_out": ("{x}[1:]", "{x}[1:]", lambda n: (n - 1,)),
    "last_left_out": ("{x}[:-1]", "{x}[:-1]", lambda n: (n - 1,)),
}
# The vocabulary from last to second of three.
TO_SECOND = {
    "permute": "{x}.permute(0, 2, 1)",
    "transpose": "{x}.transpose(1, 2)",
    "mT": "{x}.mT",
    "movedim": "{x}.movedim(-1, 1)",
    "swapaxes": "{x}.swapaxes(-1, -2)",
}

CASTS = {
    "float": "{x}.float()",
    "to_dtype": "{x}.to(torch.float32)",
    "to_keyword": "{x}.to(dtype=torch.float32)",
    "type_as": "{x}.type_as(row)",
    "contiguous": "{x}.contiguous()",
    "clone": "{x}.clone()",
    "detach": "{x}.detach()",
    "whole_vocabulary": "{x}[..., :{V}]",
}
ODD_VALUES = {
    "divided": "{x} / 0.7",
    "multiplied": "{x} * 0.5",
    "multiplied_left": "2.0 * {x}",
    "mul_method": "{x}.mul(1.5)",
    "div_function": "torch.div({x}, 2.0)",
    "added": "{x} + 0.25",
    "subtracted": "{x} - 1",
    "negated": "-{x}",
    "temperature": "{x} / scale",
    "temperature_multiplied": "scale * {x}",
    "temperature_item": "{x} * scale.detach()",
    "temperature_number": "{x} / number",
    "multiplied_by_number": "number * {x}",
    "temperature_read": "{x} / scale.item()",
    "temperature_drawn": "{x} * (0.5 + torch.rand((), dtype=torch.float64)).to({x}.dtype)",
    "softcap_by_number": "number * torch.tanh({x} / number)",
    "dropped": "{x} * (torch.rand({x}.shape, dtype=torch.float64) > 0.3)",
    "temperature_float": "({x} / scale.float()).to({x}.dtype)",
    "temperature_of_rows": "{x} / {r}.unsqueeze({v})",
    "temperature_new": "{x} / torch.tensor(0.7, dtype={x}.dtype)",
    "subtracted_from": "0.5 - {x}",
    "reciprocal": "1.0 / ({x} + 30.0)",
    "scaled_moved_scaled": "({x} * 0.5 + 1.0) / 2.0",
    "softcap_moved": "torch.tanh({x} / 3.0 + 0.25) * 3.0 - 1.0",
    "softcap_negative": "torch.tanh({x} * -0.5) * 2.0",
    "softcap_scaled": "torch.tanh({x} / 3.0) * 3.0 / 0.7",
    "softcap_sigmoid_moved": "-4.0 * torch.sigmoid(1.0 - {x}) + 1.0",
    "softcap_twice": "torch.tanh(torch.tanh({x}) * 2.0)",
    "softcap_by_tensor": "torch.tanh({x} / scale) * scale",
    "softcap_float": "(torch.tanh({x}.float() / 3.0) * 3.0).to({x}.dtype)",
    "normalised": "{x}.log_softmax({v})",
    "normalised_by_logsumexp": "{x} - {x}.logsumexp({v}, keepdim=True)",
    "log_of_softmax": "{x}.softmax({v}).log()",
    "normalised_twice": "({x}.log_softmax({v}) * 0.5).log_softmax({v})",
    "softcap": "torch.tanh({x} / 3.0) * 3.0",
    "softcap_algebraic": "3.0 * {x} * ({x} * {x} + 9.0).rsqrt()",
    "softcap_by_root": "{x} / torch.sqrt(1.0 + ({x} / 3.0).square())",
    "softcap_left": "3.0 * ({x} / 3.0).tanh()",
    "softcap_sigmoid": "3.0 * torch.sigmoid({x} / 3.0)",
    "clamped": "{x}.clamp(-2, 2)",
    "squared": "{x} * {x}.abs()",
    "bfloat16": "{x}.bfloat16()",
    "double": "{x}.double()",
    "masked_randomly": "{x}.masked_fill({x} < -1.5, -50.0)",
    "centred": "{x} - {x}.mean()",
}
# With the vocabulary last.
ODD_VALUES_BY_WORD = {
    "bias_added": "{x} + torch.linspace(-1, 1, {V}, dtype={x}.dtype)",
    "bias_subtracted": "{x} - torch.linspace(-1, 1, {V}, dtype={x}.dtype)",
    "bias_minuend": "torch.linspace(-1, 1, {V}, dtype={x}.dtype) - {x}",
    "bias_of_more_dims": "{x} + torch.linspace(-1, 1, {V}, dtype={x}.dtype)[None, :]",
    "bias_integers": "{x} + torch.arange({V}) % 3",
    "row_temperature_detached": "{x} / {r}.detach().unsqueeze(-1)",
    "row_added": "{x} + {r}.unsqueeze(-1)",
    "word_temperature": "{x} * torch.linspace(0.5, 2, {V}, dtype={x}.dtype)",
    "masked_finfo": "{x}.masked_fill(torch.arange({V}) >= {V} - 3, torch.finfo({x}.dtype).min)",
    "masked_in_the_middle": "{x}.masked_fill(torch.arange({V}) == {V} - 3, float('-inf'))",
    "masked_little": "{x}.masked_fill(torch.arange({V}) >= {V} - 3, -9.0)",
    "masked_and_scaled": "{x}.masked_fill(torch.arange({V}) >= {V} - 3, float('-inf')) * 0.5",
    "masked_and_moved": "{x}.masked_fill(torch.arange({V}) >= {V} - 3, float('-inf')) + 2.0",
    "masked_and_negated": "-((-{x}).masked_fill(torch.arange({V}) >= {V} - 3, float('inf')))",
    "row_temperature": "{x} / {r}.unsqueeze(-1)",
    "row_temperature_none": "{x} * {r}[..., None]",
    "masked_suffix": "{x}.masked_fill(torch.arange({V}) >= {V} - 3, float('-inf'))",
    "masked_where": "torch.where(torch.arange({V}) < {V} - 3, {x}, -1e4)",
    "masked_where_left": "torch.where(torch.arange({V})[None] % 3 == 1, -1.5, {x})",
    "masked_where_method": "{x}.where(torch.arange({V}) % 3 > 0, torch.tensor(-2.0).to({x}))",
    "masked_where_full": "torch.where(torch.arange({V}) % 4 == 1, torch.full_like({x}, -2), {x})",
    "masked_where_words": (
        "torch.where(torch.arange({V}) > 4, torch.linspace(-1, 1, {V}, dtype={x}.dtype), {x})"
    ),
    "masked_where_rows": "torch.where({r}.unsqueeze(-1) > 0.7, {x}, -2.0)",
    "masked_index_fill": "{x}.index_fill(-1, torch.tensor([1, 4, -2]), float('-inf'))",
    "masked_index_fill_tensor": "torch.index_fill({x}, -1, torch.arange(2, 5), torch.tensor(-3.0))",
    "masked_fill_tensor": "{x}.masked_fill(torch.arange({V}) < 4, torch.tensor(0.5))",
    "masked_then_capped": "torch.tanh({x}.masked_fill(torch.arange({V}) % 5 == 2, -4.0)) * 2.0",
    "masked_then_biased": (
        "{x}.masked_fill(torch.arange({V}) % 5 == 2, -4.0)"
        " + torch.linspace(-1, 1, {V}, dtype={x}.dtype)"
    ),
    "masked_twice": (
        "{x}.masked_fill(torch.arange({V}) < 4, -3.0).masked_fill(torch.arange({V}) > 2, -1e4)"
    ),
    "masked_added": "{x} + torch.where(torch.arange({V}) < {V} - 3, 0.0, -1e4).to({x}.dtype)",
    "centred_rows": "{x} - {x}.amax(-1, keepdim=True)",
    "vocabulary_prefix": "{x}[..., : {V} - 3]",
    "vocabulary_narrowed": "{x}.narrow(-1, 0, {V} - 3)",
    "vocabulary_suffix": "{x}[..., 3:]",
    "vocabulary_flipped": "{x}.flip(-1)",
}
SHORTENING = ("vocabulary_prefix", "vocabulary_narrowed", "vocabulary_suffix")

# Statements that write to logits.
LOGITS_WRITES = {
    "div_": "{x}.div_(0.7)",
    "mul_": "{x}.mul_(1.5)",
    "mul_scale_": "{x}.mul_(scale)",
    "add_": "{x}.add_(0.5)",
    "sub_": "{x}.sub_(0.5)",
    "neg_": "{x}.neg_()",
    "sigmoid_": "{x}.sigmoid_().mul_(4.0)",
    "softcap_": "{x}.div_(3.0).tanh_().mul_(3.0)",
    "softcap_iadd": "{x} /= 3.0\ntorch.tanh_({x})\n{x} *= 3.0",
    "mul_by_itself": "{x}.mul_({x}.detach().abs().amax())",
    "div_rows_": "{x}.div_(scale.detach())",
    "div_by_rows_": "{x}.div_({r}.detach().unsqueeze({v}))",
    "mul_by_rows_": "{x} *= {r}.detach().unsqueeze({v})",
    "add_alpha_": "{x}.add_(0.5, alpha=2)",
    "add_itself_": "{x}.add_({x})",
    "div_rounding_": "{x}.div_(0.5, rounding_mode='floor')",
    "no_grad_mul_": "with torch.no_grad():\n    {x}.mul_(0.5)",
    "no_grad_add_": "with torch.no_grad():\n    {x}.add_(1.0)",
    "pieces_": "for part in {x}.chunk(2):\n    part.mul_(0.5)",
    "unbound_": "for part in {x}.unbind(0):\n    part.add_(0.25)",
    "split_first_": "{x}.split(2)[0].div_(2.0)",
    "setitem_all": "{x}[:] = {x} * 0.5",
    "iadd": "{x} += 1.0",
    "itruediv": "{x} /= 2.0",
    "tanh_": "{x}.tanh_()",
    "clamp_": "{x}.clamp_(-2, 2)",
    "copy_": "{x}.copy_({x} * 2)",
    "fill_": "{x}.fill_(0.5)",
    "relu_": "F.relu({x}, inplace=True)",
    "setitem_word": "{x}[..., 0] = 0.5",
    "setitem_slice": "{x}[..., 2:5] = 0.25",
    "setitem_first": "{x}[0] = 0.25",
    "write_to_select": "{x}.select(0, 0).mul_(0.5)",
    "write_to_slice": "{x}[..., 1:3].mul_(0.5)",
    "write_to_reshaped": "{x}.reshape(-1)[3:5].fill_(0.5)",
    "write_to_detached": "{x}.detach().mul_(0.5)",
    "index_fill_": "{x}.index_fill_(-1, torch.tensor([1]), 0.5)",
}
# What shares the memory of logits {x}, to be written to instead.
WRITTEN_NAMES = {
    "view_as": "{x}.view_as({x})",
    "moved": "{x}.transpose(0, 1)",
    "detached": "{x}.detach()",
    "everything": "{x}[...]",
    "first": "{x}[0]",
    "all_but_last": "{x}[:-1]",
    "from_second": "{x}[1:]",
    "second_dim": "{x}[:, 1:]",
    "one_axis_more": "{x}.unsqueeze(0)",
    "flat": "{x}.view(-1)",
    "reshaped": "{x}.reshape(-1, {x}.size(-1))",
    "piece": "{x}.chunk(2)[-1]",
    "same_dtype": "{x}.to({x}.dtype)",
    "contiguous": "{x}.contiguous()",
}
LOGITS_WRITES_BY_WORD = {
    "masked_fill_infinite": (
        "{x}.masked_fill_(torch.arange({x}.size(-1)) >= {x}.size(-1) - 3, float('-inf'))"
    ),
    "setitem_infinite": "{x}[..., -3:] = float('-inf')",
    "setitem_from_start": "{x}[..., {x}.size(-1) - 3 :] = float('-inf')",
    "setitem_mask": "{x}[..., torch.arange({x}.size(-1)) >= {x}.size(-1) - 3] = float('-inf')",
    "bias_added_": "{x}.add_(torch.linspace(-1, 1, {x}.size(-1), dtype={x}.dtype))",
    "bias_iadd": "{x} += torch.linspace(-1, 1, {x}.size(-1), dtype={x}.dtype)",
    "setitem_prefix": "{x}[..., :2] = -1e4",
    "narrow_filled": "{x}.narrow(-1, {x}.size(-1) - 3, 3).fill_(float('-inf'))",
    "masked_fill_": "{x}.masked_fill_(torch.arange({x}.size(-1)) >= {x}.size(-1) - 3, -1e4)",
    "setitem_suffix": "{x}[..., -3:] = -1e4",
    "setitem_one_word": "{x}[..., 7] = float('-inf')",
    "setitem_list": "{x}[..., [1, 4, -2]] = -2.0",
    "setitem_words": "{x}[..., torch.tensor([1, 4, -2])] = -2.0",
    "setitem_bool": "{x}[..., torch.arange({x}.size(-1)) % 3 == 1] = torch.tensor(-2.0).to({x})",
    "setitem_middle": "{x}[..., 4:9] = -3.0",
    "setitem_stepped": "{x}[..., ::3] = -3.0",
    "index_fill_words_": "{x}.index_fill_(-1, torch.tensor([1, 4, -2]), -2.0)",
    "part_filled": "{x}[..., 4:9].fill_(-3.0)",
    "part_zeroed": "{x}.narrow(-1, 2, 3).zero_()",
}
# Writes that autograd allows after a head whose weight needs no gradient ...
HIDDEN_WRITES = {
    "hidden_mul_": "hidden.mul_(0.5)",
    "hidden_isub": "hidden -= 0.5",
    "hidden_setitem_later": "hidden[:, 0] = 0.25",
    "hidden_view_written": "hidden.view(-1)[:3].fill_(0.5)",
    "hidden_row_written": "hidden[0].add_(1.0)",
    "hidden_swapped": "hidden.copy_(hidden.flip(0))",
}
# ... whose hidden states need none ...
WEIGHT_WRITES = {
    "weight_mul_": "weight.mul_(1.1)",
    "weight_row_zeroed": "weight[0].zero_()",
    "weight_view_written": "weight.t().add_(0.1)",
}
# ... and always.
OTHER_WRITES = {
    "bias_add_": "bias.add_(0.5)",
    "bias_view_written": "bias[1:3].mul_(2.0)",
    "row_written": "row.mul_(0.5)",
    "scale_written": "scale.add_(0.25)",
    "unrelated_written": "count = torch.zeros(3)\ncount.add_(1.0)\ncount[0] = 2.0",
}
TARGET_WRITES = {
    "target_first_written": "{y}[0] = 2",
    "target_clamped": "{y}.clamp_(max=4)",
    "target_masked": "{y}.masked_fill_({y} > 5, {ignored})",
    "target_last_ignored": "{y}[..., -1:] = {ignored}",
    "target_argument_written": "target[:, 0] = 3",
}

# Values: of logits, beside the loss.
# Other targets, made of the logits {x} or of the targets {y}.
LABELS = {
    "argmax": "{x}.argmax({v})",
    "argmax_detached": "{x}.detach().argmax(dim={v})",
    "max_indices": "{x}.detach().max({v})[1]",
    "where_likely": "torch.where({x}.detach().amax({v}) > 0.5, {y}, {ignored})",
    "clamped": "{y}.clamp(max=3)",
    "clamped_low": "{y}.clamp(min=0)",
    "where_row": "torch.where({r} > 0.6, {y}, {ignored})",
    "cloned": "{y}.clone()",
    "drawn": "torch.randint_like({y}, {V})",
    "where_drawn": "torch.where(torch.rand({y}.shape, dtype=torch.float64) > 0.5, {y}, {ignored})",
}

READERS = {
    "maximum": "{x}.detach().amax()",
    "square": "{x}.float().square().mean()",
    "norm": "{x}.norm()",
    "size": "torch.ones({x}.size(0)).sum()",
    "zeros_like": "torch.zeros_like({x}).sum()",
    "drawn": "torch.rand(3, dtype=torch.float64).sum()",
}
READERS_BY_WORD = {
    "accuracy": "({x}.argmax(-1) == {y}).float().mean()",
    "entropy": "-({x}.softmax(-1) * {x}.log_softmax(-1)).sum(-1).mean().detach()",
    "z_loss": "1e-2 * torch.logsumexp({x}, -1).square().mean()",
    "top_words": "{x}.topk(2, -1).values.sum(-1).mean()",
}

# Numbers of each row of logits {x}, as a training step logs them.
MEASURES = {
    "argmax": "{x}.argmax({v})",
    "argmax_keepdim": "torch.argmax({x}, {v}, keepdim=True)",
    "accuracy": "({x}.argmax({v}) == {y}).float().mean()",
    "counted_accuracy": "(({x}.argmax({v}) == {y}) & ({y} != {ignored})).sum()",
    "max_values": "{x}.max({v}).values",
    "max_indices": "{x}.max({v})[1]",
    "max_sum": "sum({x}.max({v}))",
    "amax": "{x}.amax({v}, keepdim=True)",
    "amax_list": "torch.amax({x}, [{v}])",
    "logsumexp": "{x}.logsumexp({v})",
    "logsumexp_keepdim": "torch.logsumexp({x}, {v}, keepdim=True)",
    "logsumexp_mean": "{x}.float().logsumexp(dim={v}).square().mean()",
    "entropy": "-({x}.softmax({v}) * {x}.log_softmax({v})).sum({v})",
    "entropy_float": (
        "-(F.softmax({x}.float(), {v}) * F.log_softmax({x}.float(), {v})).sum({v}).mean()"
    ),
    "entropy_from_logits": ("{x}.logsumexp({v}) - (torch.softmax({x}, {v}) * {x}).sum({v})"),
    "negative_entropy": "(2 * {x}.softmax({v}) * {x}.log_softmax({v})).sum({v}, keepdim=True)",
    "total": "{x}.sum()",
    "total_of_log_probabilities": "{x}.log_softmax({v}).mean()",
    "total_of_part": "{x}[1:].mean()",
    "total_of_log_probabilities_of_part": "{x}[:1].log_softmax({v}).sum()",
    "total_entropy_of_part": "-({x}[1:].softmax({v}) * {x}[1:].log_softmax({v})).mean()",
    "logsumexp_of_part": "{x}[:1].logsumexp({v}).sum()",
    "log_probability_argmax": "{x}.log_softmax({v}).argmax({v})",
    "probability_argmax": "{x}.softmax({v}).argmax({v})",
    "negative_argmax": "(-{x}).argmax({v})",
    "confidence": "{x}.softmax({v}).amax({v})",
    "chosen_word": "{x}.gather({v}, {y}.clamp(min=0).unsqueeze({v})).squeeze({v})",
    "chosen_log_probability": (
        "-2 * {x}.log_softmax({v}).gather({v}, {y}.clamp(min=0).unsqueeze({v})).squeeze({v})"
    ),
    "other_loss": (
        "F.cross_entropy({x}.movedim({v}, -1).flatten(0, -2), {y}.clamp(min=0).flatten())"
    ),
    "size": "{x}.new_zeros({x}.size(0)) + {x}.size({v})",
    "dtype": "torch.ones(3).to({x})",
}
# Added to the loss, gradient and all.
LOSSES_BESIDE = {
    "z_loss": "1e-2 * torch.logsumexp({x}, {v}).square().mean()",
    "z_loss_keepdim": "0.1 * ({x}.logsumexp({v}, keepdim=True) ** 2).sum()",
    "z_loss_of_counted": (
        "(({x}.logsumexp({v}) ** 2) * ({y} != {ignored})).sum() / ({y} != {ignored}).sum()"
    ),
    "z_loss_float": "1e-2 * {x}.float().logsumexp({v}).pow(2).mean()",
    "z_loss_scaled": "torch.logsumexp(0.5 * {x} + 1.0, {v}).mean()",
    "entropy_bonus": "0.1 * ({x}.softmax({v}) * {x}.log_softmax({v})).sum({v}).mean()",
    "target_logits": "0.1 * {x}.gather({v}, {y}.clamp(min=0).unsqueeze({v})).square().mean()",
    "max_logit": "0.01 * {x}.amax({v}).mean()",
    "z_loss_weighted": "1e-2 * ({x}.logsumexp({v}) * {r}.detach()).square().mean()",
    "z_loss_filled": "1e-2 * {x}.logsumexp({v}).masked_fill({y} == {ignored}, 0.0).pow(2).sum()",
    "z_loss_of_one_row": "1e-2 * (-{x}.logsumexp({v}).reshape(-1)[:1]).square().sum()",
    "z_loss_by_number": "0.1 * number * {x}.logsumexp({v}).square().mean()",
}

CROSS_ENTROPIES = {
    "cross_entropy": "F.cross_entropy({x}, {y}{options})",
    "cross_entropy_module": "nn.CrossEntropyLoss({only_options})({x}, {y})",
    "cross_entropy_keywords": "F.cross_entropy(input={x}, target={y}{options})",
}
NLL_LOSSES = {
    "nll": "F.nll_loss(F.log_softmax({x}, {dim}), {y}{options})",
    "nll_method": "F.nll_loss({x}.log_softmax({dim}), {y}{options})",
    "nll_torch": "F.nll_loss(torch.log_softmax({x}, dim={dim}), {y}{options})",
    "nll_module": "nn.NLLLoss({only_options})(nn.LogSoftmax(dim={dim})({x}), {y})",
    "nll_dtype": "F.nll_loss(F.log_softmax({x}, {dim}, dtype=torch.float32), {y}{options})",
    "nll_softmax_log": "F.nll_loss(torch.log(F.softmax({x}, {dim})), {y}{options})",
}
# Log-probabilities of the targets {c}, which are classes, with the vocabulary last.
TOKEN_LOG_PROBABILITIES = {
    "gather": "F.log_softmax({x}, -1).gather(-1, {c}.unsqueeze(-1)).squeeze(-1)",
    "gather_function": "torch.gather({x}.log_softmax(-1), -1, {c}[..., None])[..., 0]",
    "gather_keywords": "{x}.log_softmax(dim=-1).gather(dim=-1, index={c}[..., None]).squeeze(-1)",
    "take_along_dim": "torch.take_along_dim(F.log_softmax({x}, -1), {c}[..., None], -1)[..., 0]",
    "one_hot": "(F.one_hot({c}, {V}) * F.log_softmax({x}, -1)).sum(-1)",
    "softmax_log": "F.softmax({x}, -1).log().gather(-1, {c}.unsqueeze(-1)).squeeze(-1)",
    "logsumexp": "{x}.gather(-1, {c}.unsqueeze(-1)).squeeze(-1) - {x}.logsumexp(-1)",
    "normalised": "({x} - {x}.logsumexp(-1, keepdim=True)).gather(-1, {c}[..., None]).squeeze(-1)",
    "categorical": "torch.distributions.Categorical(logits={x}).log_prob({c})",
    "categorical_unchecked": (
        "torch.distributions.Categorical(logits={x}, validate_args=False).log_prob({c})"
    ),
    "one_hot_of_logits": "({x} * F.one_hot({c}, {V})).sum(-1) - {x}.logsumexp(-1)",
    "one_hot_keepdim": (
        "(F.one_hot({c}, {V}).to({x}.dtype) * {x}.log_softmax(-1)).sum(-1, keepdim=True)[..., 0]"
    ),
    "selective": (
        "{x}.gather(-1, {c}.unsqueeze(-1)).squeeze(-1)"
        " - torch.stack([a.logsumexp(-1) for a in {x}])"
    ),
    "selective_split": (
        "torch.cat([a.gather(-1, b[..., None])[..., 0] - a.logsumexp(-1)"
        " for a, b in zip({x}.split(2), {c}.split(2))])"
    ),
    "selective_chunks": (
        "torch.cat([a.log_softmax(-1).gather(-1, b[..., None])[..., 0]"
        " for a, b in zip({x}.chunk(3), {c}.chunk(3))])"
    ),
    "cross_entropy_none": (
        "-F.cross_entropy({x}.reshape(-1, {V}), {c}.reshape(-1), reduction='none').view({c}.shape)"
    ),
    "scaled_log_probabilities": "(F.log_softmax({x}, -1) * 0.5).gather(-1, {c}[..., None])[..., 0]",
    "by_sequence": (
        "torch.stack([F.log_softmax(a, -1).gather(-1, b.unsqueeze(-1)).squeeze(-1)"
        " for a, b in zip({x}, {c})])"
    ),
}
FLAT_TOKEN_LOG_PROBABILITIES = {
    "arange": "F.log_softmax({x}, -1)[torch.arange({x}.size(0)), {c}]",
    "arange_from_the_end": "F.log_softmax({x}, -1)[torch.arange({x}.size(0)), {c} - {V}]",
    "arange_mixed": "F.log_softmax({x}, -1)[range({x}.size(0)), {c} - {V} * ({c} % 2)]",
}
# The loss of the per-token losses {t}.
REDUCTIONS = {
    "mean_of_last": "{t}.mean(-1).sum()",
    "mean_of_first": "({t} * {r}).mean(0).sum()",
    "keepdim": "({t} * {r}.detach()).sum(-1, keepdim=True).mean()",
    "by_sequence": "(({t} * {r}.detach()).sum(-1) / {r}.detach().sum(-1)).mean()",
    "by_sequence_keepdim": (
        "(({t} * {r}.detach()).sum(-1, keepdim=True) / {r}.detach().sum(-1, keepdim=True)).mean()"
    ),
    "by_sequence_masked": (
        "(({t} * ({y} != {ignored})).sum(-1) / ({y} != {ignored}).sum(-1).clamp(min=1)).mean()"
    ),
    "by_first": "(({t} * {r}.detach()).sum(0) / {r}.detach().sum(0)).sum()",
    "masked_zeros_like": "torch.where({y} == {ignored}, torch.zeros_like({t}), {t}).sum() / 7",
    "masked_fill": "{t}.masked_fill({y} == {ignored}, 0.0).sum()",
    "masked_twice": "(({t} * ({y} != {ignored})) * {r}.detach()).sum() / ({y} != {ignored}).sum()",
    "masked_float": "(({y} != {ignored}).float() * {t}.float()).sum()",
    "weighted_known": "({t} * {r}.detach()).sum() / {r}.detach().sum()",
    "weighted_negative": "-(({t} * 2) * -{r}.detach()).mean()",
    "divided_rows": "({t} / {r}.detach()).mean()",
    "divided_first": "({t} / 3).sum() / 2",
    "one_factor_for_sequence": "({t} * {r}.detach()[..., :1]).sum()",
    "rows_repeated": "({t} * {r}.detach().unsqueeze(0)).sum()",
    "sum_of_means": "{t}.mean((0,), keepdim=True).sum()",
    "reshaped": "({t}.reshape(-1) * {r}.detach().reshape(-1)).mean()",
    "reshaped_to_column": "({t}.reshape(-1, 1) * {r}.detach().reshape(-1, 1)).sum(0).mean()",
    "part_of_rows": "{t}[..., 1:].sum()",
    "normalised_by_itself": "({t} * {t}.detach()).mean()",
    "divides": "({r}.detach() / (1 + {t})).mean()",
    "cumulative": "{t}.cumsum(-1).mean()",
    "double": "{t}.double().mean()",
    "written_before": "{t}.mul_({r}.detach()).sum()",
    "baseline": "(({t} - {t}.mean().detach()) * {r}.detach()).mean()",
    "mean": "{t}.mean()",
    "sum": "{t}.sum()",
    "weighted": "({t} * {r}).sum()",
    "weighted_mean": "({t} * {r}).sum() / {r}.sum()",
    "masked": "({t} * ({y} != {ignored})).sum() / ({y} != {ignored}).sum()",
    "masked_where": "torch.where({y} != {ignored}, {t}, 0.0).sum()",
    "divided_by_number": "{t}.sum() / 7",
    "divided_by_scale": "{t}.sum() / scale",
    "squares": "{t}.square().mean()",
    "likelihood": "-(-{t}).exp().mean()",
    "focal": "((1 - (-{t}).exp()) ** 2 * {t}).mean()",
    "preference": "-F.logsigmoid(0.5 * ({t}.reshape(-1)[1::2].sum() - {t}.reshape(-1)[::2].sum()))",
    "clipped_ratio": (
        "-torch.min(torch.exp(0.9 * {t}.detach() - {t}) * {r},"
        " torch.exp(0.9 * {t}.detach() - {t}).clamp(0.8, 1.2) * {r}).mean()"
    ),
    "selected": "{t}[{y} != {ignored}].sum()",
    "selected_weighted": "({t}[{y} != {ignored}] * {r}.detach()[{y} != {ignored}]).sum() / 7",
    "dot": "torch.dot({t}.reshape(-1), {r}.detach().reshape(-1).to({t}.dtype))",
    "einsum": "torch.einsum('i,i->', {r}.detach().flatten().to({t}.dtype), {t}.flatten())",
    "product_with_rows": "({t}.reshape(1, -1) @ {r}.detach().reshape(-1).to({t}.dtype)).sum()",
    "product_with_groups": (
        "({t}.reshape(1, -1) @ F.one_hot({y}.reshape(-1) % 3, 3).to({t}.dtype)).mean() / 7"
    ),
    "indexed": "{t}.reshape(-1)[torch.tensor([0, 0, -1])].mean()",
    "index_selected": "{t}.index_select(0, torch.tensor([0, 0])).mean()",
    "gathered": "{t}.gather(-1, torch.zeros_like({y})).mean()",
    "packed": (
        "({t}.new_zeros(2).index_add(0, {y}.reshape(-1) % 2, {t}.reshape(-1))"
        " / torch.tensor([3, 4])).sum()"
    ),
    "packed_in_place": (
        "torch.zeros(3, dtype={t}.dtype)"
        ".scatter_add_(0, {y}.reshape(-1) % 3, {t}.reshape(-1)).mean()"
    ),
    "stacked_means": "torch.stack([part.mean() for part in {t}.chunk(2)]).mean()",
    "worst": "{t}.max()",
}
# Statements that write to the per-token losses {t} before.
TOKEN_WRITES = {
    "masked_in_place": "{t}.mul_({y} != {ignored})",
    "divided_in_place": "{t} /= 2",
    "filled_in_place": "{t}.masked_fill_({r} > 0.5, 0.0)",
    "set_by_mask": "{t}[{y} == {ignored}] = 0.0",
    "set_first": "{t}[..., 0] = 0.5",
    "view_written": "{t}.reshape(-1)[:1].mul_(2)",
    "detached_written": "{t}.detach().mul_(0.5)",
    "written_without_gradient": "with torch.no_grad():\n    {t}.add_(1.0)",
}
# Other per-token losses of the same shape.
TOKEN_STEPS = {
    "masked_fill": "{t}.masked_fill({r} > 0.5, 0.0)",
    "where": "torch.where({r} > 0.5, {t}, 0.1 * {t})",
    "cat": "torch.cat([{t}[..., :1], {t}[..., 1:]], -1)",
    "stack": "torch.stack(list({t}))",
    "index_add": "torch.zeros_like({t}).index_add(0, torch.arange({t}.size(0)), {t})",
    "scatter_add": "torch.zeros_like({t}).scatter_add(-1, torch.zeros_like({y}), {t})",
    "put": "torch.zeros_like({t}).add_({t})",
    "expanded": "{t}.unsqueeze(0).expand(2, *{t}.shape)[1]",
    "half": "{t}.bfloat16()",
    "times_number": "{t} * number",
    "times_drawn": "{t} * torch.rand({t}.shape, dtype=torch.float64).to({t}.dtype)",
}
# What a training step logs of them, without a gradient.
TOKEN_MEASURES = {
    "worst_token": "{t}.amax()",
    "perplexity": "{t}.mean().exp()",
    "counted": "({t} * ({y} != {ignored})).sum(-1)",
    "by_group": "{t}.new_zeros(2).index_add_(0, {y}.reshape(-1) % 2, {t}.reshape(-1))",
}
# What becomes of the loss at the end.
FACTORS = {
    "divided": "loss = loss / 4",
    "doubled": "loss = loss * 2",
    "float": "loss = loss.float()",
    "divided_in_place": "loss /= 4",
    "multiplied_in_place": "loss.mul_(0.75)",
    "fraction": "loss = (loss * 3 / 7).reshape(1).sum()",
    "negated": "loss = 1 - loss * scale.detach()",
    "stacked": "loss = torch.stack([loss, loss.detach()]).mean()",
    "total": "total = torch.zeros((), dtype=loss.dtype)\ntotal += loss\nloss = total * 0.5",
    "tanh": "loss = torch.tanh(loss / 8) * 8",
    "number": "loss = loss * number",
    "read": "loss = loss / scale.item()",
}
LOOPS = {
    "split": "zip({x}.split(2), {y}.split(2))",
    "chunk": "zip({x}.chunk(3), {y}.chunk(3))",
    "tensor_split": "zip(torch.tensor_split({x}, 2), torch.tensor_split({y}, 2))",
    "slices": "(({x}[i : i + 2], {y}[i : i + 2]) for i in range(0, {x}.size(0), 2))",
}
# What becomes of each piece before its loss.
PIECES = {
    "as_is": "part",
    "float": "part.float()",
    "halved": "part * 0.5",
    "temperature": "part / scale",
    "softcap": "torch.tanh(part / 2.0) * 2.0",
    "contiguous": "part.contiguous()",
}
PIECE_LOSSES = {
    "sum": "F.cross_entropy({p}, labels, reduction='sum'{ignoring})",
    "mean": "F.cross_entropy({p}, labels{ignoring})",
    "none": "F.cross_entropy({p}, labels, reduction='none'{ignoring}).sum()",
    "nll": "F.nll_loss({p}.log_softmax(1), labels, reduction='sum'{ignoring})",
    "gathered": "-{p}.log_softmax(1).gather(1, labels.clamp(min=0)[:, None]).mean()",
    "z_loss": (
        "F.cross_entropy({p}, labels, reduction='sum'{ignoring})"
        " + 0.1 * {p}.logsumexp(1).square().sum()"
    ),
}
UNBINDING = {"unbind": "zip({x}.unbind(0), {y}.unbind(0))", "iterated": "zip({x}, {y})"}
# A head for each piece of the hidden states.
HEAD_LOOPS = {
    "split": "zip({h}.split(2), {y}.split(2))",
    "chunk": "zip({h}.chunk(3), {y}.chunk(3))",
    "slices": "(({h}[i : i + 1], {y}[i : i + 1]) for i in range({h}.size(0)))",
}
HEAD_PIECES = {
    "linear": "F.linear(part, {w})",
    "matmul": "part @ {wt}",
    "cast": "F.linear(part.float(), {w}.float())",
    "weight_scaled": "F.linear(part, {w} * 0.5)",
    "bias": "F.linear(part, {w}, {b})",
}

REGIONS = {
    "autocast": "with torch.autocast('cpu', torch.bfloat16):",
    "autocast_off": "with torch.autocast('cpu', enabled=False):",
    "no_grad": "with torch.no_grad():",
    "inference_mode": "with torch.inference_mode():",
    "enable_grad": "with torch.enable_grad():",
}
# What of the logits {x} is returned.
RETURNED_LOGITS = {
    "logits": "{x}",
    "logits_float": "{x}.float()",
    "logits_detached": "{x}.detach()",
    "logits_row": "{x}[0]",
    "logits_last": "{x}[..., -1:, :]",
    "logits_scaled": "{x} * 2",
    "logits_capped": "torch.tanh({x})",
    "logits_argmax": "{x}.argmax(-1)",
    "logits_added": "{x} + 0.25",
    "logits_divided": "{x} / 0.7",
    "logits_softcapped": "3.0 * torch.tanh({x} / 3.0)",
    "logits_biased": "{x} + {x}.new_ones({x}.size(-1))",
    "logits_cut": "{x}[..., :-3]",
    "logits_flat": "{x}.reshape(-1, {x}.size(-1))",
    "logits_temperature": "{x} / scale",
    "logits_masked": "{x}.masked_fill(torch.arange({x}.size(-1)) > 9, float('-inf'))",
    "logits_moved": "{x}.transpose(0, 1)",
    "logits_piece": "{x}.chunk(2)[0]",
    "log_probabilities": "F.log_softmax({x}, -1)",
    "logits_shape": "{x}.size(0)",
}
