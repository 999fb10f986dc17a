"""The row kernels against FP64: every option, dtype, and shape that no block divides."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from ... import reference
from ...device import DEVICE, SUITE

pytest.importorskip("triton")

from lmhead_pass.op.kernels.triton_row_kernels import Terms, row_gradients, row_losses  # isort: skip

ROWS = 3
VOCABULARIES = (1, 2, 7, 1000, 4099)
OPTIONS = {
    "plain": lambda vocab: {},
    "bias": lambda vocab: {"bias": _random(vocab).bfloat16()},
    "class_weight": lambda vocab: {"class_weight": _positive(vocab)},
    "smoothing": lambda vocab: {"label_smoothing": 0.1},
    "smoothing_by_class_weight": lambda vocab: {
        "label_smoothing": 0.2,
        "class_weight": _positive(vocab),
    },
    "logit_scale": lambda vocab: {"logit_scale": 0.0625},
    "negative_scale": lambda vocab: {"logit_scale": -1.25, "bias": _random(vocab)},
    "softcap": lambda vocab: {"softcap": 3.0},
    "algebraic": lambda vocab: {"softcap": 3.0, "softcap_kind": "algebraic", "logit_scale": -1.5},
    "fill": lambda vocab: {"fill": _fill(vocab)},
    "all": lambda vocab: {
        "ignore_index": 0,
        "bias": _random(vocab),
        "class_weight": _positive(vocab),
        "label_smoothing": 0.1,
        "logit_scale": 1.5,
        "softcap": 5.0,
        "fill": _fill(vocab),
    },
}
# The dtype of the logits and that of their gradient.
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
]


# The interpreter computes with numpy, which warns of what the device does in silence.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), *SUITE]


def _random(*shape):
    return torch.randn(*shape, dtype=torch.float64, device=DEVICE)


def _positive(vocab):
    return torch.rand(vocab, dtype=torch.float64, device=DEVICE) + 0.5


def _fill(vocab):
    """Half of the words are masked, so that some targets are."""
    return torch.where(_random(vocab) > 0, _random(vocab), torch.nan)


def _targets(vocab, ignore_index=-100):
    target = torch.randint(vocab, (ROWS,), device=DEVICE)
    target[1] = ignore_index
    return target


def _plain(logits, target, terms):
    """Losses of rows as the kernels' text defines them, in the dtype of the logits."""
    dtype, logits = logits.dtype, _transformed(logits, terms)
    return F.cross_entropy(
        logits,
        target,
        None if terms.class_weight is None else terms.class_weight.to(dtype),
        ignore_index=terms.ignore_index,
        label_smoothing=terms.label_smoothing,
        reduction="none",
    )


def _transformed(logits, terms):
    if terms.bias is not None:
        logits = logits + terms.bias.to(logits.dtype)
    if terms.logit_scale is not None:
        logits = logits * terms.logit_scale
    if terms.softcap_kind == "algebraic":
        logits = terms.softcap * logits / (logits.square() + terms.softcap**2).sqrt()
    elif terms.softcap is not None:
        logits = terms.softcap * torch.tanh(logits / terms.softcap)
    if terms.fill is not None:
        logits = torch.where(terms.fill.isnan(), logits, terms.fill.to(logits.dtype))
    return logits


def _plain_and_gradient(logits, target, terms, coefficient, dtype):
    leaf = logits.detach().to(dtype).requires_grad_()
    losses = _plain(leaf, target, terms)
    (gradient,) = torch.autograd.grad(losses, leaf, coefficient.to(dtype))
    return [losses.detach(), gradient]


def _kernels(logits, target, terms, coefficient, gradient_dtype, in_place):
    """Losses and gradients of all three kernels: with losses, and from what was saved."""
    rows = logits.size(0)
    loss, fused_loss, row_max, log_sum = (logits.new_full((rows,), 7.0) for _ in range(4))
    row_losses(logits, target, terms, loss, row_max, log_sum)
    gradients = []
    for how in ({"loss": fused_loss}, {"saved": (row_max, log_sum)}):
        copy = logits.clone()
        gradient = copy.new_full(copy.shape, 7.0, dtype=gradient_dtype)
        if in_place:
            gradient = copy.view(gradient_dtype)[:, : copy.size(1)]
        row_gradients(copy, target, terms, gradient, coefficient, **how)
        gradients.append(gradient.clone())
    return [loss, gradients[0]], [fused_loss, gradients[1]]


def _assert_no_worse(ours, plain, exact, gradient_dtype):
    dtype, vocab = ours[0].dtype, ours[1].size(1)
    if dtype == torch.float64:  # the exact values are rounded too: their sums, and their 1 - p
        for mine, his in zip(ours, exact, strict=True):
            scale = his.abs().max().clamp_min(1).item()
            torch.testing.assert_close(mine, his, rtol=0, atol=(vocab + 8) * 2**-52 * scale)
    else:
        reference.assert_no_worse(ours[:1], plain[:1], exact[:1], dtype)
        reference.assert_no_worse(ours[1:], plain[1:], exact[1:], gradient_dtype)


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: str(pair[1]))
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_losses_and_gradients(vocab, options, dtypes, in_place=True):
    dtype, gradient_dtype = dtypes
    terms = Terms(**OPTIONS[options](vocab))
    logits = (3 * _random(ROWS, vocab)).to(dtype)
    target = _targets(vocab, terms.ignore_index)
    coefficient = _random(ROWS).to(dtype)
    given = (target, terms, coefficient)
    exact = _plain_and_gradient(logits, *given, torch.float64)
    plain = _plain_and_gradient(logits, *given, dtype)
    for ours in _kernels(logits, *given, gradient_dtype, in_place):
        _assert_no_worse(ours, plain, exact, gradient_dtype)
        assert not ours[1][target == terms.ignore_index].any()


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: str(pair[1]))
@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_log_sum_exps_of_every_row(vocab, options, dtypes):
    """Values and gradients, of the losses and the log-sum-exps at once; one row has no loss."""
    dtype, gradient_dtype = dtypes
    terms = Terms(**OPTIONS[options](vocab))
    logits = (3 * _random(ROWS, vocab)).to(dtype)
    target = _targets(vocab, terms.ignore_index)
    coefficient, of_lse = _random(2, ROWS).to(dtype)

    def plain(dtype):
        leaf = logits.detach().to(dtype).requires_grad_()
        losses, lse = _plain(leaf, target, terms), _transformed(leaf, terms).logsumexp(1)
        upstream = [coefficient.to(dtype), of_lse.to(dtype)]
        (gradient,) = torch.autograd.grad([losses, lse], leaf, upstream)
        return [losses.detach(), lse.detach(), gradient]

    loss, row_max, log_sum = (logits.new_full((ROWS,), 7.0) for _ in range(3))
    row_losses(logits, target, terms, loss, row_max, log_sum, every_row=True)
    assert (loss == 0).tolist() == (target == terms.ignore_index).tolist() or vocab == 1
    gradient = logits.view(gradient_dtype)[:, :vocab]
    exact, unfused = plain(torch.float64), plain(dtype)
    row_gradients(
        logits, target, terms, gradient, coefficient,
        saved=(row_max, log_sum), grad_logsumexp=of_lse,
    )  # fmt: skip
    for part in (slice(0, 1), slice(1, 2)):  # losses, then log-sum-exps
        ours = [loss, row_max + log_sum][part] + [gradient]
        _assert_no_worse(
            *(ours, unfused[part] + unfused[2:], exact[part] + exact[2:], gradient_dtype)
        )
    assert gradient[1].any()


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: str(pair[1]))
def test_gradients_beside_the_logits(dtypes):
    test_losses_and_gradients(4099, "all", dtypes, in_place=False)


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_any_stride(rows):
    vocab, columns = 300, 321
    logits, padding = _random(rows, columns).float(), slice(vocab, None)
    before = logits.clone()
    target, terms = torch.full((rows,), 7, device=DEVICE), Terms()
    loss = logits.new_empty(rows)
    part = logits[:, :vocab]
    row_gradients(part, target, terms, part, loss=loss)
    ones = torch.ones(rows, device=DEVICE)
    exact = _plain_and_gradient(before[:, :vocab], target, terms, ones, torch.float64)
    plain = _plain_and_gradient(before[:, :vocab], target, terms, ones, torch.float32)
    reference.assert_no_worse([loss, part], plain, exact, torch.float32)
    assert torch.equal(logits[:, padding], before[:, padding])


def test_coefficient_of_any_stride():
    logits, target, terms = _random(ROWS, 50).float(), _targets(50), Terms()
    gradients = []
    for coefficient in (torch.tensor(0.5, device=DEVICE).expand(ROWS), None):
        gradients.append(torch.empty_like(logits))
        loss = logits.new_empty(ROWS)
        row_gradients(logits, target, terms, gradients[-1], coefficient, loss=loss)
    assert torch.equal(gradients[0], gradients[1] / 2)


def test_offsets_past_32_bits(tmp_path):
    """The third row starts at element 2^31 of a sparse file, or of a GPU's memory."""
    vocab, stride = 10, 2**30
    size = 2 * stride + vocab
    if DEVICE == "cpu":
        file = tmp_path / "logits"
        memory = torch.from_file(str(file), shared=True, size=size, dtype=torch.float32)
    else:
        memory = torch.empty(size, device=DEVICE)
    logits = memory.as_strided((3, vocab), (stride, 1))
    logits.copy_(_random(3, vocab))
    target, coefficient = torch.arange(3, device=DEVICE), torch.ones(3, device=DEVICE)
    exact = _plain_and_gradient(logits, target, Terms(), coefficient, torch.float64)
    plain = _plain_and_gradient(logits, target, Terms(), coefficient, torch.float32)
    loss, row_max, log_sum = (torch.empty(3, device=DEVICE) for _ in range(3))
    row_losses(logits, target, Terms(), loss, row_max, log_sum)
    row_gradients(logits, target, Terms(), logits, saved=(row_max, log_sum))
    reference.assert_no_worse([loss, logits], plain, exact, torch.float32)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("spread", [1.0, 1e4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_huge_logits(offset, spread, smoothing):
    logits = (offset + spread * _random(ROWS, 300)).float()
    given = (_targets(300), Terms(label_smoothing=smoothing), torch.ones(ROWS, device=DEVICE))
    exact = _plain_and_gradient(logits, *given, torch.float64)
    plain = _plain_and_gradient(logits, *given, torch.float32)
    for ours in _kernels(logits, *given, torch.float32, in_place=True):
        reference.assert_no_worse(ours, plain, exact, torch.float32)


@pytest.mark.parametrize("scale", [1.0, 1.7])
@pytest.mark.parametrize("softcap", [None, 60.0])
@pytest.mark.parametrize("lead", [5.0, 15.0, 40.0])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: str(pair[1]))
def test_confident_rows_keep_their_digits(lead, dtypes, softcap, scale):
    """The loss and the target's own gradient are about exp(-lead): FP32's 1 - p would be 0."""
    dtype, gradient_dtype = dtypes
    terms = Terms(logit_scale=None if scale == 1 else scale, softcap=softcap)
    wanted, target = _random(ROWS, 7), torch.arange(ROWS, device=DEVICE)
    wanted[target, target] += lead
    if softcap is not None:
        wanted = softcap * torch.atanh(wanted / softcap)
    logits = (wanted / scale).to(dtype)
    # A factor that brings the gradients near 1, as FP16 needs.
    coefficient = torch.full((ROWS,), 2.0 ** round(lead / 0.7), dtype=dtype, device=DEVICE)
    leaf = logits.double().requires_grad_()
    transformed = _transformed(leaf, terms)
    (slope,) = torch.autograd.grad(transformed.sum(), leaf)
    nll, others = _exact_nll(transformed.detach(), target)
    others = others * slope[target, target]
    for loss, gradient in _kernels(logits, target, terms, coefficient, gradient_dtype, True):
        at_target = gradient[target, target].double() / coefficient
        # The exponential of a difference of logits knows no more digits than the difference.
        rounding = (lead + 8) * torch.finfo(dtype).eps * (1 if softcap is None else 4)
        torch.testing.assert_close(loss.double(), nll, rtol=rounding, atol=0)
        rounding += torch.finfo(gradient_dtype).eps
        torch.testing.assert_close(at_target, -others, rtol=rounding, atol=0)


def _exact_nll(logits, target):
    """-log p and 1 - p of the targets, summed over the other words."""
    relative = logits - logits.gather(1, target.unsqueeze(1))
    ratio = relative.exp().scatter(1, target.unsqueeze(1), 0).sum(1)
    return torch.log1p(ratio), ratio / (1 + ratio)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_infinite_logits_are_what_they_are_for_cross_entropy(smoothing):
    inf, vocab = float("inf"), 300
    logits = _random(5, vocab).float()
    target = torch.tensor([3, 4, 5, 6, 7], device=DEVICE)
    logits[0, 10:200] = -inf
    logits[1, 4] = -inf  # the target itself
    logits[2, :] = -inf
    logits[3, 9] = inf
    logits[4, 9] = float("nan")
    given = (target, Terms(label_smoothing=smoothing), torch.ones(5, device=DEVICE))
    exact = _plain_and_gradient(logits, *given, torch.float64)
    for ours in _kernels(logits, *given, torch.float32, in_place=True):
        for mine, his in zip(ours, exact, strict=True):
            torch.testing.assert_close(mine, his.float(), equal_nan=True)


@pytest.mark.parametrize("bad", [-1, 50, 2**40])
def test_target_out_of_range_is_never_a_number(bad):
    logits = _random(ROWS, 50).float()
    target = torch.full((ROWS,), bad, device=DEVICE)
    terms = Terms(class_weight=_positive(50), label_smoothing=0.1)
    for ours in _kernels(logits, target, terms, None, torch.float32, in_place=True):
        assert all(tensor.isnan().any(-1).all() for tensor in ours)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from lmhead_pass.op.kernels import triton_row_kernels as triton_rows

ON = dict(SMOOTHING=0.1, SMOOTHING_COEF=1e-6, LOGIT_SCALE=0.5, SOFTCAP=30.0)
OFF = dict(SMOOTHING=0.0, SMOOTHING_COEF=0.0, LOGIT_SCALE=None, SOFTCAP=None)
OFF |= dict(bias_ptr=None, class_weight_ptr=None, class_weight_sum_ptr=None, coefficient_ptr=None)
OFF |= dict(fill_ptr=None)
NO_LSE = dict(grad_logsumexp_ptr=None)
SAVED, SAVED_WITH_LSE = dict(loss_ptr=None, **NO_LSE), dict(loss_ptr=None)
FUSED = dict(row_max_ptr=None, log_sum_ptr=None, **NO_LSE)


def build(kernel, constants, target):
    types = dict(gradient_ptr="*bf16", target_ptr="*i64")
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {
        name: "constexpr" if name in constants
        else types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    options = dict(num_warps=8, enable_fp_fusion=False)
    compile(ASTSource(kernel, signature, constants), target=target, options=options)


target = GPUTarget("cuda", 80, 32)
for options in (ON, OFF):
    options = options | dict(COLUMNS=4096)
    for every_row in (False, True):
        build(triton_rows._loss_kernel, options | dict(EVERY_ROW=every_row), target)
    for how in (SAVED, SAVED_WITH_LSE, FUSED):
        build(triton_rows._gradient_kernel, options | how, target)
"""


def test_kernels_compile(tmp_path):
    """Triton's compiler needs no GPU, and refuses some of what its interpreter takes.

    ``test_compiled.py`` has Hopper and AMD's gfx942; this is a GPU without any of their features.
    """
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(p for p in sys.path if p)}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "HOME": str(tmp_path)}
    program = [sys.executable, "-c", COMPILE]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
