"""What mixes rows is left alone, and is called by its name."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import lmhead_pass
from lmhead_pass.graph import Refused
from lmhead_pass.logits import large_heads
from lmhead_pass.rowwise import carve

from ..backend import rewrite
from .test_losses import gradients, inputs


def batch_statistics(z):
    return (z - z.mean((0, 1))).log_softmax(-1)[..., 0].mean()


def batch_norm(z):
    return F.batch_norm(z.flatten(0, 1), None, None, training=True).std(-1).mean()


def over_tokens(z):
    return z.softmax(1).square().mean()


def cumulative_over_tokens(z):
    return z.cumsum(1).std(-1).mean()


def neighbours(z):
    return (z[:, 1:] * z[:, :-1]).sum()


def flipped(z):
    return (z.flip(1) * z).sum(-1).mean()


def dropped(z):
    return F.dropout(z, 0.5).std(-1).mean()


def noisy(z):
    return (z + torch.rand_like(z)).std(-1).mean()


def attention(z):
    return (z @ z.transpose(1, 2)).logsumexp(-1).mean()


def projected(z):
    return (z @ torch.ones(z.size(-1), 4)).square().mean()


def variance_of_all(z):
    return z.var()


def sorted_rows(z):
    return z.sort(0).values.std(-1).mean()


def largest_of_all_subtracted(z):
    return (z - z.max()).exp().sum(-1).log().mean()


def paired(z):
    flat = z.flatten(0, 1)
    return (flat[:, None] - flat[None]).square().mean()


def mixed_into_one_dimension(z):
    return z.flatten().cumsum(0).mean()


def largest_of_all(z):
    return z.flatten().topk(3).values.sum()


@torch.library.custom_op("test_rowwise::halve_", mutates_args={"x"})
def halve_(x: torch.Tensor) -> None:
    x.mul_(0.5)


@torch.library.custom_op("test_rowwise::record", mutates_args={"seen"})
def record(x: torch.Tensor, seen: torch.Tensor) -> None:
    seen.copy_(x.abs().max())


def written_by_a_list(z):
    torch._foreach_mul_([z], 0.5)
    return z.std(-1).mean()


def written_by_a_custom_op(z):
    with torch.no_grad():
        halve_(z)
    return z.detach().std(-1).mean() + z.std(-1).mean() * 0


def values_written(z):
    p = z.square() + 1
    torch._foreach_add_([p], 1e-2)
    return -p.log().sum(-1).mean()


def recorded(z):
    seen = torch.zeros(())
    record(z.detach(), seen)
    return z.std(-1).mean() + seen


def turned(z):
    return (z * 1j).exp().sum(-1).abs().mean()


NEAR_MISSES = {
    turned: "makes complex numbers",
    written_by_a_list: "foreach_mul_.* returns nothing",
    written_by_a_custom_op: "halve_.* returns nothing",
    values_written: "foreach_add_.* returns nothing",
    recorded: "record.* returns nothing",
    batch_statistics: "mean .* runs over rows",
    batch_norm: "batch_norm",
    over_tokens: "softmax runs over rows",
    cumulative_over_tokens: "cumsum runs over rows",
    neighbours: "mul ",
    flipped: "flip runs over rows",
    dropped: "dropout .* random numbers",
    noisy: "rand_like .* random numbers",
    attention: "matmul",
    projected: "matmul",
    variance_of_all: "var runs over rows",
    sorted_rows: "sort runs over rows",
    largest_of_all_subtracted: "sub ",
    paired: "sub .*rows",
    mixed_into_one_dimension: "flatten .* one dimension",
    largest_of_all: "flatten .* one dimension",
}


def reason(function, tensors):
    found = []

    def backend(module, example_inputs):
        heads = list(large_heads(module.graph))
        try:
            carve(heads[0], heads)
        except Refused as refused:
            found.append(str(refused))
        return module.forward

    torch.compile(function, backend=backend)(*tensors)
    return found


@pytest.mark.parametrize("function", NEAR_MISSES, ids=lambda f: f.__name__)
def test_what_mixes_rows_is_left_alone(function):
    h, w, *_ = inputs()

    def step(h, w):
        return function(F.linear(h, w))

    (why,) = reason(step, (h, w))
    assert re.search(NEAR_MISSES[function], why), why
    torch._dynamo.reset()
    torch.manual_seed(1)
    ours = gradients(rewrite(step), (h, w))
    torch.manual_seed(1)
    for a, b in zip(ours, gradients(step, (h, w)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert counters["lmhead_pass"]["rewritten"] == 0


def test_no_logits():
    """As in eager: NaN."""
    h, w, *_ = inputs()
    compiled = rewrite(lambda h, w: F.linear(h, w).mean())
    assert compiled(h[:0], w).isnan()


@pytest.mark.codegen
def test_targets_that_inductor_takes():
    """Eager takes no int32."""
    h, w, y, *_ = inputs()

    def step(h, w, y):
        return F.cross_entropy(F.linear(h, w).flatten(0, 1), y.flatten())

    loss = torch.compile(step)(h, w, y.int())
    torch.testing.assert_close(loss, step(h, w, y))


def test_the_log_names_what_mixes_rows():
    h, w, y, *_ = inputs()

    def step(h, w, y):
        logits = F.linear(h, w)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        return loss + logits.flip(1).std(-1).mean()

    (refused,) = lmhead_pass.explain(step, h, w, y).refused
    assert "flip runs over rows" in refused


def test_a_block_of_a_model_is_no_loss():
    h, w, *_ = inputs()
    down = torch.randn(16, 128)
    rewrite(lambda h, w: F.linear(F.silu(F.linear(h, w)), down).sum())(h, w)
    assert not counters["lmhead_pass"]


def test_rows_by_a_mask_are_left_to_a_compilation_that_knows_their_number():
    """Trying to carve them makes numbers of rows that nobody waits for."""

    def function(h, w, y):
        z = F.linear(h, w)
        mask = y > 60
        return z[mask].softmax(-1).square().sum(-1).mean() + F.cross_entropy(z[mask], y[mask])

    h, w, y = torch.randn(2, 9, 16), torch.randn(128, 16), torch.randint(128, (2, 9))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        result = torch.compile(function)(h, w, y)
    torch.testing.assert_close(result, function(h, w, y))
