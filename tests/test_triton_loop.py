"""The GPU's chunk loop against FP64, on a GPU or through Triton's interpreter."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lmhead_pass.kernels import aten, products
from lmhead_pass.problem import Problem

from . import reference
from .triton_device import DEVICE  # before what imports Triton

from lmhead_pass.kernels import triton_loop  # isort: skip

TOKENS, HIDDEN, VOCAB = 13, 8, 301
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# The interpreter computes with numpy, which warns of what the device does in silence.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def _problem(dtype=torch.float32, tokens=TOKENS, rows=4, **options):
    """Options are those of Problem, but for bias and class_weight, which are True or False."""

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
        "compute_dtype": dtype,
        "batch_chunk_size": rows,
    }
    given |= options
    given["bias"] = random(VOCAB) if options.get("bias") else None
    given["class_weight"] = random(VOCAB).abs() + 0.5 if options.get("class_weight") else None
    return Problem(**given)


def _run(loop, problem, upstream):
    needed = [True, True, problem.bias is not None]
    if problem.reduction == "none":
        loss, row_max, log_sum = loop.forward(problem)
        gradients = loop.backward(problem, needed, row_max, log_sum, upstream)
    else:
        loss, *gradients = loop.forward_and_gradients(problem, needed)
    return [loss, *(gradient for gradient, wanted in zip(gradients, needed, strict=True) if wanted)]


def _plain(problem, upstream, dtype=None):
    leaves = [
        None if t is None else t.detach().to(dtype or t.dtype, copy=True).requires_grad_()
        for t in (problem.hidden, problem.weight, problem.bias)
    ]
    class_weight = problem.class_weight
    loss = reference.linear_cross_entropy(
        *leaves,
        problem.target,
        None if class_weight is None else class_weight.to(leaves[0].dtype),
        reduction=problem.reduction,
        label_smoothing=problem.label_smoothing,
    )
    loss.backward(upstream.to(loss.dtype) if problem.reduction == "none" else None)
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def _assert_no_worse(problem):
    upstream = torch.randn(problem.hidden.size(0), device=DEVICE)
    exact = _plain(problem, upstream, torch.float64)
    results = _run(triton_loop, problem, upstream)
    reference.assert_no_worse(results, _plain(problem, upstream), exact, problem.compute_dtype)
    alone, *_ = triton_loop.forward(problem)
    torch.testing.assert_close(alone, results[0])


@pytest.mark.parametrize("rows", [4, 512], ids=["chunks", "one_chunk"])
@pytest.mark.parametrize("with_all", [False, True], ids=["plain", "all"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype, reduction, with_all, rows):
    smoothing = 0.1 if with_all else 0.0
    tokens = TOKENS + HIDDEN  # more than one chunk, also where a single one may be larger
    problem = _problem(
        dtype, tokens, rows, reduction=reduction, bias=with_all, class_weight=with_all,
        label_smoothing=smoothing,
    )  # fmt: skip
    _assert_no_worse(problem)


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
    reference.assert_no_worse(results, _plain(rounded, upstream), exact, torch.bfloat16)


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


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_fp16_gradients_neither_underflow_nor_overflow(factor):
    problem = _problem(torch.float16, reduction="none", class_weight=True, label_smoothing=0.1)
    upstream = torch.full((TOKENS,), factor, device=DEVICE)
    exact = _plain(problem, upstream, torch.float64)
    unfused = _plain(problem, torch.ones_like(upstream))
    unfused = [unfused[0], *(gradient.double() * factor for gradient in unfused[1:])]
    _, row_max, log_sum = triton_loop.forward(problem)
    gradients = triton_loop.backward(problem, [True, True, False], row_max, log_sum, upstream)
    reference.assert_no_worse(gradients[:2], unfused[1:], exact[1:], torch.float16)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [0, 6])
def test_no_row_counts(reduction, dtype, tokens):
    problem = _problem(dtype, tokens, bias=True, reduction=reduction)
    problem.target.fill_(-100)
    loss, *gradients = triton_loop.forward_and_gradients(problem, [True] * 3)
    assert loss.isnan() if reduction == "mean" else loss == 0
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("needed", [[True, False, False], [False, True, False], [False] * 3])
def test_only_what_is_needed(needed):
    problem = _problem(bias=True)
    _, *gradients = triton_loop.forward_and_gradients(problem, needed)
    _, *every = triton_loop.forward_and_gradients(problem, [True] * 3)
    for gradient, full, wanted in zip(gradients, every, needed, strict=True):
        assert torch.equal(gradient, full) if wanted else gradient.numel() == 0


def test_tensors_of_any_stride():
    plain = _problem(bias=True, reduction="none")

    def strided(tensor):
        return torch.stack([tensor, tensor], -1)[..., 0]

    tensors = ("hidden", "weight", "bias", "target")
    spread = Problem(**{**vars(plain), **{name: strided(getattr(plain, name)) for name in tensors}})
    upstream = torch.rand(1, device=DEVICE).expand(TOKENS)
    results, expected = (_run(triton_loop, problem, upstream) for problem in (spread, plain))
    torch.testing.assert_close(results, expected)


@pytest.mark.parametrize("bad", [-1, VOCAB])
@pytest.mark.skipif(DEVICE != "cpu", reason="a device assert ends the process: see test_gpu.py")
def test_target_out_of_range(bad):
    problem = _problem()
    problem.target[3] = bad
    with pytest.raises(RuntimeError, match="a target is out of bounds"):
        triton_loop.forward(problem)


class _Calls(TorchDispatchMode):
    """Names of the operators called, and bytes of each memory that they made."""

    def __init__(self):
        super().__init__()
        self.names, self.memory = set(), {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.add(function.overloadpacket.__name__)
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            self.memory[storage.data_ptr()] = storage.nbytes()
        return result


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nothing_reads_the_device(reduction, dtype):
    problem = _problem(dtype, reduction=reduction, bias=True, class_weight=True)
    with _Calls() as calls:
        _run(triton_loop, problem, torch.ones(TOKENS, device=DEVICE))
    reading = {"_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero"}
    assert not calls.names & reading
    with _Calls() as calls:  # the check can fail
        _run(aten, problem, torch.ones(TOKENS, device=DEVICE))
    assert calls.names & reading


def test_only_one_buffer_of_the_size_of_the_weight():
    problem = _problem(tokens=40, rows=1)
    with _Calls() as calls:
        triton_loop.forward_and_gradients(problem, [True, True, False])
    size = VOCAB * HIDDEN * 4
    weight = problem.weight.untyped_storage().data_ptr()  # seen as a view
    large = [n for place, n in calls.memory.items() if n >= size and place != weight]
    assert large == [size]


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
