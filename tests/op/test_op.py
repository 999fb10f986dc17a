"""The op against FP64: values, gradients, and the edges where eager has something to say."""

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from lmhead_pass.op.kernels import aten_loop as aten
from lmhead_pass.op.problem import Problem

from .. import reference
from .cases import DTYPES, VIEWS, call, op, op_and_measures, tensors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("smoothing", "weighted", "bias"),
    list(itertools.product((0.0, 0.1), (False, True), (False, True))),
)
def test_values_and_gradients(dtype, reduction, smoothing, weighted, bias):
    inputs = [*tensors(dtype, bias=bias), torch.rand(101).to(dtype) if weighted else None]
    upstream = torch.randn(37) if reduction == "none" else torch.tensor(1 / 3)
    results = assert_no_worse(
        inputs, {"reduction": reduction, "label_smoothing": smoothing}, upstream
    )
    assert [r.dtype for r in results[1:]] == [dtype] * (2 + bias)


def assert_no_worse(inputs, options, upstream):
    """The op's loss and gradients of ``inputs``, beside those of the unfused model."""

    def plain(*args):
        return reference.linear_cross_entropy(*args, **options)

    exact = reference.run(plain, reference.doubles(inputs), upstream.double())
    # These are leaves of contiguous memory, and the op gets what it was given.
    unfused = reference.run(plain, [reference.leaf(t) for t in inputs], upstream)
    inputs = [t if t is None else t.detach().requires_grad_(t.requires_grad) for t in inputs]
    results = reference.run(lambda *args: call(*args, **options), inputs, upstream)
    reference.assert_no_worse(results, unfused, exact, inputs[0].dtype)
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_error_does_not_grow_with_the_number_of_chunks(dtype, reduction):
    hidden, weight, _, target = tensors(dtype, tokens=512, hidden=32, vocab=300, ignored=False)
    weight.data *= 0.1

    def gradient(function, dtype):
        leaves = [reference.leaf(hidden, dtype), reference.leaf(weight, dtype)]
        function(*leaves).mean().backward()
        return leaves[1].grad.double()

    exact = gradient(
        lambda h, w: F.cross_entropy(h @ w.t(), target, reduction=reduction), torch.float64
    )

    def error(chunks):
        result = gradient(
            lambda h, w: call(h, w, None, target, reduction=reduction, rows=512 // chunks), dtype
        )
        return ((result - exact).norm() / exact.norm()).item()

    errors = [error(chunks) for chunks in (1, 4, 16, 64)]
    # A rounding of each chunk's share is independent of the others': it adds one rounding to the
    # sum's own, however many chunks there are. Sums in the narrow dtype would grow to 4 times that.
    assert max(errors[1:]) < 2 * errors[0]
    assert errors[-1] < 1.3 * errors[1]


# The same matrix, in the first words, the first columns, or the transpose of a larger one.
SCALES_AND_CAPS = [
    *((0.25, None, "tanh"), (-1.5, None, "tanh"), (1.0, 2.0, "tanh"), (-0.5, 3.0, "tanh")),
    *((1.0, 2.0, "algebraic"), (-0.5, 3.0, "algebraic")),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("logit_scale", "softcap", "kind"), SCALES_AND_CAPS)
@pytest.mark.parametrize("with_all", [False, True], ids=["plain", "all"])
def test_scale_and_softcap(dtype, reduction, logit_scale, softcap, kind, with_all):
    options = {"reduction": reduction, "logit_scale": logit_scale, "softcap": softcap}
    options["softcap_kind"] = kind
    options["label_smoothing"] = 0.1 if with_all else 0.0
    class_weight = torch.rand(101).to(dtype) if with_all else None
    inputs = [*tensors(dtype, bias=with_all), class_weight]
    upstream = torch.randn(37) if reduction == "none" else torch.tensor(1 / 3)
    assert_no_worse(inputs, options, upstream)


def some_masked(value=0.5):
    """Every third word has this logit."""
    return torch.where(torch.arange(101) % 3 == 0, value, torch.nan)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("with_all", [False, True], ids=["plain", "all"])
def test_masked_words(dtype, reduction, with_all):
    """Some are targets; as logits they count as much as any other word, and have no gradient."""
    options = {"reduction": reduction}
    class_weight = None
    if with_all:
        options |= {"label_smoothing": 0.1, "logit_scale": -0.5, "softcap": 3.0}
        class_weight = torch.rand(101).to(dtype)
    inputs = [*tensors(dtype, bias=with_all), class_weight, None, None, None, some_masked()]
    upstream = torch.randn(37) if reduction == "none" else torch.tensor(1 / 3)
    results = assert_no_worse(inputs, options, upstream)
    assert not results[2][::3].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_words_under_terms_of_log_sum_exps(dtype):
    given = [None, torch.randn(37), torch.randn(37), torch.randn(37), some_masked(9.0)]
    inputs = [*tensors(dtype), *given]
    assert_no_worse(inputs, {"reduction": "sum"}, torch.tensor(1 / 3))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("fill", [-torch.inf, torch.finfo(torch.float32).min, -1e4])
def test_a_target_that_is_masked(fill, reduction):
    """The loss may be infinite; the gradient is that of the other words, as eager has it."""
    inputs = [*tensors(torch.float64, ignored=False), *[None] * 4, some_masked(fill).double()]
    results, expected = (
        reference.run(
            lambda *a, f=f: f(*a, reduction=reduction),
            [reference.leaf(t) for t in inputs],
            torch.linspace(0, 1, 37) if reduction == "none" else torch.ones(()),
        )
        for f in (call, reference.linear_cross_entropy)
    )
    assert (results[0].amax() == torch.inf) == (fill == -torch.inf)
    torch.testing.assert_close(results, expected)


def test_saturated_logits_keep_their_gradient():
    """In FP32 ``1 - tanh^2`` is 0 for the largest of these, and has no digit for many more."""
    target = tensors(tokens=24, ignored=False)[3]
    weight = torch.randn(101, 16).sign() * torch.linspace(1, 9, 101).unsqueeze(1)
    hidden = torch.eye(24, 16).requires_grad_()
    inputs = [hidden, weight.requires_grad_(), None, target]

    def gradients(function, dtype=None):
        leaves = [reference.leaf(t, dtype if t is not None and t.requires_grad else None)
                  for t in inputs]  # fmt: skip
        function(*leaves).backward()
        return leaves[1].grad.double()

    exact = gradients(
        lambda *a: reference.linear_cross_entropy(*a, softcap=1.0), dtype=torch.float64
    )
    ours = gradients(lambda *a: call(*a, softcap=1.0))
    unfused = gradients(lambda *a: reference.linear_cross_entropy(*a, softcap=1.0))

    def error(result):  # of each word by itself, whose gradient is as small as its slope
        return ((result - exact).abs().amax(1) / exact.abs().amax(1)).amax().item()

    # exp(2 y) for y up to 9 knows 18 roundings of y less; the softmax and the sums add a few.
    assert error(ours) < 64 * torch.finfo(torch.float32).eps < error(unfused)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_all", [False, True], ids=["plain", "all"])
def test_coefficient(dtype, with_all):
    options = {"reduction": "sum"}
    class_weight = None
    if with_all:
        options |= {"label_smoothing": 0.1, "logit_scale": -0.5, "softcap": 3.0}
        class_weight = torch.rand(101).to(dtype)
    coefficient = torch.randn(37).to(dtype)
    coefficient[:4] = 0
    inputs = [*tensors(dtype, bias=with_all), class_weight, coefficient]
    assert_no_worse(inputs, options, torch.tensor(1 / 3))


@pytest.mark.parametrize("with_all", [False, True], ids=["plain", "all"])
@pytest.mark.parametrize("with_z_loss", [False, True], ids=["linear", "square"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_terms_of_log_sum_exps(dtype, with_z_loss, with_all):
    """Also of rows whose target is ignored, as ``tensors`` has them."""
    options = {"reduction": "sum"}
    given = [None, None, torch.randn(37).to(dtype), None]
    if with_z_loss:
        given[3] = torch.randn(37).to(dtype)
    if with_all:
        options |= {"label_smoothing": 0.1, "logit_scale": -0.5, "softcap": 3.0}
        given[:2] = torch.rand(101).to(dtype), torch.randn(37).to(dtype)
    assert_no_worse([*tensors(dtype, bias=with_all), *given], options, torch.tensor(1 / 3))


@pytest.mark.parametrize("factor", [1e-5, 1e6])
@pytest.mark.parametrize("logit_scale", [1.0, -40.0])
def test_z_loss_in_float16_neither_underflows_nor_overflows(factor, logit_scale):
    """Its gradient reaches as far as the log-sum-exp, which is not known before but for bounds."""
    hidden, weight, bias, target = tensors(torch.float16, bias=True)
    with torch.no_grad():
        bias[7] = -torch.inf if logit_scale > 0 else torch.inf
    target[target == 7] = 8
    terms = [None, factor * torch.ones(37), None, factor * torch.rand(37)]
    upstream = torch.tensor(1 / factor)
    options = {"reduction": "sum", "logit_scale": logit_scale}
    assert_no_worse([hidden, weight, bias, target, *terms], options, upstream)


TERMS = ("logsumexp", "square")
REACHING = {
    "coefficient": {"logsumexp": 1e6},
    "bias": {"square": 1e3, "bias": 1e3},
    "scale": {"square": 1e3, "bias": 100, "logit_scale": 200.0},
    "negative scale": {"square": 1e3, "bias": -100, "logit_scale": -200.0},
}


@pytest.mark.parametrize("kind", REACHING)
def test_terms_of_log_sum_exps_in_float16_do_not_overflow(kind):
    """Wherever their gradients' size comes from; that of the losses themselves is about 1."""
    given = REACHING[kind]
    hidden, weight, bias, target = tensors(torch.float16, bias=True)
    with torch.no_grad():
        hidden *= 0.01
        bias[3:6] = given.get("bias", 0)
    terms = [given[name] * torch.rand(37) if name in given else None for name in TERMS]
    options = {"reduction": "sum", "logit_scale": given.get("logit_scale", 1.0)}
    upstream = torch.tensor(1e-7)
    assert_no_worse([hidden, weight, bias, target, None, None, *terms], options, upstream)


BY_ROW = ["coefficient", "logsumexp_coefficient", "z_loss"]


@pytest.mark.parametrize("name", BY_ROW)
def test_coefficients_are_constants(name):
    coefficient = torch.rand(37).requires_grad_()
    call(*tensors(), **{name: coefficient}, reduction="sum").backward()
    assert coefficient.grad is None


def test_a_row_with_a_coefficient_of_0_may_have_any_loss():
    """As under ``torch.where``; an ignored row has no loss, whatever its coefficient."""
    hidden, weight, _, target = tensors(ignored=False)
    bias = torch.zeros(101)
    target[3], bias[7] = 7, -torch.inf
    target[target == 7] = 8
    target[3] = 7
    coefficient = torch.ones(37)
    options = {"reduction": "sum", "coefficient": coefficient}
    assert call(hidden, weight, bias, target, **options).isposinf()
    coefficient[3] = 0
    kept = torch.arange(37) != 3

    def masked(hidden, weight):
        losses = F.cross_entropy(F.linear(hidden, weight, bias), target, reduction="none")
        return torch.where(kept, losses, 0).sum()

    results = reference.run(
        lambda *leaves: call(*leaves, bias, target, **options), (hidden, weight)
    )
    expected = reference.run(masked, [reference.leaf(t) for t in (hidden, weight)])
    torch.testing.assert_close(results, expected)
    target[3] = -100
    coefficient[3] = torch.nan
    assert call(hidden, weight, bias, target, **options).isfinite()


@pytest.mark.parametrize("name", ["logsumexp_coefficient", "z_loss"])
def test_a_row_with_a_coefficient_of_0_may_have_any_log_sum_exp(name):
    hidden, weight, _, target = tensors(ignored=False)
    target[3] = -100
    with torch.no_grad():
        hidden[3] = torch.inf
    coefficient = torch.ones(37)
    options = {"reduction": "sum", name: coefficient}
    assert not call(hidden, weight, None, target, **options).isfinite()
    coefficient[3] = 0
    assert call(hidden, weight, None, target, **options).isfinite()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("name", BY_ROW)
def test_coefficients_need_a_sum(name, reduction, requires_grad, fake):
    with FakeTensorMode() if fake else contextlib.nullcontext():
        inputs = [t.detach().requires_grad_(requires_grad) if t is not None and
                  t.is_floating_point() else t for t in tensors()]  # fmt: skip
        with pytest.raises(ValueError, match=f"'sum' only, not with '{reduction}'"):
            call(*inputs, reduction=reduction, **{name: torch.rand(37)})


NONSENSE = {
    "reduction": ({"reduction": "avg"}, "'mean', 'sum' or 'none' as reduction, not 'avg'"),
    "label_smoothing": ({"label_smoothing": 1.5}, "as label_smoothing, not 1.5"),
    "negative_smoothing": ({"label_smoothing": -0.1}, "as label_smoothing, not -0.1"),
    "logit_scale": ({"logit_scale": 0.0}, "as logit_scale, not 0.0"),
    "softcap": ({"softcap": 0.0}, "as softcap, not 0.0"),
    "no_words": ({"words": 0}, "as vocab_chunk_size, not 0"),
    "words_and_smoothing": (
        {"words": 9, "label_smoothing": 0.1}, "takes 0 beside vocab_chunk_size as label_smoothing"
    ),
    "no_rows": ({"rows": 0}, "as batch_chunk_size, not 0"),
    "negative_rows": ({"rows": -3}, "as batch_chunk_size, not -3"),
    "target": ({"target": torch.zeros(36, dtype=torch.int64)}, r"as target: 37, not \[36\]"),
    "one_target": ({"target": torch.zeros(1, dtype=torch.int64)}, r"as target: 37, not \[1\]"),
    "target_dtype": ({"target": torch.zeros(37)}, "a target of torch.int64, not torch.float32"),
    "bias": ({"bias": torch.zeros(100)}, r"as bias: 101, not \[100\]"),
    "class_weight": ({"class_weight": torch.ones(1)}, r"as class_weight: 101, not \[1\]"),
    "weight": ({"weight": torch.zeros(101, 15)}, "a weight of 16 columns, as hidden has, not 15"),
    "hidden": ({"hidden": torch.zeros(37, 1, 16)}, "a matrix as hidden"),
    "coefficient": (
        {"coefficient": torch.ones(1), "reduction": "sum"}, r"as coefficient: 37, not \[1\]"
    ),
    "measure": ({"measures": ["perplexity"]}, "no measure 'perplexity'.* has logsumexp"),
    "no_count": ({"measures": ["topk_values"]}, "no measure 'topk_values'.* topk_values:k"),
    "count_of_others": ({"measures": ["max:2"]}, "no measure 'max:2'"),
    "largest_0": ({"measures": ["topk_values:0"]}, "at least 1 word in 'topk_values:0'"),
    "largest_of_too_many": ({"measures": ["topk_indices:102"]}, "102 of 101 words"),
    "measure_twice": ({"measures": ["max", "max"]}, "each measure once"),
}  # fmt: skip


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_refused_by_name(name, fake):
    options, message = NONSENSE[name]
    inputs = dict(zip(("hidden", "weight", "bias", "target"), tensors(), strict=True)) | options
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
    with mode, pytest.raises(ValueError, match=message):
        call(**inputs)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
@pytest.mark.parametrize("logit_scale", [2.0**12, -(2.0**12)])
def test_float16_scaling_knows_the_logit_scale(logit_scale, factor):
    """What goes through the products is the gradient before the scale, times any upstream."""
    hidden, weight, _, target = tensors(torch.float16)
    hidden.data /= 2**6
    weight.data /= 2**6
    inputs = [hidden, weight, None, target]
    upstream = factor * torch.rand(37)
    options = {"reduction": "none", "logit_scale": logit_scale}

    def gradients(function, dtype=None):
        leaves = [
            reference.leaf(t, dtype if t is not None and t.is_floating_point() else None)
            for t in inputs
        ]
        loss = function(*leaves, **options)
        loss.backward(upstream.to(loss.dtype))
        return [leaf.grad for leaf in leaves[:2]]

    exact = gradients(reference.linear_cross_entropy, torch.float64)
    problem = Problem(
        *(hidden.detach(), weight.detach(), None, target, *[None] * 5),
        *("none", -100, 0.0, logit_scale, None, "tanh", torch.float16, 10),
    )
    _, row_max, log_sum = aten.forward(problem, [])
    results = aten.backward(problem, [True, True, False], row_max, log_sum, upstream, None)
    # Held in FP32, so that these are not rounded again: logits, gradients of logits and products
    # are, to FP16.
    for error in reference.errors(results[:2], exact):
        assert error < 4 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", VIEWS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_weight_that_is_a_view(dtype, layout, reduction):
    hidden, weight, _, target = tensors(dtype)
    weight = VIEWS[layout](weight.detach())
    assert_no_worse(
        [hidden, weight.requires_grad_(), None, target],
        {"reduction": reduction},
        torch.randn(37 if reduction == "none" else ()),
    )


@pytest.mark.parametrize("measures", [None, ["logsumexp", "argmax", "max", "entropy", "logits"]])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_opcheck(reduction, measures):
    extra = [] if measures is None else [measures]
    public = op if measures is None else op_and_measures
    of_rows = [torch.rand(37) if reduction == "sum" else None for _ in range(3)]
    problem = [*tensors(), None, *of_rows, None, reduction]
    problem += [-100, 0.0, 1.0, None, "tanh", torch.float32, 10]
    torch.library.opcheck(public.default, (*problem, *extra))
    hidden, weight, bias, target = (
        t.detach() if t.is_floating_point() else t for t in tensors(bias=True)
    )
    needed = [True, False, True]
    problem = [hidden, weight, bias, target, torch.rand(101), *of_rows, some_masked()]
    problem += [reduction, -100, 0.1, -0.5, 3.0, "tanh", torch.float32, 10]
    private = torch.ops.lmhead_pass
    checks = ("test_schema", "test_faketensor")
    measures = measures or []
    torch.library.opcheck(private._forward.default, (*problem, measures), test_utils=checks)
    if reduction == "none":
        _, row_max, log_sum, *_ = private._forward(*problem, measures)
        for upstream in ((torch.rand(37), None), (None, torch.rand(37)), torch.rand(2, 37)):
            arguments = (*problem, needed, row_max, log_sum, *upstream)
            torch.library.opcheck(private._backward.default, arguments, test_utils=checks)
    else:
        arguments = (*problem, needed, measures)
        torch.library.opcheck(private._forward_and_gradients.default, arguments, test_utils=checks)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_tokens_ignored(reduction):
    hidden, weight, bias, target = tensors(bias=True)
    target.fill_(-100)
    loss = call(hidden, weight, bias, target, reduction=reduction)
    plain = reference.linear_cross_entropy(hidden, weight, bias, target, reduction=reduction)
    torch.testing.assert_close(loss, plain, equal_nan=True)
    # Divided by the number of tokens that count, as in training: eager has a NaN, and no gradient.
    (loss.sum() / (target != -100).sum()).backward()
    assert all(not leaf.grad.any() for leaf in (hidden, weight, bias))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tokens", [0, 1, 10, 11])
def test_token_counts(tokens, reduction):
    inputs = tensors(tokens=tokens, ignored=False)
    results = reference.run(lambda *a: call(*a, reduction=reduction), inputs, torch.ones(()).expand(
        tokens if reduction == "none" else ()))  # fmt: skip
    leaves = [reference.leaf(t) for t in inputs]
    expected = reference.run(
        lambda *a: reference.linear_cross_entropy(*a, reduction=reduction),
        leaves,
        torch.ones(()).expand(tokens if reduction == "none" else ()),
    )
    for result, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(result, exact, equal_nan=True)


@pytest.mark.parametrize(("vocab", "hidden"), [(1, 16), (101, 1), (1, 1)])
def test_sizes_of_one(vocab, hidden):
    inputs = tensors(torch.float64, vocab=vocab, hidden=hidden, bias=True)
    leaves = [reference.leaf(t) for t in inputs]
    for result, exact in zip(
        reference.run(call, inputs),
        reference.run(reference.linear_cross_entropy, leaves),
        strict=True,
    ):
        torch.testing.assert_close(result, exact)


@pytest.mark.parametrize("bad", [101, -1, 2**40])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_out_of_range_target_is_an_error(bad, requires_grad):
    hidden, weight, bias, target = tensors()
    hidden.requires_grad_(requires_grad)
    weight.requires_grad_(requires_grad)
    target[3] = bad
    with pytest.raises(IndexError) as eager:
        reference.linear_cross_entropy(hidden, weight, bias, target)
    with pytest.raises(IndexError) as ours:
        call(hidden, weight, bias, target)
    assert str(ours.value) == str(eager.value)


def test_ignore_index_inside_the_vocabulary():
    inputs = tensors(torch.float64, ignored=False)
    inputs[-1][:20] = 7
    leaves = [reference.leaf(t) for t in inputs]
    exact = reference.run(lambda *a: reference.linear_cross_entropy(*a, ignore_index=7), leaves)
    for result, expected in zip(
        reference.run(lambda *a: call(*a, ignore_index=7), inputs), exact, strict=True
    ):
        torch.testing.assert_close(result, expected)


def test_strided_hidden_weight_and_target():
    wide_hidden = torch.randn(16, 74, dtype=torch.float64).requires_grad_()
    wide_weight = torch.randn(16, 202, dtype=torch.float64).requires_grad_()
    target = torch.randint(101, (74,))[::2]

    def strided(function):
        return lambda h, w: function(h.t()[::2], w.t()[::2], None, target)

    results = reference.run(strided(call), [wide_hidden, wide_weight])
    leaves = [reference.leaf(wide_hidden), reference.leaf(wide_weight)]
    for result, exact in zip(
        results, reference.run(strided(reference.linear_cross_entropy), leaves), strict=True
    ):
        torch.testing.assert_close(result, exact)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward(reduction):
    hidden, weight, bias, target = tensors(bias=True)
    loss = 0.3 * call(hidden, weight, bias, target, reduction=reduction).sum()
    loss.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in (hidden, weight, bias)]
    loss.backward()
    for leaf, grad in zip((hidden, weight, bias), once, strict=True):
        assert torch.equal(leaf.grad, 2 * grad)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_several_upstream_gradients_at_once(reduction):
    hidden, weight, _, target = tensors()
    loss = call(hidden, weight, None, target, reduction=reduction).sum()
    factors = hidden.new_tensor([1.0, -2.5])
    each = [torch.autograd.grad(loss, hidden, one, retain_graph=True)[0] for one in factors]
    (both,) = torch.autograd.grad(loss, hidden, factors, is_grads_batched=True)
    torch.testing.assert_close(both, torch.stack(each))


def test_what_hooks_see_of_saved_tensors_stays_as_it_was():
    seen = []

    def pack(tensor):
        seen.append((tensor, tensor.clone()))
        return tensor

    hidden, weight, _, target = tensors()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = call(hidden, weight, None, target)
    (3 * loss).backward()
    assert seen
    assert all(torch.equal(tensor, before) for tensor, before in seen)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_is_refused(reduction):
    hidden, weight, bias, target = tensors()
    loss = call(hidden, weight, bias, target, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match=r"no second derivative.*lmhead_pass\.disabled"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [("weight",), ("hidden",), ("weight", "hidden", "bias")])
def test_nothing_is_computed_for_what_needs_no_gradient(frozen, reduction):
    leaves = dict(zip(("hidden", "weight", "bias"), tensors(bias=True)[:3], strict=True))
    for name in frozen:
        leaves[name].requires_grad_(False)
    target = tensors()[3]
    with torch.profiler.profile() as profiler:
        loss = call(*leaves.values(), target, reduction=reduction, rows=64).sum()
        if loss.requires_grad:
            loss.backward()
    products = sum(
        event.count
        for event in profiler.key_averages()
        if event.key in ("aten::mm", "aten::addmm", "aten::addmm_")
    )
    recomputed = reduction == "none" and len(frozen) < 3
    assert products == 1 + recomputed + ("hidden" not in frozen) + ("weight" not in frozen)
    assert all((leaf.grad is None) == (name in frozen) for name, leaf in leaves.items())


def test_huge_and_infinite_logits():
    """A padded vocabulary masked with -inf, and logits of 1e4, as FP64 sees them."""
    hidden, weight, _, target = tensors(torch.float32, vocab=128, ignored=False)
    target %= 100
    bias = torch.zeros(128)
    bias[100:] = -torch.inf
    weight.data *= 1000
    inputs = [hidden, weight, bias, target]
    exact = reference.run(reference.linear_cross_entropy, reference.doubles(inputs))
    unfused = reference.run(reference.linear_cross_entropy, [reference.leaf(t) for t in inputs])
    reference.assert_no_worse(reference.run(call, inputs), unfused, exact, torch.float32)


def test_confident_rows_keep_their_gradient():
    """Probabilities that round to 1 in FP32: what is left of ``p - 1`` is the whole gradient."""
    target = torch.arange(8)
    hidden = (torch.eye(8, 16) * 20).requires_grad_()
    weight = torch.eye(101, 16).requires_grad_()
    inputs = [hidden, weight, None, target]
    exact = reference.run(reference.linear_cross_entropy, reference.doubles(inputs))
    for error in reference.errors(reference.run(call, inputs), exact):
        assert error < 1e-5


def test_float16_gradients_neither_underflow_nor_overflow():
    """A mean over many tokens, a loss scale after it, and a word that every row has."""
    hidden, weight, _, target = tensors(torch.float16, tokens=4096, vocab=512, ignored=False)
    target[:4000] = 3
    hidden.data += 4
    inputs = [hidden, weight, None, target]
    scale = torch.tensor(2.0**10)
    exact = reference.run(
        reference.linear_cross_entropy,
        reference.doubles(inputs),
        scale.double(),
    )
    unfused = reference.run(
        lambda h, w, b, t: F.cross_entropy(F.linear(h, w).float(), t),
        [reference.leaf(t) for t in inputs],
        scale,
    )
    results = reference.run(lambda *a: call(*a, rows=512), inputs, scale)
    reference.assert_no_worse(results, unfused, exact, torch.float16)


def test_float16_holds_a_gradient_that_only_the_loss_scale_makes_visible():
    """Each entry is below FP16's smallest number until it is multiplied by the scale."""
    hidden, weight, _, target = tensors(torch.float16, tokens=4096, vocab=512, ignored=False)
    hidden.data *= 2.0**-16
    scale = torch.tensor(2.0**16)
    inputs = [hidden, weight, None, target]
    exact = reference.run(
        reference.linear_cross_entropy,
        reference.doubles(inputs),
        scale.double(),
    )
    results = reference.run(lambda *a: call(*a, rows=512), inputs, scale)
    assert exact[2].abs().max() / scale < 2.0**-24
    for error in reference.errors(results[1:], exact[1:]):
        assert error < 8 * torch.finfo(torch.float16).eps


def test_autocast_around_the_op_changes_nothing():
    hidden, weight, bias, target = tensors()
    plain = call(hidden, weight, bias, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(call(hidden, weight, bias, target), plain)


def test_upstream_gradient_is_not_rounded():
    """BF16 gradients of ``loss / 3`` are those of ``loss``, divided by 3 and rounded once."""
    hidden, weight, bias, target = tensors(torch.bfloat16)
    call(hidden, weight, bias, target).backward()
    whole = weight.grad.float()
    weight.grad = None
    (call(hidden, weight, bias, target) / 3).backward()
    assert torch.equal(weight.grad, (whole * (torch.tensor(1.0) / 3)).bfloat16())
