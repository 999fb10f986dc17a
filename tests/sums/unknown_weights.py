"""Near misses of ``known_weights``: what a row counts for is known later, or not by the pass."""

import torch

from .. import forms
from .parts import in_one_row, kept, nll_by_hand, per_token


def viewed_without_gradient(z, y):
    losses = per_token(z, y)[:, 1:]
    with torch.no_grad():
        known = losses[1:]
    return losses.mean() + known.sum()


def weights_written_from_the_losses(z, y):
    losses, weights = per_token(z, y), torch.zeros(y.shape)
    weights.copy_(losses.detach())
    return (losses * weights).sum(), losses.detach().amax()


def square_of_what_was_written(z, y):
    lse = z.logsumexp(-1).clone()
    lse.detach().add_(5)
    return lse.square().mean() + forms.flat(z, y)


def through_a_transform(z, y):
    losses = per_token(z, y)
    return losses.sum() + torch.vmap(lambda row: row * 2)(losses).sum()


def set_where_it_is_large(z, y):
    losses = per_token(z, y)
    losses[losses.detach() > 4.5] = 0
    return losses.mean()


def square_of_what_was_put_and_written(z, y):
    lse, held = z.logsumexp(-1), torch.zeros(y.shape)
    held[:] = lse
    held.detach().add_(1)
    return held.square().mean() + forms.flat(z, y)


def others_shaped_as_losses(z, y):
    losses = per_token(z, y)
    return losses.sum() + losses.mean(1, keepdim=True).square().expand_as(losses).sum()


def noted_in_a_tensor_without_gradient(z, y):
    losses, notes = per_token(z, y), torch.zeros(2)
    with torch.no_grad():
        notes[0] = losses.mean()
        first, _ = losses.split(2)
    weights = kept(y) / kept(y).sum()
    return (losses * weights).sum(), notes * 2, first.detach()


def logged_under_autocast(z, y):
    with torch.autocast("cpu", torch.bfloat16):
        losses = in_one_row(z, y)
        logged = losses.detach() @ losses.detach()
    return (losses * kept(y).flatten()).sum(), logged


UNKNOWN = {
    **{
        f.__name__: f
        for f in (
            set_where_it_is_large,
            square_of_what_was_put_and_written,
            others_shaped_as_losses,
            noted_in_a_tensor_without_gradient,
            logged_under_autocast,
        )
    },
    "chosen_by_size": lambda z, y: per_token(z, y).flatten().topk(5)[0].mean(),
    "finite_ones": lambda z, y: per_token(z, y).nanmean(),
    "weighted_by_their_likelihood": lambda z, y: (
        lambda losses: (losses * losses.detach().neg().exp()).mean()
    )(per_token(z, y)),
    "product_with_itself": lambda z, y: (lambda losses: losses @ losses)(per_token(z, y).view(-1)),
    "in_another_order": lambda z, y: (
        forms.flat(z, y) + (z.transpose(0, 1).logsumexp(-1) * kept(y).t()).mean()
    ),
    "inverted": lambda z, y: (kept(y) / per_token(z, y)).mean(),
    "where_either": lambda z, y: (
        lambda losses: torch.where(losses > 4.5, losses, 0.1 * losses).mean()
    )(per_token(z, y)),
    "viewed_without_gradient": viewed_without_gradient,
    **{
        f.__name__: f
        for f in (
            weights_written_from_the_losses,
            square_of_what_was_written,
            through_a_transform,
        )
    },
    "ratio": lambda z, y: (nll_by_hand(z, y).neg().exp() * kept(y)).mean(),
    "returned_by_row": lambda z, y: (
        lambda losses: ((losses * kept(y)).sum() / kept(y).sum(), losses)
    )(per_token(z, y)),
    "z_loss_returned_too": lambda z, y: (lambda extra: (forms.flat(z, y) + extra, extra))(
        1e-2 * z.logsumexp(-1).pow(2).mean()
    ),
    "squared_losses": lambda z, y: per_token(z, y).square().mean(),
    "cubed_logsumexp": lambda z, y: forms.flat(z, y) + 1e-3 * (z.logsumexp(-1) ** 3).mean(),
    "fourth_power": lambda z, y: forms.flat(z, y) + 1e-4 * z.logsumexp(-1).pow(2).pow(2).mean(),
    "shifted_before_the_square": lambda z, y: (
        forms.flat(z, y) + (kept(y) * z.logsumexp(-1) + kept(y)).square().mean()
    ),
    "summed_before_the_square": lambda z, y: (
        forms.flat(z, y) + 1e-3 * z.logsumexp(-1).sum(1).square().mean()
    ),
    "weighted_by_itself": lambda z, y: (lambda losses: (losses * (losses.detach() > 4)).mean())(
        per_token(z, y)
    ),
}
