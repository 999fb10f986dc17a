"""What the op tells beside the loss: values against FP64, and the gradient of the log-sum-exp."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from .. import reference
from .cases import DTYPES, call, op_and_measures, tensors

MEASURES = (
    *("logsumexp", "argmax", "max", "entropy", "logits", "losses"),
    *("topk_values:3", "topk_indices:3", "topk_values:5"),
)
OPTIONS = {
    "plain": {},
    "scale": {"logit_scale": -0.5},
    "softcap": {"softcap": 2.0},
    "all": {"logit_scale": 1.5, "softcap": 3.0, "label_smoothing": 0.1},
    "fill": {"fill": torch.where(torch.arange(101) % 3 == 0, 0.5, torch.nan)},
}
LOGIT_OPTIONS = ("logit_scale", "softcap", "fill")


def exact_inputs(inputs):
    return [
        reference.leaf(t, torch.float64 if t is not None and t.is_floating_point() else None)
        for t in inputs
    ]


def of_logits(options):
    return {name: value for name, value in options.items() if name in LOGIT_OPTIONS}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_values(dtype, reduction, options, requires_grad):
    """Of all rows, in several chunks: every fifth has no loss."""
    options = OPTIONS[options]
    *leaves, target = tensors(dtype, bias=True)
    for leaf in leaves:
        leaf.requires_grad_(requires_grad)
    loss, *taken = call(*leaves, target, reduction=reduction, measures=list(MEASURES), **options)
    torch.testing.assert_close(
        loss, call(*leaves, target, reduction=reduction, **options), rtol=0, atol=0
    )
    taken = dict(zip(MEASURES, taken, strict=True))
    exact = reference.measures(
        reference.logits(*exact_inputs(leaves), **of_logits(options)).detach()
    )
    unfused = reference.measures(reference.logits(*leaves, **of_logits(options)).detach())
    wide = torch.promote_types(dtype, torch.float32)
    for names, expected in ((("logsumexp", "entropy", "max"), wide), (("logits",), dtype)):
        assert {taken[name].dtype for name in names} == {expected}
        reference.assert_no_worse(
            *([source[name].detach() for name in names] for source in (taken, unfused, exact)),
            expected,
        )
    assert taken["argmax"].dtype == torch.int64
    assert torch.equal(taken["argmax"], taken["logits"].argmax(1))
    assert torch.equal(taken["max"].to(dtype), taken["logits"].amax(1))
    values, indices = taken["logits"].topk(3)
    assert torch.equal(taken["topk_values:3"].to(dtype), values)
    assert torch.equal(taken["topk_indices:3"], indices)
    assert torch.equal(taken["topk_values:5"].to(dtype), taken["logits"].topk(5).values)
    alone = call(*leaves, target, reduction="none", **options)
    torch.testing.assert_close(taken["losses"], alone, rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", MEASURES)
def test_each_by_itself_and_in_any_order(name, reduction):
    inputs = tensors(torch.bfloat16)
    (expected,) = call(*inputs, reduction=reduction, measures=[name])[1:]
    others = [other for other in reversed(MEASURES) if other != name]
    taken = call(*inputs, reduction=reduction, measures=[*others, name])
    assert torch.equal(taken[-1], expected)
    assert [t.dtype for t in taken[1:-1]] == [
        call(*inputs, reduction=reduction, measures=[other])[1].dtype for other in others
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_word_that_eager_takes(dtype):
    """Sums of few small integers are exact in every dtype, and there are few different ones."""
    hidden, weight = (torch.randint(-1, 2, (rows, 16)).to(dtype) for rows in (200, 1001))
    target = torch.randint(1001, (200,))
    logits = F.linear(hidden, weight)
    assert ((logits == logits.amax(1, keepdim=True)).sum(1) > 1).any()
    _, argmax = call(hidden, weight, None, target, measures=["argmax"])
    assert torch.equal(argmax, logits.argmax(1))


def test_ties_are_those_of_the_compute_dtype():
    """Logits that differ before they are rounded, and the later one is larger."""
    hidden, weight = torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(101, 1).bfloat16()
    weight[50:] = 1 + 2**-7
    options = {"measures": ["argmax", "max"], "logit_scale": 1e6, "softcap": 4.0}
    _, argmax, largest = call(hidden, weight, None, torch.tensor([3]), **options)
    assert largest == 4
    assert argmax == 0
    # Both saturate. Below the cap they differ still.
    _, argmax, _ = call(hidden, weight, None, torch.tensor([3]), **{**options, "logit_scale": 1.0})
    assert argmax == 50


def test_entropy_of_logits_that_are_minus_infinity():
    hidden, weight, _, target = tensors()
    bias = torch.zeros(101)
    bias[90:] = -torch.inf
    target %= 90
    _, entropy = call(hidden, weight, bias, target, measures=["entropy"])
    exact = reference.measures(reference.logits(hidden.double(), weight[:90].double()))["entropy"]
    unfused = reference.measures(reference.logits(hidden, weight[:90]))["entropy"]
    reference.assert_no_worse([entropy], [unfused], [exact], torch.float32)


@pytest.mark.parametrize("number", [float("inf"), float("-inf")])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logsumexp_of_infinite_logits(number, reduction):
    hidden, weight = torch.ones(4, 2, dtype=torch.float64), torch.zeros(5, 2, dtype=torch.float64)
    bias = torch.zeros(5, dtype=torch.float64)
    bias[2 if number > 0 else slice(None)] = number
    target = torch.tensor([0, 1, -100, 3])
    _, lse = call(hidden, weight, bias, target, reduction=reduction, measures=["logsumexp"])
    assert torch.equal(lse, torch.full_like(lse, number))


@pytest.mark.parametrize("lead", [20.0, 40.0])
def test_entropy_of_confident_rows_keeps_its_digits(lead):
    """In FP32 the probability is 1: what is left of the entropy is all in the others."""
    inputs = [torch.eye(8, 16) * lead, torch.eye(101, 16), None, torch.arange(8)]
    inputs[3][::2] = -100
    _, entropy = call(*inputs, measures=["entropy"])
    others = 100 * torch.tensor(-lead, dtype=torch.float64).exp()
    exact = torch.log1p(others) + others / (1 + others) * lead
    # A logit of this size has as many roundings as it has ones in it.
    rounding = (lead + 8) * torch.finfo(torch.float32).eps
    torch.testing.assert_close(entropy.double(), exact.expand(8), rtol=rounding, atol=0)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_huge_logits(reduction, requires_grad):
    hidden, weight, _, target = tensors()
    weight.data *= 1e4
    hidden.requires_grad_(requires_grad)
    weight.requires_grad_(requires_grad)
    names = ["logsumexp", "entropy", "max"]
    taken = call(hidden, weight, None, target, reduction=reduction, measures=names)[1:]
    exact = reference.measures(reference.logits(hidden.double(), weight.double()))
    unfused = reference.measures(reference.logits(hidden, weight))
    reference.assert_no_worse(
        taken, [unfused[name] for name in names], [exact[name] for name in names], torch.float32
    )


def total(function, upstream, of_lse):
    """A function of the inputs: losses and log-sum-exps, each times what is upstream of it."""

    def run(*inputs):
        losses, lse = function(*inputs)
        parts = [(losses, upstream), (lse, of_lse)]
        return sum((part * factor.to(part.dtype)).sum() for part, factor in parts if
                   factor is not None)  # fmt: skip

    return run


def both(options):
    """Losses and log-sum-exps, by the op and by plain PyTorch."""

    def ours(*inputs):
        return call(*inputs, reduction="none", measures=["logsumexp"], **options)

    def plain(*inputs):
        lse = reference.logits(*inputs[:3], **of_logits(options)).logsumexp(1)
        return reference.linear_cross_entropy(*inputs, reduction="none", **options), lse

    return ours, plain


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("which", ["losses", "logsumexp", "both"])
@pytest.mark.parametrize("ignored", [False, True])
def test_gradients_of_logsumexp(dtype, options, which, ignored):
    with_all = options == "all"
    ours, plain = both(OPTIONS[options])
    inputs = [*tensors(dtype, bias=with_all, ignored=ignored)]
    inputs.append(torch.rand(101).to(dtype) if with_all else None)
    upstream = None if which == "logsumexp" else torch.randn(37)
    of_lse = None if which == "losses" else torch.randn(37)

    leaves = exact_inputs(inputs)
    exact = reference.run(total(plain, upstream, of_lse), leaves)[1:]
    unfused = reference.run(
        total(plain, upstream, of_lse), [reference.leaf(t) for t in inputs]
    )[1:]  # fmt: skip
    results = reference.run(total(ours, upstream, of_lse), [reference.leaf(t) for t in inputs])[1:]
    assert [r.dtype for r in results] == [dtype] * (2 + with_all)
    reference.assert_no_worse(results, unfused, exact, dtype)
    if ignored:
        assert results[0][::5].any(1).all() == (which != "losses")


def test_confident_rows_keep_the_gradient_of_their_loss():
    """With probabilities that round to 1 in FP32, and a log-sum-exp that weighs next to nothing."""
    ours, plain = both({})
    inputs = [(torch.eye(8, 16) * 20).requires_grad_(), torch.eye(101, 16).requires_grad_()]
    inputs += [None, torch.arange(8)]
    upstream = torch.ones(8)
    for of_lse in (torch.zeros(8), torch.full((8,), 1e-9)):
        exact = reference.run(total(plain, upstream, of_lse), exact_inputs(inputs))
        results = reference.run(total(ours, upstream, of_lse), [reference.leaf(t) for t in inputs])
        # The exponential of 20 knows 20 roundings less than it; 8 are those of the sums.
        for error in reference.errors(results[1:], exact[1:]):
            assert error < 28 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_float16_gradients_of_logsumexp_neither_underflow_nor_overflow(factor):
    *leaves, _, target = tensors(torch.float16)
    _, plain = both({})
    inputs = [*leaves, None, target]
    of_lse = torch.rand(37)
    exact = reference.run(total(plain, None, of_lse), exact_inputs(inputs))[1:]
    unfused = reference.run(total(plain, None, of_lse), inputs)[1:]
    problem = (*(t if t is None else t.detach() for t in inputs), *[None] * 5)
    problem += ("none", -100, 0.0, 1.0, None, "tanh", torch.float16, 10)
    ops = torch.ops.lmhead_pass
    _, row_max, log_sum, _ = ops._forward(*problem, ["logsumexp"])
    needed = [True, True, False]
    gradients = ops._backward(*problem, needed, row_max, log_sum, None, factor * of_lse)
    results = [gradient / factor for gradient in gradients[:2]]
    reference.assert_no_worse(results, unfused, exact, torch.float16)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_what_has_a_gradient(reduction):
    loss, *taken = call(*tensors(), reduction=reduction, measures=list(MEASURES))
    wanted = {name for name, t in zip(MEASURES, taken, strict=True) if t.requires_grad}
    assert wanted == ({"logsumexp"} if reduction == "none" else set())
    assert loss.requires_grad
    with torch.no_grad():
        results = call(*tensors(), reduction=reduction, measures=list(MEASURES))
    assert not any(result.requires_grad for result in results)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_without_a_loss_take_no_part_in_gradients(reduction):
    """Measures are of all rows; the losses' gradients are to the last bit what they are without."""
    gradients = []
    for measures in (None, list(MEASURES)):
        torch.manual_seed(0)
        inputs = tensors()
        result = call(*inputs, reduction=reduction, measures=measures)
        (result if measures is None else result[0]).sum().backward()
        gradients.append([leaf.grad for leaf in inputs[:2]])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("names", [["loss"], ["max", "max"]])
@pytest.mark.parametrize("fake", [False, True])
def test_names_that_are_none(names, fake):
    match = r"no measure 'loss'" if names == ["loss"] else "each measure once"
    match += r".*logsumexp, argmax, max, entropy, logits"
    if fake:
        with FakeTensorMode(), pytest.raises(ValueError, match=match):
            call(*tensors(), measures=names)
    else:
        with pytest.raises(ValueError, match=match):
            call(*tensors(), measures=names)


def test_no_measures_asked_for():
    inputs = tensors()
    (loss,) = call(*inputs, measures=[])
    assert torch.equal(loss, call(*inputs))


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("ignored", [False, True])
def test_token_counts(tokens, reduction, ignored):
    *leaves, target = tensors(tokens=tokens)
    target.fill_(-100 if ignored else 3)
    names = [name for name in MEASURES if tokens or name != "argmax"]
    _, *taken = call(*leaves, target, reduction=reduction, measures=names)
    expected = reference.logits(*leaves)
    if tokens:
        every = reference.measures(expected)
        every["losses"] = F.cross_entropy(expected, target, reduction="none")
        every |= {
            f"topk_{part}:{k}": getattr(expected.topk(k), part)
            for part in ("values", "indices")
            for k in (3, 5)
        }
        torch.testing.assert_close(taken, [every[name] for name in names])
    else:
        assert [len(t) for t in taken] == [0] * len(names)


@pytest.mark.parametrize(("reduction", "dynamic"), itertools.product(("mean", "none"), (0, 1)))
def test_compiled_by_inductor(reduction, dynamic):
    """The list of results, and of names, on the way through AOTAutograd and Inductor."""

    def step(hidden, weight, target):
        problem = (hidden, weight, None, target, *[None] * 5, reduction)
        problem += (-100, 0.0, 0.5, 3.0, "tanh")
        loss, lse, argmax, logits = op_and_measures(
            *problem, torch.float32, 10, ["logsumexp", "argmax", "logits"]
        )
        hits = (argmax == target).sum()
        return loss.sum() + (1e-2 * lse.square().sum() if reduction == "none" else 0), hits, logits

    hidden, weight, _, target = tensors()
    results = []
    for function in (step, torch.compile(step, fullgraph=True, dynamic=bool(dynamic))):
        leaves = [reference.leaf(hidden), reference.leaf(weight)]
        loss, *rest = function(*leaves, target)
        assert not rest[1].requires_grad
        loss.backward()
        results.append([loss.detach(), *rest, *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*results)
