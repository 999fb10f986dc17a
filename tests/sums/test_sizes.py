"""Weighted sums of rows whose number is not known when they are compiled."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from .. import forms, reference
from ..backend import rewrite
from ..checks import assert_as_eager, first_of
from .known_weights import KNOWN
from .parts import per_token

CHOSEN = {
    "mean": lambda losses, lse, m, w: losses[m].mean(),
    "sum": lambda losses, lse, m, w: losses[m].sum() / m.sum(),
    "weighted": lambda losses, lse, m, w: (losses[m] * w).sum() / w.sum(),
    "by_number": lambda losses, lse, m, w: losses.view(-1)[m.view(-1).nonzero().squeeze(1)].mean(),
    "z_loss": lambda losses, lse, m, w: losses.mean() + 1e-2 * lse[m].square().mean(),
}


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("backend", ["rewrite", "inductor"])
def test_losses_chosen_by_a_mask(name, backend, passes):
    def function(h, w, b, y):
        z, mask = F.linear(h, w, b), y > 20
        weights = torch.linspace(0, 1, 7).expand(y.shape)[mask]
        lse = z.logsumexp(-1) if name == "z_loss" else None
        return CHOSEN[name](per_token(z, y), lse, mask, weights)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = rewrite(function) if backend == "rewrite" else torch.compile(function)
        for _ in range(2):
            assert_as_eager(function, forms.inputs(), compiled)
    assert passes == ["forward_and_gradients"] * 2


@pytest.mark.parametrize(
    "name",
    [
        *("z_loss_by_row", "some_of_the_losses", "by_hand_masked", "masked_in_place"),
        *("prompt_and_answer", "by_sequence_in_turn", "rows_in_a_stack", "weights_times_matrix"),
        *("mask_as_the_losses", "weights_like_the_losses"),
        *(
            "mean_times_a_mask",
            "einsum_by_sequence",
            "transposed",
            "chosen_twice",
            "where_it_counts_less",
        ),
    ],
)
def test_dynamic_sizes(name, passes):
    @first_of
    def function(h, w, b, y):
        return KNOWN[name](F.linear(h, w, b), y)

    compiled = torch.compile(function, dynamic=True)
    for rows in (7, 11):
        h, w, b, y = forms.inputs()
        h, y = (torch.cat((t, t[:, :1].expand(-1, rows, *t.shape[2:])), 1) for t in (h, y))
        tensors = [h.detach().requires_grad_(), w, b, y]
        expected = reference.run(function, list(map(reference.leaf, tensors)))
        results = reference.run(compiled, list(map(reference.leaf, tensors)))
        torch.testing.assert_close(results, expected)
    assert counters["lmhead_pass"]["refused"] == 0
    assert passes == ["forward_and_gradients"] * 2


def test_a_mean_of_logits_is_compiled_once_for_all_sizes():
    def function(h, w, b, y):
        z = F.linear(h, w, b)
        return forms.flat(z, y) + 1e-3 * z.sum(-1).mean()

    counts = []
    for compiled in (rewrite(function), torch.compile(function, backend="eager")):
        torch._dynamo.reset()
        counters.clear()
        for batch in (2, 3, 5, 7):
            compiled(*forms.inputs(batch=batch))
        counts.append(counters["stats"]["unique_graphs"])
    assert counts[0] == counts[1]
