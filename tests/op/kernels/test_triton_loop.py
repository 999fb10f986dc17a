"""The GPU's chunk loop against FP64, on a GPU or through Triton's interpreter."""

import dataclasses
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lmhead_pass.op import holding
from lmhead_pass.op.kernels import aten_loop as aten
from lmhead_pass.op.kernels import wide_products as products
from lmhead_pass.op.kernels.measures import parse_measures
from lmhead_pass.op.problem import Pending, Problem, held_dtype

from ... import reference
from ...device import DEVICE, SUITE
from ..cases import VIEWS

triton_loop = pytest.importorskip("lmhead_pass.op.kernels.triton_loop")

TOKENS, HIDDEN, VOCAB = 13, 8, 301
MEASURES = ("logsumexp", "argmax", "max", "entropy", "logits")

# The interpreter computes with numpy, which warns of what the device does in silence.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), *SUITE]


def _problem(dtype=torch.float32, tokens=TOKENS, rows=4, **options):
    """Options are those of Problem, but for its tensors, which are True or False."""

    def random(*shape):
        return torch.randn(*shape, device=DEVICE).to(dtype)

    target = torch.randint(VOCAB, (tokens,), device=DEVICE)
    target[::5] = -100
    given = {
        "hidden": random(tokens, HIDDEN),
        "weight": random(VOCAB, HIDDEN) / 4,
        "target": target,
        "reduction": "mean",
        "ignore_index": -100,
        "label_smoothing": 0.0,
        "logit_scale": 1.0,
        "softcap": None,
        "softcap_kind": "tanh",
        "compute_dtype": dtype,
        "batch_chunk_size": rows,
    }
    given |= options
    given["bias"] = random(VOCAB) if options.get("bias") else None
    given["class_weight"] = random(VOCAB).abs() + 0.5 if options.get("class_weight") else None
    for name in ("coefficient", "logsumexp_coefficient", "z_loss"):
        given[name] = random(tokens) if options.get(name) else None
    given["fill"] = None
    if options.get("fill"):  # with targets among the masked words
        given["fill"] = torch.full((VOCAB,), torch.nan, device=DEVICE)
        given["fill"][target[:3].clamp(min=0)] = 0.5
        given["fill"][-40:] = -20.0
    return Problem(**given)


def _run(loop, problem, upstream, measures=()):
    """The loss, its gradients, and the measures."""
    needed, measures = [True, True, problem.bias is not None], parse_measures(measures)
    if problem.reduction == "none":
        loss, row_max, log_sum, *taken = loop.forward(problem, measures)
        gradients = loop.backward(problem, needed, row_max, log_sum, upstream, None)
    else:
        loss, gradients, taken = _in_forward(loop, problem, needed, measures)
    gradients = [gradient for gradient, wanted in zip(gradients, needed, strict=True) if wanted]
    return [loss, *gradients, *taken]


def _in_forward(loop, problem, needed, measures=()):
    """The loss, its three gradients, with what is left to the backward, and the measures."""
    loss, *results = loop.forward_and_gradients(problem, needed, measures)
    gradients, pending, taken = results[:3], Pending(*results[3:6]), results[6:]
    if pending.is_needed:
        one, dtype = torch.ones((), device=DEVICE), held_dtype(problem.weight.dtype)
        total, vocab = gradients[1], len(problem.weight)
        gradients[1] = loop.finish_weight_gradient(total, pending, one, vocab, dtype)
    return loss, gradients, taken


def _plain(problem, upstream, dtype=None, grad_logsumexp=None):
    """The loss and its gradients by plain PyTorch; with ``grad_logsumexp`` the sum of both."""
    leaves = [
        None if t is None else t.detach().to(dtype or t.dtype, copy=True).requires_grad_()
        for t in (problem.hidden, problem.weight, problem.bias)
    ]
    loss = reference.linear_cross_entropy(
        *leaves,
        problem.target,
        problem.class_weight,
        problem.coefficient,
        problem.logsumexp_coefficient,
        problem.z_loss,
        problem.fill,
        reduction=problem.reduction,
        label_smoothing=problem.label_smoothing,
        logit_scale=problem.logit_scale,
        softcap=problem.softcap,
        softcap_kind=problem.softcap_kind,
    )
    total = (loss * upstream).sum() if problem.reduction == "none" else loss
    if grad_logsumexp is not None:
        z = reference.logits(*leaves, *_of_logits(problem))
        total = total + (z.logsumexp(1) * grad_logsumexp).sum()
    total.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def _of_logits(problem):
    return (problem.logit_scale, problem.softcap, problem.softcap_kind, problem.fill)


def _assert_as_good(results, unfused, exact, dtype):
    # Triton's interpreter cuts what a device rounds to BF16: that is off by up to twice as much.
    cuts = DEVICE == "cpu" and dtype == torch.bfloat16
    reference.assert_no_worse(results, unfused, exact, dtype, roundings=1.5 if cuts else 1)


def _assert_no_worse(problem):
    upstream = torch.randn(problem.hidden.size(0), device=DEVICE)
    exact = _plain(problem, upstream, torch.float64)
    unfused = _plain(problem, upstream)
    results = _run(triton_loop, problem, upstream)
    _assert_as_good(results, unfused, exact, problem.compute_dtype)
    alone, *_ = triton_loop.forward(problem, [])
    torch.testing.assert_close(alone, results[0])

    results = _run(triton_loop, problem, upstream, MEASURES)
    loss_and_gradients, measures = results[: len(exact)], results[len(exact) :]
    _assert_as_good(loss_and_gradients, unfused, exact, problem.compute_dtype)
    assert_measures(problem, measures)


def assert_measures(problem, measures):
    """They are of all rows, also of those that have no loss."""
    measures = dict(zip(MEASURES, measures, strict=True))
    inputs = (problem.hidden, problem.weight, problem.bias)
    options = _of_logits(problem)
    exact = reference.measures(
        reference.logits(*(None if t is None else t.double() for t in inputs), *options)
    )
    unfused = reference.measures(reference.logits(*inputs, *options))
    assert torch.equal(measures["argmax"], measures["logits"].argmax(1))
    assert torch.equal(measures["max"].to(problem.compute_dtype), measures["logits"].amax(1))
    for names, dtype in (
        (("logits",), problem.compute_dtype),
        (("logsumexp", "entropy", "max"), problem.accumulate_dtype),
    ):
        ours, theirs, right = ([m[name] for name in names] for m in (measures, unfused, exact))
        assert {m.dtype for m in ours} == {dtype}
        _assert_as_good(ours, theirs, right, dtype)


LOSS = {"bias": True, "class_weight": True, "label_smoothing": 0.1}
LOGITS = {"logit_scale": -1.5, "softcap": 3.0}
OPTIONS = {
    "plain": {},
    "loss": LOSS,
    "scale": {"logit_scale": 0.25},
    "softcap": {"softcap": 2.0},
    "algebraic": {"softcap": 2.0, "softcap_kind": "algebraic"},
    "fill": {"fill": True},
    "all": {**LOSS, **LOGITS, "fill": True},
}


@pytest.fixture(autouse=True)
def held(request, monkeypatch):
    """What is held of a chunk: "exponentials" are of products in 16 bits alone."""
    is_hopper = getattr(request, "param", "logits") == "exponentials"
    monkeypatch.setattr(holding, "_is_hopper", lambda device: is_hopper)


def _held(*cases, slow=()):
    return pytest.mark.parametrize(
        ("dtype", "held"),
        [
            pytest.param(
                *case,
                id=f"{str(case[0]).removeprefix('torch.')}-{case[1]}",
                marks=[pytest.mark.slow] * (case in slow),
            )
            for case in (*cases, *slow)
        ],
        indirect=["held"],
    )


_THREE = (
    *((dtype, "logits") for dtype in (torch.float32, torch.bfloat16)),
    (torch.float16, "exponentials"),
)
_OTHERS = (
    *((dtype, "logits") for dtype in (torch.float64, torch.float16)),
    (torch.bfloat16, "exponentials"),
)
every_dtype = _held(*_THREE, *_OTHERS)
most_dtypes = _held(*_THREE, slow=_OTHERS)
three_dtypes = _held(
    *((dtype, "logits") for dtype in (torch.float32, torch.float16)),
    (torch.float16, "exponentials"),
)
both = pytest.mark.parametrize("held", ["logits", "exponentials"], indirect=True)


CASES = {  # reduction, options, rows
    **{f"mean-{options}-chunks": ("mean", options, 4) for options in OPTIONS},
    **{f"{r}-all-chunks": (r, "all", 4) for r in ("sum", "none")},
    **{f"none-{options}-chunks": ("none", options, 4) for options in ("plain", "algebraic")},
    **{f"{r}-plain-one_chunk": (r, "plain", 512) for r in ("mean", "sum", "none")},
    **{f"{r}-all-one_chunk": (r, "all", 512) for r in ("mean", "none")},
}


@pytest.mark.parametrize(("reduction", "options", "rows"), CASES.values(), ids=CASES)
@most_dtypes
def test_values_gradients_and_measures(dtype, reduction, options, rows):
    tokens = TOKENS + HIDDEN  # more than one chunk, also where a single one may be larger
    _assert_no_worse(_problem(dtype, tokens, rows, reduction=reduction, **OPTIONS[options]))


@pytest.mark.parametrize("options", ["plain", "fill", "all"])
@most_dtypes
def test_coefficient(dtype, options):
    problem = _problem(dtype, reduction="sum", coefficient=True, **OPTIONS[options])
    _assert_no_worse(problem)
    problem.coefficient[::5] = float("nan")  # of rows that have no loss
    assert triton_loop.forward(problem, [])[0].isfinite()


@pytest.mark.parametrize("options", ["plain", "fill", "all"])
@pytest.mark.parametrize("with_z_loss", [False, True], ids=["linear", "square"])
@most_dtypes
def test_terms_of_log_sum_exps(dtype, with_z_loss, options):
    given = dict.fromkeys(("coefficient", "logsumexp_coefficient"), True) | {"z_loss": with_z_loss}
    _assert_no_worse(_problem(dtype, reduction="sum", **given, **OPTIONS[options]))


@every_dtype
@pytest.mark.parametrize("fill", [-torch.inf, -1e30])
def test_targets_among_masked_words_have_no_entry_of_their_own(dtype, fill):
    """Whatever their loss is; a coefficient of 0 takes an infinite one out of the sum."""
    problem = _problem(dtype, reduction="sum", coefficient=True, fill=True)
    problem.fill[problem.target[1:4]] = fill
    problem.coefficient[1:4] = 0
    upstream = torch.ones((), device=DEVICE)
    exact, unfused = (
        _plain(dataclasses.replace(problem, target=problem.target.index_fill(
            0, torch.arange(1, 4, device=DEVICE), -100)), upstream, kind)
        for kind in (torch.float64, None)
    )  # fmt: skip
    _assert_as_good(_run(triton_loop, problem, upstream), unfused, exact, dtype)
    problem = dataclasses.replace(problem, reduction="none", coefficient=None)
    upstream = torch.ones(TOKENS, device=DEVICE)
    loss, *gradients = _run(triton_loop, problem, upstream)
    expected, *exact = _plain(problem, upstream, torch.float64)
    torch.testing.assert_close(loss, expected.to(loss.dtype), rtol=0.02, atol=0.02)
    _assert_as_good(gradients, _plain(problem, upstream)[1:], exact, dtype)


@both
def test_float16_keeps_small_probabilities():
    """Those that a loss scale of 2^16 would keep in the unfused model, with few tokens."""
    weight = torch.zeros(VOCAB, HIDDEN, device=DEVICE, dtype=torch.float16)
    weight[3, 0] = 24.25  # e^24.25 is about 2^35
    hidden = torch.zeros(1, HIDDEN, device=DEVICE, dtype=torch.float16)
    hidden[0, 0] = 1
    problem = dataclasses.replace(
        _problem(torch.float16, tokens=1),
        weight=weight,
        hidden=hidden,
        target=torch.tensor([3], device=DEVICE),
    )
    gradient = _run(triton_loop, problem, None)[2]
    exact = _plain(problem, None, torch.float64)[2]
    # At 2^-21 of FP16 three bits are left.
    torch.testing.assert_close(gradient.double(), exact, rtol=1 / 16, atol=0)


@pytest.mark.parametrize("which", ["logsumexp", "both"])
@pytest.mark.parametrize("options", ["plain", "fill", "all"])
@every_dtype
def test_gradient_of_logsumexp(dtype, options, which):
    problem = _problem(dtype, reduction="none", **OPTIONS[options])
    upstream, of_lse = torch.randn(2, TOKENS, device=DEVICE)
    if which == "logsumexp":
        upstream = torch.zeros(TOKENS, device=DEVICE)
    exact, unfused = (
        _plain(problem, upstream, kind, of_lse) for kind in (torch.float64, problem.compute_dtype)
    )
    _, row_max, log_sum, lse = triton_loop.forward(problem, parse_measures(["logsumexp"]))
    torch.testing.assert_close(lse, row_max + log_sum, rtol=0, atol=0)
    needed = [True, True, problem.bias is not None]
    gradients = triton_loop.backward(
        *(problem, needed, row_max, log_sum, None if which == "logsumexp" else upstream, of_lse)
    )
    gradients = gradients[: len(exact) - 1]
    assert gradients[0][::5].abs().amax(1).all()  # of rows that have no loss
    _assert_as_good(gradients, unfused[1:], exact[1:], dtype)


@pytest.mark.parametrize("shape", ["words", "columns", "transposed"])
def test_a_weight_that_is_a_view_is_not_copied(shape):
    plain = _problem(tokens=40, rows=1)
    weight = VIEWS[shape](plain.weight)
    view = Problem(**{**vars(plain), "weight": weight})
    sizes, results = [], []
    for problem in (plain, view):
        with _Calls() as calls:
            results.append(_run(triton_loop, problem, None, ["logsumexp"]))
        calls.memory.pop(problem.weight.untyped_storage().data_ptr())  # seen as a view
        sizes.append(sorted(calls.memory.values()))
    assert sizes[0] == sizes[1]
    torch.testing.assert_close(results[1], results[0])


@both
@pytest.mark.parametrize("rows", [4, 512])
def test_narrow_products_of_wide_tensors(rows):
    """As under autocast: gradients of FP32 tensors are not rounded to the dtype of the products."""
    problem = _problem(torch.float32, TOKENS, rows, compute_dtype=torch.bfloat16)
    upstream = torch.ones(TOKENS, device=DEVICE)
    rounded = Problem(
        **{
            **vars(problem),
            "hidden": problem.hidden.bfloat16(),
            "weight": problem.weight.bfloat16(),
        }
    )
    exact = _plain(rounded, upstream, torch.float64)
    results = _run(triton_loop, problem, upstream)
    assert [result.dtype for result in results] == [torch.float32] * 3
    _assert_as_good(results, _plain(rounded, upstream), exact, torch.bfloat16)


@both
def test_rounding_is_that_of_one_product_however_many_chunks():
    """The weight's gradient is summed in FP32: 64 roundings to BF16 would be 64 times the error."""
    few = _problem(torch.bfloat16, 128, 128)
    many = Problem(**{**vars(few), "batch_chunk_size": 2})
    upstream = torch.ones(128, device=DEVICE)
    exact = _plain(few, upstream, torch.float64)
    few, many = (reference.errors(_run(triton_loop, p, upstream), exact) for p in (few, many))
    for one, other in zip(many, few, strict=True):
        # Sums in FP32 that differ in order may round to neighbours in BF16.
        assert one <= other + torch.finfo(torch.bfloat16).eps / 4


@both
@pytest.mark.parametrize("logit_scale", [1.0, -(2.0**12)])
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_fp16_gradients_neither_underflow_nor_overflow(factor, logit_scale):
    options = {"class_weight": True, "label_smoothing": 0.1, "logit_scale": logit_scale}
    problem = _problem(torch.float16, reduction="none", **options)
    problem.weight.div_(abs(logit_scale))
    upstream = torch.full((TOKENS,), factor, device=DEVICE)
    exact = _plain(problem, upstream, torch.float64)
    unfused = _plain(problem, torch.ones_like(upstream))
    unfused = [unfused[0], *(gradient.double() * factor for gradient in unfused[1:])]
    _, row_max, log_sum = triton_loop.forward(problem, [])
    needed = [True, True, False]
    gradients = triton_loop.backward(problem, needed, row_max, log_sum, upstream, None)
    _assert_as_good(gradients[:2], unfused[1:], exact[1:], torch.float16)


@both
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_fp16_gradients_of_logsumexp_neither_underflow_nor_overflow(factor):
    problem = _problem(torch.float16, reduction="none")
    zeros, of_lse = torch.zeros(TOKENS, device=DEVICE), torch.rand(TOKENS, device=DEVICE)
    exact, unfused = (_plain(problem, zeros, kind, of_lse) for kind in (torch.float64, None))
    _, row_max, log_sum, _ = triton_loop.forward(problem, parse_measures(["logsumexp"]))
    saved, needed = (row_max, log_sum), [True, True, False]
    gradients = triton_loop.backward(problem, needed, *saved, None, factor * of_lse)
    results = [gradient.double() / factor for gradient in gradients[:2]]
    _assert_as_good(results, unfused[1:], exact[1:], torch.float16)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@three_dtypes
@pytest.mark.parametrize("tokens", [0, 6])
def test_no_row_counts(reduction, dtype, tokens):
    problem = _problem(dtype, tokens, bias=True, reduction=reduction)
    problem.target.fill_(-100)
    loss, gradients, _ = _in_forward(triton_loop, problem, [True] * 3)
    assert loss.isnan() if reduction == "mean" else loss == 0
    assert not any(gradient.any() for gradient in gradients)


@both
@pytest.mark.parametrize("needed", [[True, False, False], [False, True, False], [False] * 3])
def test_only_what_is_needed(needed):
    problem = _problem(torch.bfloat16, bias=True)
    _, gradients, _ = _in_forward(triton_loop, problem, needed)
    _, every, _ = _in_forward(triton_loop, problem, [True] * 3)
    for gradient, full, wanted in zip(gradients, every, needed, strict=True):
        assert torch.equal(gradient, full) if wanted else gradient.numel() == 0


@both
def test_tensors_of_any_stride():
    plain = _problem(torch.bfloat16, bias=True, reduction="none")

    def strided(tensor):
        return torch.stack([tensor, tensor], -1)[..., 0]

    tensors = ("hidden", "weight", "bias", "target")
    spread = Problem(**{**vars(plain), **{name: strided(getattr(plain, name)) for name in tensors}})
    upstream = torch.rand(1, device=DEVICE).expand(TOKENS)
    results, expected = (_run(triton_loop, problem, upstream) for problem in (spread, plain))
    torch.testing.assert_close(results, expected)


@both
@pytest.mark.parametrize("bad", [-1, VOCAB])
@pytest.mark.skipif(DEVICE != "cpu", reason="a device assert ends the process: see test_gpu.py")
def test_target_out_of_range(bad):
    problem = _problem(torch.bfloat16)
    problem.target[3] = bad
    with pytest.raises(RuntimeError, match="a target is out of bounds"):
        triton_loop.forward(problem, [])


class _Calls(TorchDispatchMode):
    """Names of the operators called, and bytes of each memory that they made."""

    def __init__(self):
        super().__init__()
        self.names, self.memory, self._alive = set(), {}, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.add(function.overloadpacket.__name__)
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            self.memory[storage.data_ptr()] = storage.nbytes()
            self._alive.append(storage)  # so that no other gets its place
        return result


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@three_dtypes
def test_nothing_reads_the_device(reduction, dtype):
    by_row = ("coefficient", "logsumexp_coefficient", "z_loss")
    options = dict.fromkeys(by_row, reduction == "sum") | OPTIONS["all"]
    problem = _problem(dtype, reduction=reduction, **options)
    ones = torch.ones(TOKENS, device=DEVICE)
    with _Calls() as calls:
        _run(triton_loop, problem, ones)
        _run(triton_loop, problem, ones, MEASURES)
        if reduction == "none":
            triton_loop.backward(problem, [True] * 3, ones, ones, None, ones)
    reading = {"_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero"}
    assert not calls.names & reading
    with _Calls() as calls:  # the check can fail
        _run(aten, problem, ones)
    assert calls.names & reading


def test_only_one_buffer_of_the_size_of_the_weight():
    problem = _problem(tokens=40, rows=1)
    with _Calls() as calls:
        triton_loop.forward_and_gradients(problem, [True, True, False], [])
    size = VOCAB * HIDDEN * 4
    weight = problem.weight.untyped_storage().data_ptr()  # seen as a view
    large = [n for place, n in calls.memory.items() if n >= size and place != weight]
    assert large == [size]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_last_chunk_is_gone_before_sums_are_finished(reduction, monkeypatch):
    problem = _problem(torch.bfloat16, reduction=reduction)
    buffers, sums, rows = [], triton_loop._GradientSums, triton_loop.LogitRows
    made, finish = rows.__init__, sums.finish

    def make(self, *arguments):
        made(self, *arguments)
        buffers.append(weakref.ref(self._buffer))

    def finished(self):
        buffers.append(None)
        assert [buffer() for buffer in buffers[:-1]] == [None] * len(buffers[:-1])
        return finish(self)

    monkeypatch.setattr(rows, "__init__", make)
    monkeypatch.setattr(sums, "finish", finished)
    _run(triton_loop, problem, torch.ones(TOKENS, device=DEVICE))
    assert None in buffers
    assert len(buffers) > 1


@pytest.mark.parametrize("add", [False, True])
def test_products_widen_where_the_device_can(add, monkeypatch):
    """The call that CUDA gets; what it computes there, test_gpu.py shows."""
    calls = []
    monkeypatch.setattr(products, "_widens", lambda device: True)
    monkeypatch.setattr(torch, "addmm", lambda *args, **kwargs: calls.append((args, kwargs)))
    a, b = (torch.ones(3, 3, dtype=torch.bfloat16) for _ in range(2))
    out = torch.ones(3, 3)
    products.multiply_into(out, a, b, add)
    ((arguments, options),) = calls
    assert all(x is y for x, y in zip(arguments, (out, a, b), strict=True))
    assert options == {"out_dtype": torch.float32, "beta": int(add), "out": out}


def test_products_that_narrow():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    out = torch.empty(3, 5, dtype=torch.bfloat16)
    products.multiply_into(out, a, b)
    assert torch.equal(out, (a @ b).bfloat16())
