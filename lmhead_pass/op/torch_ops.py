"""The ops that a match is rewritten to: schemas, kernels, fake kernels and autograd.

``torch.ops.lmhead_pass.linear_cross_entropy`` is what stands in a rewritten graph:

    linear_cross_entropy(hidden, weight, bias, target, class_weight, coefficient,
                         logsumexp_coefficient, z_loss, fill, reduction, ignore_index,
                         label_smoothing, logit_scale, softcap, softcap_kind, compute_dtype,
                         batch_chunk_size, *, vocab_chunk_size=None, report="") -> loss
    linear_cross_entropy_and_measures(..., measures, *, vocab_chunk_size=None, report="")
        -> [loss, *measures]

Their arguments are the fields of ``Problem`` (``problem.py``). The loss is ``[]``, or ``[N]``
for reduction "none", in the accumulation dtype: FP32, or FP64 for FP64 products. With

    logits = logit_scale * torch.nn.functional.linear(hidden, weight, bias)
    logits = softcap * cap(logits / softcap)                              where there is a softcap
    logits = torch.where(fill.isnan(), logits, fill)                      where words are masked

(``cap`` is ``torch.tanh``, or ``x / sqrt(1 + x * x)`` if ``softcap_kind`` is "algebraic") it equals

    torch.nn.functional.cross_entropy(logits, target, class_weight, ...)

and raises an IndexError where that does. A ``coefficient``, for reduction "sum" only, multiplies
the rows' losses before they are added; where it is 0, a row counts for nothing even if its loss is
infinite. It is a constant: no gradient flows to it. ``logsumexp_coefficient`` and ``z_loss`` (after
PaLM's, https://arxiv.org/abs/2204.02311, section 5) are constants too, and add to such a sum

    sum_n logsumexp_coefficient_n lse_n + z_loss_n lse_n^2       lse = torch.logsumexp(logits, 1)

A ``report`` is what a graph's first run tells where the graph comes from a cache (``log.py``).

Measures describe each row's logits, whether the row counts or not: ``kernels/measures.py`` lists
them. Only "logsumexp" has a gradient, and only with reduction "none".

Autograd runs on three private ops. ``_forward`` computes the loss alone. If the loss is a scalar,
``_forward_and_gradients`` computes its gradients in the same pass (three products); on some GPUs
``_finish_weight_gradient`` does the last of them in the backward (``holding.py``). With "none" a
row's upstream gradient is known in the backward only, where ``_backward`` computes the logits again
(a fourth product).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, sym_max, sym_min

from ..compat.compiling import are_saved_tensors_hooked
from ..compat.kernels import below_autograd, is_forward_mode
from ..compat.library import add_fake_kernel, add_kernel, define
from ..log import tell_from_cache
from .held_gradients import scaled
from .holding import holds_exponentials
from .kernels.dispatch import finish_weight_gradient, loop_of
from .kernels.measures import allocate, parse_measures
from .problem import Gradients, Pending, Problem, held_dtype, nothing_pending, padded_width

_PROBLEM = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, "
    "Tensor? coefficient, Tensor? logsumexp_coefficient, Tensor? z_loss, Tensor? fill, "
    "str reduction, int ignore_index, float label_smoothing, float logit_scale, float? softcap, "
    "str softcap_kind, ScalarType compute_dtype, SymInt batch_chunk_size"
)
# The last field of a Problem, and a note for ``log.py``.
_KEYWORDS = "*, SymInt? vocab_chunk_size=None, str report=''"
_FIELDS = [field.name for field in dataclasses.fields(Problem)]
_TENSORS = _FIELDS.index("reduction")  # the fields before it are tensors
_OTHERS = 2  # the measures and the report
_NOT_DIFFERENTIABLE = [None] * (len(_FIELDS) + _OTHERS - len(Gradients._fields))


def _define(
    name: str,
    extra_arguments: str,
    returns: str,
    kernel: Callable[..., Any],
    fake_kernel: Callable[..., Any],
) -> None:
    """Define an op on a Problem and more arguments; kernels get the Problem as one."""
    fields = len(_FIELDS) - 1

    def run(*arguments: Any, vocab_chunk_size: int | None = None, report: str = "") -> Any:
        if report:
            tell_from_cache(report)
        problem = Problem(*[*arguments[:fields], vocab_chunk_size])
        device = problem.hidden.device.type
        # The products' dtypes are settled: an autocast around the call must not touch them.
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return kernel(problem, *arguments[fields:])

    def run_fake(*arguments: Any, vocab_chunk_size: int | None = None, report: str = "") -> Any:
        return fake_kernel(Problem(*[*arguments[:fields], vocab_chunk_size]), *arguments[fields:])

    define(f"{name}({_PROBLEM}{extra_arguments}, {_KEYWORDS}) -> {returns}", run)
    add_fake_kernel(name, run_fake)


def _fake_loss(problem: Problem) -> Tensor:
    shape = problem.target.shape if problem.reduction == "none" else ()
    return problem.hidden.new_empty(shape, dtype=problem.accumulate_dtype)


def _fake_measures(problem: Problem, names: list[str]) -> list[Tensor]:
    return list(allocate(problem, parse_measures(names)).values())


def _fake_forward(problem: Problem, names: list[str]) -> list[Tensor]:
    row_max, log_sum = (
        problem.hidden.new_empty(problem.target.shape, dtype=problem.accumulate_dtype)
        for _ in range(2)
    )
    return [_fake_loss(problem), row_max, log_sum, *_fake_measures(problem, names)]


def _fake_gradients(problem: Problem, needed: list[bool]) -> Gradients:
    return Gradients(
        *(
            problem.hidden.new_empty(0)
            if tensor is None
            else tensor.new_empty(tensor.shape, dtype=held_dtype(tensor.dtype))
            for tensor in problem.inputs_with_gradient(needed)
        )
    )


def _fake_forward_and_gradients(
    problem: Problem, needed: list[bool], names: list[str]
) -> list[Tensor]:
    gradients, pending = _fake_gradients(problem, needed), nothing_pending(problem)
    waits = problem.vocab_chunk_size is None and holds_exponentials(problem, parse_measures(names))
    if needed[1] and waits:
        (rows, size), most = problem.hidden.shape, problem.batch_chunk_size
        # 1 if there is more than one chunk, without a guard on their number.
        has_sum = sym_min(1, sym_max(0, (rows - 1) // most))  # type: ignore[no-untyped-call]
        last = sym_min(rows, most)  # type: ignore[no-untyped-call]
        vocab, new = len(problem.weight), problem.hidden.new_empty
        words = 2 + (vocab - 2) * has_sum  # not 0 or 1, for which torch would add a guard
        gradients = gradients._replace(weight=new(words, size, dtype=torch.float32))
        width = padded_width(vocab, problem.compute_dtype)
        pending = Pending(
            new(last, width, dtype=problem.compute_dtype),
            new(last, size, dtype=problem.compute_dtype),
            new((), dtype=torch.float32),
        )
    return [_fake_loss(problem), *gradients, *pending, *_fake_measures(problem, names)]


def _forward(problem: Problem, names: list[str]) -> list[Tensor]:
    return loop_of(problem).forward(problem, parse_measures(names))


def _loss_and_measures(problem: Problem, names: list[str]) -> list[Tensor]:
    loss, _, _, *measures = _forward(problem, names)
    return [loss, *measures]


def _forward_and_gradients(problem: Problem, needed: list[bool], names: list[str]) -> list[Tensor]:
    return loop_of(problem).forward_and_gradients(problem, needed, parse_measures(names))


def _backward(problem: Problem, *arguments: Any) -> Gradients:
    return loop_of(problem).backward(problem, *arguments)


_define(
    "linear_cross_entropy",
    "",
    "Tensor",
    lambda problem: _forward(problem, [])[0],
    _fake_loss,
)
_define(
    "linear_cross_entropy_and_measures",
    ", str[] measures",
    "Tensor[]",
    _loss_and_measures,
    lambda problem, names: [_fake_loss(problem), *_fake_measures(problem, names)],
)
_define("_forward", ", str[] measures", "Tensor[]", _forward, _fake_forward)
_define(
    "_forward_and_gradients",
    ", bool[3] needed, str[] measures",
    "Tensor[]",
    _forward_and_gradients,
    _fake_forward_and_gradients,
)
_define(
    "_backward",
    ", bool[3] needed, Tensor row_max, Tensor log_sum, Tensor? grad_losses, Tensor? grad_logsumexp",
    "(Tensor, Tensor, Tensor)",
    _backward,
    lambda problem, needed, *_: _fake_gradients(problem, needed),
)


def _finish_weight_gradient(
    total: Tensor,
    grad_logits: Tensor,
    hidden: Tensor,
    scale: Tensor,
    factor: Tensor,
    vocab: int,
    dtype: torch.dtype,
) -> Tensor:
    with torch.no_grad():
        pending = Pending(grad_logits, hidden, scale)
        return finish_weight_gradient(total, pending, factor, vocab, dtype)


def _fake_finish_weight_gradient(
    total: Tensor, grad_logits: Tensor, hidden: Tensor, scale: Tensor, factor: Tensor,
    vocab: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return hidden.new_empty(vocab, hidden.size(1), dtype=dtype)


define(
    "_finish_weight_gradient(Tensor total, Tensor grad_logits, Tensor hidden, Tensor scale, "
    "Tensor factor, SymInt vocab, ScalarType dtype) -> Tensor",
    _finish_weight_gradient,
)
add_fake_kernel("_finish_weight_gradient", _fake_finish_weight_gradient)
_ops = torch.ops.lmhead_pass


class _GradientsInForward(torch.autograd.Function):
    """For a scalar loss. The backward multiplies the gradients by the upstream gradient."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *problem, words, names, report = arguments
        needed = list(ctx.needs_input_grad[:3])
        loss, *results = _ops._forward_and_gradients(
            *problem, needed, names, vocab_chunk_size=words, report=report
        )
        gradients, pending, measures = results[:3], results[3:6], results[6:]
        ctx.save_for_backward(*gradients, *pending, _has_terms(Problem(*problem)))
        ctx.dtypes = [
            tensor.dtype if wanted else None
            for tensor, wanted in zip(arguments[:3], needed, strict=True)
        ]
        ctx.vocab = arguments[1].size(0)
        ctx.are_hooked = are_saved_tensors_hooked()
        ctx.mark_non_differentiable(*measures)
        ctx.set_materialize_grads(False)
        return loss, *measures

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        *saved, has_terms = ctx.saved_tensors
        if grad_loss is None:
            return None, None, None, *_NOT_DIFFERENTIABLE
        # If no row counts, the gradients are 0, as in eager, whatever the upstream gradient is.
        # It may be infinite or NaN, from a mean that is 0 / 0.
        grad_loss = grad_loss.masked_fill(~has_terms, 0)
        pending = Pending(*saved[3:])
        gradients: list[Tensor | None] = [
            None if dtype is None else scaled(gradient, grad_loss, ctx.are_hooked).to(dtype)
            for gradient, dtype in zip(saved[:3], ctx.dtypes, strict=True)
            if not (pending.is_needed and gradient is saved[1])
        ]
        if pending.is_needed:
            weight = _ops._finish_weight_gradient(
                saved[1], *pending, grad_loss, ctx.vocab, ctx.dtypes[1]
            )
            gradients.insert(1, weight)
        return *gradients, *_NOT_DIFFERENTIABLE


class _GradientsInBackward(torch.autograd.Function):
    """For per-row losses. Their upstream gradients are known in the backward only."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *problem, words, names, report = arguments
        losses, row_max, log_sum, *measures = _ops._forward(*problem, names, report=report)
        ctx.save_for_backward(*problem[:_TENSORS], row_max, log_sum)
        ctx.options, ctx.words = problem[_TENSORS:], words
        ctx.logsumexp = names.index("logsumexp") if "logsumexp" in names else None
        ctx.mark_non_differentiable(
            *(measure for place, measure in enumerate(measures) if place != ctx.logsumexp)
        )
        ctx.set_materialize_grads(False)
        return losses, *measures

    @staticmethod
    def backward(
        ctx: Any, grad_losses: Tensor | None, *grad_measures: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        grad_logsumexp = None if ctx.logsumexp is None else grad_measures[ctx.logsumexp]
        if grad_losses is None and grad_logsumexp is None:
            return None, None, None, *_NOT_DIFFERENTIABLE
        needed = list(ctx.needs_input_grad[:3])
        *tensors, row_max, log_sum = ctx.saved_tensors
        gradients = _ops._backward(
            *(*tensors, *ctx.options, needed, row_max, log_sum, grad_losses, grad_logsumexp),
            vocab_chunk_size=ctx.words,
        )
        gradients = (
            gradient.to(tensor.dtype) if wanted else None
            for gradient, tensor, wanted in zip(gradients, tensors[:3], needed, strict=True)
        )
        return *gradients, *_NOT_DIFFERENTIABLE


def _has_terms(problem: Problem) -> Tensor:
    """``[]``: whether any row counts for something in the loss."""
    if problem.has_logsumexp_terms:
        return problem.target.new_ones((), dtype=torch.bool)
    return (problem.target != problem.ignore_index).any()


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "lmhead_pass: linear_cross_entropy has no second derivative (backward was called with "
            "create_graph=True). Compile this model inside `with lmhead_pass.disabled():`."
        )


def _function(problem: Sequence[Any]) -> Callable[..., tuple[Tensor, ...]] | None:
    """The autograd function for a call with the arguments ``problem``; None if none is needed.

    Forward mode needs one too: it raises an error if an input has a tangent.
    """
    wanted = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in problem[:3]
    )
    if not wanted and not is_forward_mode():
        return None
    return (_GradientsInBackward if problem[_TENSORS] == "none" else _GradientsInForward).apply


def _differentiable(*problem: Any, vocab_chunk_size: int | None = None, report: str = "") -> Tensor:
    if function := _function(problem):
        return function(*problem, vocab_chunk_size, [], report)[0]
    with below_autograd():
        return cast(Tensor, _ops.linear_cross_entropy(*problem, report=report))


def _differentiable_with_measures(
    *arguments: Any, vocab_chunk_size: int | None = None, report: str = ""
) -> list[Tensor]:
    *problem, names = arguments
    if function := _function(problem):
        return list(function(*problem, vocab_chunk_size, names, report))
    with below_autograd():
        return cast(list[Tensor], _ops.linear_cross_entropy_and_measures(*arguments, report=report))


add_kernel("linear_cross_entropy", _differentiable, "Autograd")
add_kernel("linear_cross_entropy_and_measures", _differentiable_with_measures, "Autograd")


class _WithGradientOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, source: Tensor) -> Tensor:
        ctx.dtype = source.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.to(ctx.dtype)


# ``with_gradient_of(value, source)`` is ``value``; its gradient goes to ``source`` as well.
define(
    "with_gradient_of(Tensor value, Tensor source) -> Tensor",
    _WithGradientOf.apply,
    "CompositeImplicitAutograd",
)
