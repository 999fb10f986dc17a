"""The cases of docs/precision.md, smaller: the pass costs no digits that the unfused model has."""

from dataclasses import replace

import pytest
import torch

from benchmarks.precision import cases
from benchmarks.precision.cases import Case
from benchmarks.precision.errors import Results, errors, exact, out_of_range
from benchmarks.precision.implementations import rewritten, train, unfused

from .. import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (256, 64, 512)
CASES = {
    "logits": [
        Case("ordinary logits", SIZES, cases.ordinary),
        Case("logits to 1e4", SIZES, cases.large),
        replace(cases.NEARLY_ONE_HOT, sizes=SIZES),
        replace(cases.DOMINATING, sizes=SIZES),
    ],
    "words": [Case("64k words", (32, 16, 1 << 16), cases.ordinary)],
    "rare": [replace(cases.RARE, sizes=(4096, 16, 512))],
}
LOSS_SCALED = {
    "few": [replace(cases.STEEP, sizes=(32, 64, 512))],
    "many": [
        replace(case, sizes=(1024, 64, 512))
        for case in (cases.WIDE, cases.NEARLY_ONE_HOT, cases.DOMINATING)
    ],
}
# The cases of a list share their sizes, and so what is compiled.


def rounding(dtype):
    """What results may differ by, in eps of ``dtype``.

    That is one rounding more, since chunks' shares of the weight's gradient are rounded to BF16,
    and a few in the dtype of sums, which are taken in another order.
    """
    sums = torch.promote_types(dtype, torch.float32)
    return 0.5 + 4 * torch.finfo(sums).eps / torch.finfo(dtype).eps


def assert_at_most(ours, theirs, dtype):
    for name, mine, other in zip(Results._fields, ours, theirs, strict=True):
        assert mine <= other + rounding(dtype), f"{name}: {ours}, not {theirs}"


def test_exact_values_are_those_of_autograd():
    inputs = cases.ordinary((300, 16, 101), torch.Generator().manual_seed(0)).to(torch.float64)
    expected = reference.run(reference.linear_cross_entropy, inputs)
    for result, right in zip(exact(inputs), expected, strict=True):
        torch.testing.assert_close(result, right, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", CASES)
def test_no_case_is_worse_than_unfused(group, dtype):
    ours, theirs = compiled(CASES[group][0])
    loss_scale = 2.0**15 if dtype == torch.float16 else 1.0
    for case in CASES[group]:
        assert_at_most(*measure(case, dtype, (ours, theirs), loss_scale), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_do_not_grow_with_the_number_of_chunks(dtype):
    # In BF16 more words are targets in one product with the weight than in the other.
    for case in (
        Case("", (1024, 64, 256), cases.ordinary),
        Case("", (5120, 16, 5120), cases.cancelling),
    ):
        one, many = (rewritten(case.sizes[0] // chunks, chunks) for chunks in (1, 64))
        assert_at_most(*measure(case, dtype, (many, one)), dtype)


@pytest.mark.parametrize("autocast", [False, True], ids=["float16", "autocast"])
@pytest.mark.parametrize("group", LOSS_SCALED)
def test_fp16_stays_in_range_under_a_loss_scale(group, autocast):
    losses = compiled(LOSS_SCALED[group][0], autocast)
    for case in LOSS_SCALED[group]:
        inputs = case.inputs(torch.float16)
        right = exact(inputs)
        if autocast:
            inputs = inputs.to(torch.float32)
        ours, theirs = (
            out_of_range(train(loss, inputs, 2.0**16), right, 2.0**16) for loss in losses
        )
        assert ours.overflow <= theirs.overflow, case.name
        assert ours.underflow <= theirs.underflow, case.name


def compiled(case, autocast=False):
    """The pass's loss and the unfused one, of cases with these sizes and chunks."""
    return [way(case.rows, case.chunks, autocast) for way in (rewritten, unfused)]


def measure(case, dtype, losses, loss_scale=1.0):
    """The errors of each of ``losses``."""
    inputs = case.inputs(dtype)
    right = exact(inputs)
    results = (train(loss, inputs, loss_scale) for loss in losses)
    return [errors(case, result, right, dtype, loss_scale) for result in results]
