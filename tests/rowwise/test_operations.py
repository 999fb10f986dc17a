"""The table of operations that treat rows apart: each entry against the same of single rows."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import lmhead_pass
from lmhead_pass.rowwise import call_tracer, operations

from ..backend import rewrite
from .test_losses import V, inputs
from .test_refusals import reason

WORDS = torch.tensor([5, 0, 9])
WORDS_FROM_END = torch.tensor([5, 0, -1])

# Of logits ``z [*rows, V]`` and a word for each row ``y [*rows]``: numbers of each row.
GROUPS = {
    "elementwise": {
        "_to_copy": lambda z, y: z.double().sum(-1),
        "where": lambda z, y: torch.where(z > 0.5, z, -1.0).sum(-1),
        "masked_fill": lambda z, y: z.masked_fill(z < 0, 0.25).sum(-1),
        "clamp": lambda z, y: z.clamp(-1, 0.5).sum(-1),
        "nan_to_num": lambda z, y: (z.detach().log().nan_to_num(-1.0) * z).sum(-1),
        "xlogy": lambda z, y: torch.xlogy(z, z.abs() + 1).sum(-1),
        "logical_and": lambda z, y: torch.logical_and(z > 0, z < 1).sum(-1),
        "logical_or": lambda z, y: torch.logical_or(z > 1, z < 0).sum(-1),
        "logical_not": lambda z, y: torch.logical_not(z.relu()).sum(-1),
        "isnan": lambda z, y: z.log().isnan().sum(-1),
        "isinf": lambda z, y: (z.relu().log()).isinf().sum(-1),
        "clone": lambda z, y: z.clone().mul_(2).sum(-1),
    },
    "along the words": {
        "_softmax": lambda z, y: z.softmax(-1).square().sum(-1),
        "_log_softmax": lambda z, y: z.log_softmax(-1)[..., 3],
        "cumsum": lambda z, y: z.cumsum(-1)[..., ::40],
        "cumprod": lambda z, y: z.sin().cumprod(-1)[..., 2],
        "logcumsumexp": lambda z, y: z.logcumsumexp(-1)[..., 9],
        "cummax": lambda z, y: z.cummax(-1).values.sum(-1),
        "cummin": lambda z, y: z.cummin(-1).indices.sum(-1),
        "sort": lambda z, y: z.sort(-1).values[..., 3:6],
        "topk": lambda z, y: z.topk(3).values,
        "flip": lambda z, y: z.flip(-1)[..., 1],
        "gather": lambda z, y: z.gather(-1, y[..., None]).squeeze(-1),
        "scatter": lambda z, y: z.scatter(-1, y[..., None], 2.0).sum(-1),
        "scatter_add": lambda z, y: z.scatter_add(-1, y[..., None], z[..., :1]).square().sum(-1),
        "scatter_reduce": lambda z, y: (
            z.scatter_reduce(-1, y[..., None], z[..., :1], "amax").square().sum(-1)
        ),
        "glu": lambda z, y: F.glu(z).sum(-1),
        "index_select": lambda z, y: z.index_select(-1, WORDS),
        "index_fill": lambda z, y: z.index_fill(-1, WORDS, 0.5).sum(-1),
        "index_add": lambda z, y: z.index_add(-1, WORDS, z[..., :3]).square().sum(-1),
        "index_copy": lambda z, y: z.index_copy(-1, WORDS, z[..., :3]).square().sum(-1),
    },
    "over the words": {
        "sum.dim_IntList": lambda z, y: z.sum(-1),
        "mean.dim": lambda z, y: z.mean(-1, keepdim=True),
        "amax": lambda z, y: z.amax(-1),
        "amin": lambda z, y: z.amin((-1,)),
        "logsumexp": lambda z, y: z.logsumexp(-1),
        "prod.dim_int": lambda z, y: z.sin().prod(-1),
        "any.dim": lambda z, y: (z > 2.5).any(-1),
        "any.dims": lambda z, y: (z > 2.5).any((-1,)),
        "all.dim": lambda z, y: (z > -9).all(-1),
        "all.dims": lambda z, y: (z > -9).all((-1,)),
        "argmax": lambda z, y: z.argmax(-1),
        "argmin": lambda z, y: z.argmin(-1, keepdim=True),
        "max.dim": lambda z, y: z.max(-1).values,
        "min.dim": lambda z, y: z.min(-1).indices,
        "median.dim": lambda z, y: z.median(-1).values,
        "nanmedian.dim": lambda z, y: z.log().nanmedian(-1).values,
        "mode": lambda z, y: z.round().mode(-1).values,
        "kthvalue": lambda z, y: z.kthvalue(4, -1).values,
        "var.correction": lambda z, y: z.var(-1),
        "std.correction": lambda z, y: z.std(-1, correction=0),
        "var_mean.correction": lambda z, y: sum(torch.var_mean(z, -1)),
        "std_mean.correction": lambda z, y: sum(torch.std_mean(z, -1)),
        "linalg_vector_norm": lambda z, y: z.norm(dim=-1),
        "count_nonzero": lambda z, y: z.relu().count_nonzero(-1),
    },
    "in another shape": {
        "alias": lambda z, y: torch.ops.aten.alias(z).sum(-1),
        "detach": lambda z, y: (z * z.detach()).sum(-1),
        "view.default": lambda z, y: z.view(*z.shape[:-1], 4, -1).amax(-1).sum(-1),
        "_unsafe_view": lambda z, y: torch.ops.aten._unsafe_view(z, [*z.shape, 1]).sum((-1, -2)),
        "unsqueeze": lambda z, y: z.unsqueeze(0).exp().sum(-1).squeeze(0),
        "squeeze": lambda z, y: z.unsqueeze(-2).exp().squeeze(-2).sum(-1),
        "permute": lambda z, y: z.permute(2, 0, 1).softmax(0)[3],
        "transpose": lambda z, y: z.transpose(1, 2).exp().sum(1),
        "t": lambda z, y: z.flatten(0, 1).t().softmax(0)[2].view(y.shape),
        "expand": lambda z, y: z.unsqueeze(-1).expand(*z.shape, 2).softmax(-2)[..., 5, 1],
        "slice": lambda z, y: z[..., 3:50:2].sum(-1),
        "select": lambda z, y: z[..., 7],
        "split": lambda z, y: z.split(50, -1)[1].softmax(-1)[..., 0],
        "split_with_sizes": lambda z, y: z.split([100, 28], -1)[1].softmax(-1)[..., 0],
        "unbind": lambda z, y: z.unflatten(-1, (4, 32)).unbind(-2)[1].softmax(-1)[..., 0],
        "index": lambda z, y: z[..., WORDS_FROM_END],
    },
    "filled, copied, joined": {
        "zeros_like": lambda z, y: (torch.zeros_like(z) + z).sum(-1),
        "ones_like": lambda z, y: (torch.ones_like(z) * z).sum(-1),
        "full_like": lambda z, y: torch.full_like(z, 0.25).mul(z).sum(-1),
        "empty_like": lambda z, y: torch.empty_like(z).fill_(0.5).mul_(z).sum(-1),
        "new_zeros": lambda z, y: (z.new_zeros(z.shape) + z).sum(-1),
        "new_ones": lambda z, y: (z.new_ones(z.shape) * z).sum(-1),
        "new_full": lambda z, y: (z.new_full(z.shape, 2.0) * z).sum(-1),
        "new_empty": lambda z, y: z.new_empty(z.shape).zero_().add_(z).sum(-1),
        "fill": lambda z, y: z.clone().fill_(0.5).sum(-1),
        "zero": lambda z, y: (z.clone().zero_() + z).sum(-1),
        "copy": lambda z, y: z.clone().copy_(z.exp()).sum(-1),
        "cat": lambda z, y: torch.cat([z, z.exp()], -1).std(-1),
        "stack": lambda z, y: torch.stack([z, z.exp()], -1).amax(-1).sum(-1),
        "index_put": lambda z, y: set_where(z.clone(), z > 1).sum(-1),
    },
    "losses": {
        "mse_loss": lambda z, y: F.mse_loss(z, z.sin(), reduction="none").sum(-1),
        "smooth_l1_loss": lambda z, y: F.smooth_l1_loss(z, z.sin(), reduction="none").sum(-1),
        "huber_loss": lambda z, y: F.huber_loss(z, z.sin(), reduction="none").sum(-1),
        "binary_cross_entropy": lambda z, y: F.binary_cross_entropy(
            z.sigmoid(), (z > 0).float(), reduction="none"
        ).sum(-1),
        "binary_cross_entropy_with_logits": lambda z, y: F.binary_cross_entropy_with_logits(
            z, (z > 0).float(), reduction="none"
        ).sum(-1),
        "nll_loss_forward": lambda z, y: F.nll_loss(
            z.flatten(0, 1).sin(), y.flatten(), reduction="none"
        ).view(y.shape),
        # Eager's backward fails for some strides.
        "nll_loss2d_forward": lambda z, y: F.nll_loss(
            z.detach().mT.sin()[:, :, None], y[:, None], reduction="none"
        ).squeeze(1),
    },
}
# What is summed over all rows as well: not the same as of single rows.
SUMS = {
    "sum.default": lambda z, y: z.exp().sum(),
    "mean.default": lambda z, y: z.exp().mean(),
    "max.default": lambda z, y: z.sin().max(),
    "min.default": lambda z, y: z.sin().min(),
}


def set_where(x, mask):
    x[mask] = 0.5
    return x


@pytest.fixture
def seen(monkeypatch):
    """The names of what is looked up in the table."""
    names = set()

    def rowwise(context, call):
        result = operations.rowwise(context, call)
        names.update((call.name, call.name.split(".")[0]))
        return result

    monkeypatch.setattr(call_tracer, "rowwise", rowwise)
    return names


def test_each_entry_has_an_example():
    examples = {name for group in GROUPS.values() for name in group}
    assert operations._TABLE.keys() == examples | SUMS.keys()


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_rows_are_treated_apart(group, seen):
    h, w, y, *_ = inputs()

    def step(h, w, y):
        z = F.linear(h, w)
        return {name: example(z, y) for name, example in group.items()}

    with lmhead_pass.config.patch(batch_chunk_size=5):
        ours = rewrite(step)(h, w, y)
        theirs = step(h, w, y)
        of_ours, of_theirs = (
            {
                name: torch.autograd.grad(result.sum(), (h, w), retain_graph=True)
                for name, result in results.items()
                if result.requires_grad
            }
            for results in (ours, theirs)
        )
    assert counters["lmhead_pass"] == {"rewritten": 1}
    assert group.keys() <= seen
    torch.testing.assert_close(of_ours, of_theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        z = F.linear(h, w)
        for name, example in group.items():
            for row in (0, 0), (1, 3), (2, 6):
                one = tuple(slice(n, n + 1) for n in row)
                torch.testing.assert_close(
                    ours[name][one].detach(), example(z[one], y[one]), msg=lambda m, n=name: n + m
                )


@pytest.mark.parametrize("name", SUMS)
def test_sums_over_rows(name, seen):
    h, w, y, *_ = inputs()

    def step(h, w, y):
        return SUMS[name](F.linear(h, w), y)

    with lmhead_pass.config.patch(batch_chunk_size=5):
        ours = rewrite(step)(h, w, y)
        gradients = torch.autograd.grad(ours, (h, w))
    assert name in seen
    assert counters["lmhead_pass"] == {"rewritten": 1}
    torch.testing.assert_close(ours, step(h, w, y))
    theirs = torch.autograd.grad(step(h, w, y), (h, w))
    torch.testing.assert_close(gradients, theirs, rtol=1e-4, atol=1e-5)


# The same over rows, ``[B, T, V]`` again, or with fewer rows: refused by name.
OVER_ROWS = {
    "softmax": lambda z: z.softmax(1),
    "cumsum": lambda z: z.cumsum(0),
    "sort": lambda z: z.sort(0).values,
    "topk": lambda z: z.topk(2, 1).values,
    "flip": lambda z: z.flip((0, 2)),
    "gather": lambda z: z.gather(1, torch.zeros(3, 2, V, dtype=torch.int64)),
    "logsumexp": lambda z: z.logsumexp(1),
    "argmax": lambda z: z.argmax(0) * z,
    "max": lambda z: z.max(0).values,
    "median": lambda z: z.median(1).values,
    "std": lambda z: z.std(1),
    "vector_norm": lambda z: torch.linalg.vector_norm(z, dim=1),
    "amax": lambda z: z.amax(0),
    "cat": lambda z: torch.cat([z, z.sin()], 1),
    "index": lambda z: z[torch.tensor([[2, 0]])],
    "roll": lambda z: z.roll(1, 1),
    "view": lambda z: z.view(torch.int32),  # bits
    "diff": lambda z: z.diff(dim=1),
    "repeat": lambda z: z.repeat(2, 1, 1),
    "cdist": lambda z: torch.cdist(z, z),
    "layer_norm": lambda z: F.layer_norm(z.transpose(0, 2), (7, 3)),
    "instance_norm": lambda z: F.instance_norm(z),
    "conv1d": lambda z: F.conv1d(z.transpose(1, 2), torch.ones(4, V, 3)),
    "multinomial": lambda z: z * z.detach().softmax(-1)[0].multinomial(2)[0, 0],
}


@pytest.mark.parametrize("name", OVER_ROWS)
def test_what_mixes_rows_is_refused_by_name(name):
    h, w, *_ = inputs()
    (why,) = reason(lambda h, w: OVER_ROWS[name](F.linear(h, w)).float().square().mean(), (h, w))
    assert name in why


@pytest.mark.parametrize("told", [{}, {"posinf": 9.0}, {"neginf": -9.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_infinities_become_the_largest_numbers_of_the_models_dtype(dtype, told):
    h, w, *_ = (tensor.to(dtype) for tensor in inputs())

    def step(h, w):
        z = F.linear(h, w).masked_fill(torch.arange(V) > 99, -torch.inf)
        return z.log_softmax(-1).nan_to_num(**told).clamp(-6e4).amin(-1)

    ours = rewrite(step)(h, w)
    assert counters["lmhead_pass"] == {"rewritten": 1}
    torch.testing.assert_close(ours.float(), step(h, w).float())


def test_an_ignore_index_that_changes_is_refused():
    h, w, y, *_ = inputs()
    step = rewrite(
        lambda h, w, y, n: F.cross_entropy(
            F.linear(h, w).flatten(0, 1).clamp(-9, 9), y.flatten(), ignore_index=n
        )
    )
    with lmhead_pass.config.patch(strict=True):
        for ignored in (1, 2, 3):
            expected = F.cross_entropy(
                F.linear(h, w).flatten(0, 1).clamp(-9, 9), y.flatten(), ignore_index=ignored
            )
            torch.testing.assert_close(step(h, w, y, ignored), expected)
