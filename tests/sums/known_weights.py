"""Sums of which it is known in the forward what each row counts for.

Each is a function of logits ``[B, S, V]`` and target ``[B, S]``.
"""

import torch
import torch.nn.functional as F

from .. import forms
from .parts import in_one_row, kept, losses_of_rows, metrics, nll_by_hand, per_token

KNOWN = {
    "z_loss": lambda z, y: forms.flat(z, y) + 1e-2 * z.logsumexp(-1).pow(2).mean(),
    "z_loss_of_counted": lambda z, y: (
        forms.flat(z, y, ignore_index=3)
        + 1e-2 * (z.logsumexp(-1).square() * (y != 3)).sum() / (y != 3).sum()
    ),
    "z_loss_by_row": lambda z, y: (
        ((per_token(z, y) + 1e-2 * torch.logsumexp(z, -1) ** 2) * kept(y)).sum() / kept(y).sum()
    ),
    "z_loss_kept_dim": lambda z, y: (
        forms.flat(z, y, reduction="sum") - torch.logsumexp(z, -1, keepdim=True).square().sum() / 9
    ),
    "z_loss_of_a_product": lambda z, y: (
        (lambda lse: lse * lse)(z.logsumexp(-1)).mean() * 0.1
        + (z.logsumexp(-1).float() ** 2.0).mean(1).sum()
        + forms.flat(z, y)
    ),
    "z_loss_moved": lambda z, y: (
        forms.flat(3 * torch.tanh(z / 3) + 2, y)
        + (3 * torch.tanh(z / 3) + 2).logsumexp(-1).square().mean()
    ),
    "z_loss_alone": lambda z, y: z.logsumexp(-1).square().mean(),
    "z_loss_of_other_rows": lambda z, y: (
        nll_by_hand(z[1:], y[1:]).sum() + z[:, 2:].logsumexp(-1).square().sum()
    ),
    "z_loss_and_a_frozen_loss": lambda z, y: (
        z.logsumexp(-1).square().mean() + forms.flat(z.detach(), y, ignore_index=3)
    ),
    "with_a_measure": lambda z, y: (
        forms.flat(z, y) + 1e-2 * z.logsumexp(-1).pow(2).mean() + z.detach().amax(-1).mean()
    ),
    "measured_later": lambda z, y: (
        forms.flat(z, y) + 1e-2 * z.logsumexp(-1).pow(2).mean(),
        (z.argmax(-1) == y).float().mean(),
    ),
    "logsumexp_mean": lambda z, y: forms.flat(z, y) + 0.1 * z.logsumexp(-1).mean(),
    "by_hand": lambda z, y: nll_by_hand(z, y).mean(),
    "by_hand_masked": lambda z, y: -(-nll_by_hand(z, y) * kept(y)).sum() / kept(y).sum(),
    "by_hand_and_z_loss": lambda z, y: (
        nll_by_hand(z, y).mean() + 1e-2 * z.logsumexp(-1).square().mean()
    ),
    "gathered_masked": lambda z, y: (
        -(z.log_softmax(-1).gather(-1, y.unsqueeze(-1))[..., 0] * kept(y)).sum() / kept(y).sum()
    ),
    "gathered_kept_dim": lambda z, y: -z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).sum(1).mean(),
    "some_of_the_losses": lambda z, y: (per_token(z, y)[:, 1:] * kept(y)[:, 1:]).mean(),
    "every_other": lambda z, y: per_token(z, y).view(-1)[1::2].view(2, -1)[:, None].sum(2).mean(),
    "one_row_of_losses": lambda z, y: per_token(z, y)[1].sum() / 3 + per_token(z, y)[0, 2:].mean(),
    "logged_by_row": lambda z, y: (
        lambda losses: ((losses * kept(y)).sum() / kept(y).sum(), *metrics(losses, y))
    )(per_token(z, y)),
    "mean_over_no_dim_is_over_all": lambda z, y: per_token(z, y).mean(dim=[]),
    "weighted_before_the_square": lambda z, y: (
        forms.flat(z, y) + (kept(y) * z.logsumexp(-1)).square().mean()
    ),
    "negated_masked_and_sliced_before_the_square": lambda z, y: (
        forms.flat(z, y)
        + (-0.1 * z.logsumexp(-1)).masked_fill(y > 40, 0)[:, 1:].pow(2).mul(kept(y)[:, 1:]).sum()
    ),
    "rows_of_losses_added_to_groups": lambda z, y: (
        per_token(z, y).new_zeros(2, y.size(1)).index_add(0, y[:, 0] % 2, per_token(z, y))
        / torch.arange(1, 3)[:, None]
    ).sum(),
    "logged_sum": lambda z, y: (
        lambda total: (total / y.numel(), total.detach(), total.exp().detach())
    )(per_token(z, y).sum()),
}


def measured_without_gradient(z, y):
    loss, lse = forms.flat(z, y), z.logsumexp(-1)
    with torch.no_grad():
        accuracy = (z.argmax(-1) == y).float().mean()
        scaled = lse.mean() * 2
    return loss + 1e-2 * lse.pow(2).mean(), accuracy, scaled


def weighted_without_gradient(z, y):
    losses = per_token(z, y)
    with torch.no_grad():
        weights = kept(y) / kept(y).sum()
    return (losses * weights).sum(), losses.detach().amax(1)


def judged_without_gradient(z, y):
    losses = per_token(z, y)
    with torch.no_grad():
        worst = losses.amax(1)
    weights = kept(y) / kept(y).sum()
    return (losses * weights).sum(), worst


def judged_and_weighted_without_gradient(z, y):
    losses, lse = per_token(z, y), z.logsumexp(-1)
    with torch.no_grad():
        worst = losses.amax(1) - lse.amax()
        weights = kept(y) / kept(y).sum()
    return (losses * weights).sum() + lse.pow(2).mean(), worst.exp()


def viewed_as_the_target_is_not(z, y):
    losses = F.cross_entropy(z.permute(1, 2, 0), y.t(), reduction="none")
    return losses.view(-1).sum() / 4, losses.detach().amax()


KNOWN |= {
    f.__name__: f
    for f in (
        measured_without_gradient,
        weighted_without_gradient,
        judged_without_gradient,
        judged_and_weighted_without_gradient,
        viewed_as_the_target_is_not,
    )
}


def weights_written_afterwards(z, y):
    losses, weights = per_token(z, y), kept(y)
    worst = losses.detach().amax()
    weights.mul_(0.5)
    return (losses * weights).sum(), worst


def sum_of_two_names(z, y):
    losses, worst = per_token(z, y), per_token(z, y).detach().amax()
    total = other_name = torch.zeros(y.shape)
    total += losses
    return total.sum() + 3 * other_name.sum() + losses.detach().amax(), worst


def masked_in_place(z, y):
    losses = per_token(z, y)
    losses.mul_(kept(y))
    losses.div_(kept(y).sum())
    return losses.sum()


def set_to_zero(z, y):
    losses, dropped = in_one_row(z, y), y.flatten() <= 20
    losses[~dropped] = 0.0
    losses[2:4] = 1
    return losses.sum() / dropped.sum()


def put_into_a_tensor(z, y):
    total = torch.zeros(y.shape)
    for number, (row, target) in enumerate(zip(z, y, strict=True)):
        total[number] = F.cross_entropy(row, target, reduction="none")
    return (total * kept(y)).sum() / kept(y).sum()


def read_before_and_after_a_write(z, y):
    losses = per_token(z, y)
    before = losses.mean()
    losses *= kept(y)
    return before + losses.sum()


def weights_made_in_place(z, y):
    losses, weights = per_token(z, y), torch.ones(y.shape)
    weights[:, 0] = 0.5
    return (losses * weights).sum() / weights.sum(), losses.detach().amax()


def mask_as_the_losses(z, y):
    losses = per_token(z, y)
    mask = (y > 20).type_as(losses)
    return (losses * mask).sum() / mask.sum(), losses.detach().amax(), mask


def weights_like_the_losses(z, y):
    losses = per_token(z, y)
    weights = torch.ones_like(losses)
    weights[y > 50] = 0.5
    return (losses * weights).sum() / weights.sum()


def counted_like_the_losses(z, y):
    losses, sequence = per_token(z, y).mean(0), torch.tensor([0, 0, 0, 1, 1, 2, 2])
    zeros = losses.new_zeros(3)
    counts = zeros.index_add(0, sequence, torch.ones_like(losses))
    return (zeros.index_add(0, sequence, losses) / counts).sum() / losses.numel()


def packed_by_index_add(z, y):
    sequence = torch.arange(y.numel()) // 8
    losses = in_one_row(z, y)
    totals = torch.zeros(3, dtype=losses.dtype).index_add_(0, sequence, losses)
    return (totals / torch.tensor([8, 8, 5])).mean()


def packed_by_an_index_made_in_place(z, y):
    lengths, losses = torch.tensor([7, 9, 5]), in_one_row(z, y)
    worst = losses.detach().amax()
    sequence = torch.arange(y.numel()) // 8
    sequence[3] = 1
    return (losses.new_zeros(3).index_add(0, sequence, losses) / lengths).mean(), worst


def packed_by_scatter_add(z, y):
    sequence = torch.tensor([0, 0, 0, 1, 1, 2, 2]).expand(y.shape)
    zeros, mask = torch.zeros(len(y), 3, dtype=z.dtype), kept(y, z.dtype)
    counts = zeros.scatter_add(1, sequence, mask)
    totals = zeros.scatter_add(1, sequence, per_token(z, y) * mask)
    return (totals / counts.clamp(min=1)).mean()


def packed_by_length(z, y):
    parts = in_one_row(z, y).split([5, 9, 7])
    return torch.stack([part.mean() for part in parts]).mean(), parts[1].detach()


def prompt_and_answer(z, y):
    losses, prompt = per_token(z, y), 1 - kept(y)
    parts = [(losses * mask).sum() / mask.sum() for mask in (prompt, kept(y))]
    return parts[1] + 0.1 * parts[0], *(part.detach() for part in parts)


def by_sequence_in_turn(z, y):
    pairs = zip(per_token(z, y), kept(y), strict=True)
    return sum((losses * mask).sum() / mask.sum() for losses, mask in pairs)


def one_logsumexp_for_both(z, y):
    lse = z.logsumexp(-1)
    losses = lse - z.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    return ((losses + 1e-3 * lse**2) * kept(y)).sum() / kept(y).sum()


def put_into_a_longer_shape(z, y):
    losses, total = in_one_row(z, y), torch.zeros(2, y.numel())
    total[0] = losses.view(1, -1)
    return total.sum() / 2, losses.detach().amax()


KNOWN |= {
    f.__name__: f
    for f in (
        masked_in_place,
        set_to_zero,
        put_into_a_tensor,
        read_before_and_after_a_write,
        packed_by_index_add,
        packed_by_an_index_made_in_place,
        packed_by_scatter_add,
        packed_by_length,
        prompt_and_answer,
        by_sequence_in_turn,
        one_logsumexp_for_both,
        sum_of_two_names,
        weights_written_afterwards,
        weights_made_in_place,
        mask_as_the_losses,
        weights_like_the_losses,
        counted_like_the_losses,
        put_into_a_longer_shape,
    )
} | {
    "dot": lambda z, y: torch.dot(kept(y, z.dtype).view(-1), in_one_row(z, y)),
    "inner": lambda z, y: torch.inner(in_one_row(z, y), kept(y, z.dtype).view(-1)),
    "matrix_times_weights": lambda z, y: (per_token(z, y) @ kept(y, z.dtype)[0]).mean(),
    "weights_times_matrix": lambda z, y: (kept(y, z.dtype)[:, 0] @ per_token(z, y)).mean(),
    "matrix_times_matrix": lambda z, y: (per_token(z, y).t() @ kept(y, z.dtype)).mean(),
    "packed_by_product": lambda z, y: (
        lambda hot: (hot.t() @ in_one_row(z, y) / hot.sum(0)).mean()
    )(F.one_hot(torch.arange(y.numel()) // 8, 3).to(z.dtype)),
    "packed_by_one_hot": lambda z, y: (
        lambda hot: ((per_token(z, y)[..., None] * hot).sum((0, 1)) / hot.sum((0, 1))).mean()
    )(F.one_hot(torch.tensor([0, 0, 0, 1, 1, 2, 2]).expand(y.shape), 3).float()),
    "einsum": lambda z, y: (
        torch.einsum("bs,bs->", per_token(z, y), kept(y, z.dtype)) / kept(y).sum()
    ),
    "einsum_by_sequence": lambda z, y: (
        torch.einsum("bs, bs -> b", kept(y, z.dtype), per_token(z, y)) / kept(y).sum(1)
    ).mean(),
    "where_zeros_like": lambda z, y: (
        lambda losses: torch.where(y > 20, losses, torch.zeros_like(losses)).sum() / kept(y).sum()
    )(per_token(z, y)),
    "where_it_counts_less": lambda z, y: (
        lambda losses: torch.where(y > 20, losses, 0.1 * losses).mean()
    )(per_token(z, y)),
    "where_it_is_detached": lambda z, y: (
        lambda losses: torch.where(y > 20, losses, losses.detach()).mean()
    )(per_token(z, y)),
    "filled_with_one": lambda z, y: per_token(z, y).masked_fill(y > 20, 1).mean(),
    "transposed": lambda z, y: (per_token(z, y).t()[1:] * kept(y).t()[1:]).sum(),
    "cut_and_joined": lambda z, y: (
        (torch.cat(losses_of_rows(z, y)) * kept(y).flatten()).sum() / kept(y).sum()
    ),
    "mean_times_a_mask": lambda z, y: (forms.flat(z, y) * kept(y)).sum() / kept(y).sum(),
    "rows_in_a_stack": lambda z, y: (torch.stack(losses_of_rows(z, y)) * kept(y)).mean(),
    "means_in_a_stack": lambda z, y: (
        torch.stack(losses_of_rows(z, y, "mean")) * torch.tensor([0.2, 0.3, 0.5])
    ).sum(),
    "two_means": lambda z, y: (
        lambda losses: losses[:, :3].mean() + 0.3 * losses[:, 3:].mean() + losses.sum() / 9
    )(per_token(z, y)),
    "chosen_twice": lambda z, y: per_token(z, y).view(-1)[torch.tensor([1, 3, 3])].mean(),
    "chosen_by_index": lambda z, y: per_token(z, y).index_select(1, torch.tensor([5, 1])).sum(),
    "gathered": lambda z, y: per_token(z, y).gather(1, torch.tensor([[1], [3], [2]])).mean(),
    "added_constant": lambda z, y: ((per_token(z, y) - 2) * kept(y)).sum() + 1,
    "indexed_with_true": lambda z, y: per_token(z, y)[True].sum(),
    "total_of_one_element": lambda z, y: (
        (torch.zeros(1) + forms.flat(z, y)).squeeze()
        + (per_token(z[:1], y[:1]).sum() / torch.tensor([9])).sum()
    ),
}


def written_without_gradient(z, y):
    losses = per_token(z, y)
    with torch.no_grad():
        losses.mul_(2)
    return losses.sum()


def written_by_another_name(z, y):
    losses = per_token(z, y)
    flat = losses.view(-1)
    losses.mul_(kept(y))
    return flat.sum()


def part_written(z, y):
    losses = per_token(z, y)
    losses[0].mul_(3)
    return losses.mean()


def ones_with_strides_of_the_losses(z, y):
    losses = per_token(z, y)
    ones = torch.ones_like(losses.t()).t().view(-1)
    return (losses.view(-1) * ones).sum() / 2, losses.detach().amax()


def imaginary(z, y):
    losses = per_token(z, y)
    return (losses * 1j).sum().imag, losses.detach().amax()


KNOWN |= {
    **{
        f.__name__: f
        for f in (
            written_without_gradient,
            written_by_another_name,
            part_written,
            ones_with_strides_of_the_losses,
            imaginary,
        )
    },
    "added_to_itself": lambda z, y: (lambda losses: torch.add(losses, losses).mean())(
        per_token(z, y)
    ),
    "cast_like_the_losses": lambda z, y: (
        lambda losses: losses.mean() + z.logsumexp(-1).type_as(losses).mean()
    )(per_token(z, y)),
    "einsum_of_a_sum": lambda z, y: torch.einsum("bs,b->", per_token(z, y), kept(y, z.dtype)[:, 0]),
    "einsum_that_repeats": lambda z, y: torch.einsum(
        "bs,bs->", per_token(z[:1], y[:1]), kept(y, z.dtype)
    ),
}


def behind_an_inference_block(z, y):
    """Once it has ended, gradients are recorded again."""
    losses = per_token(z, y)
    with torch.inference_mode():
        half = torch.full((), 0.5) * 1
    return (losses * kept(y)).sum() * float(1 / 2) + 0 * half.clone()


KNOWN["behind_an_inference_block"] = behind_an_inference_block
