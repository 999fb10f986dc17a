"""The op that a match is rewritten to: schemas, kernels, fake kernels and autograd.

``torch.ops.lmhead_pass.linear_cross_entropy`` is what stands in a rewritten graph:

    linear_cross_entropy(hidden, weight, bias, target, class_weight, reduction, ignore_index,
                         label_smoothing, compute_dtype, batch_chunk_size) -> loss

Its arguments are the fields of ``lmhead_pass.problem.Problem``. The loss is ``[]``, or ``[N]`` for
reduction "none", in the accumulation dtype: FP32, or FP64 for FP64 products. It equals

    torch.nn.functional.cross_entropy(
        torch.nn.functional.linear(hidden, weight, bias), target, class_weight, ...)

and raises an IndexError where that does. Autograd runs on three private ops: the loss alone; the
loss with its gradients in one pass (three products), where the reduction gives a scalar; and the
gradients recomputed in the backward (a fourth product) for "none", where each row's upstream
gradient is not known before.
"""

import dataclasses

import torch
from torch import Tensor

from .kernels import dispatch
from .problem import Gradients, Problem, held_dtype

_PROBLEM = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, "
    "str reduction, int ignore_index, float label_smoothing, ScalarType compute_dtype, "
    "SymInt batch_chunk_size"
)
_FIELDS = [field.name for field in dataclasses.fields(Problem)]
_TENSORS = _FIELDS.index("reduction")  # the fields before it are tensors
_NOT_DIFFERENTIABLE = [None] * (len(_FIELDS) - len(Gradients._fields))

_library = torch.library.Library("lmhead_pass", "DEF")


def _define(name: str, extra_arguments: str, returns: str, kernel, fake_kernel) -> None:
    """Define an op on a Problem and more arguments; kernels get the Problem as one."""
    fields = len(_FIELDS)

    def run(*arguments):
        problem = Problem(*arguments[:fields])
        device = problem.hidden.device.type
        # The products' dtypes are settled: an autocast around the call must not touch them.
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return kernel(problem, *arguments[fields:])

    def run_fake(*arguments):
        return fake_kernel(Problem(*arguments[:fields]), *arguments[fields:])

    _library.define(f"{name}({_PROBLEM}{extra_arguments}) -> {returns}")
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lmhead_pass::{name}", run_fake, lib=_library)


def _fake_loss(problem: Problem) -> Tensor:
    shape = problem.target.shape if problem.reduction == "none" else ()
    return problem.hidden.new_empty(shape, dtype=problem.accumulate_dtype)


def _fake_forward(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    row_max, log_sum = (
        problem.hidden.new_empty(problem.target.shape, dtype=problem.accumulate_dtype)
        for _ in range(2)
    )
    return _fake_loss(problem), row_max, log_sum


def _fake_gradients(problem: Problem, needed: list[bool]) -> Gradients:
    inputs = (problem.hidden, problem.weight, problem.bias)
    return Gradients(
        *(
            tensor.new_empty(tensor.shape, dtype=held_dtype(tensor.dtype))
            if wanted and tensor is not None
            else problem.hidden.new_empty(0)
            for tensor, wanted in zip(inputs, needed, strict=True)
        )
    )


_define(
    "linear_cross_entropy",
    "",
    "Tensor",
    lambda problem: dispatch.forward(problem)[0],
    _fake_loss,
)
_define("_forward", "", "(Tensor, Tensor, Tensor)", dispatch.forward, _fake_forward)
_define(
    "_forward_and_gradients",
    ", bool[3] needed",
    "(Tensor, Tensor, Tensor, Tensor)",
    dispatch.forward_and_gradients,
    lambda problem, needed: (_fake_loss(problem), *_fake_gradients(problem, needed)),
)
_define(
    "_backward",
    ", bool[3] needed, Tensor row_max, Tensor log_sum, Tensor grad_losses",
    "(Tensor, Tensor, Tensor)",
    dispatch.backward,
    lambda problem, needed, *_: _fake_gradients(problem, needed),
)
_ops = torch.ops.lmhead_pass


class _GradientsInForward(torch.autograd.Function):
    """For a scalar loss. Its gradients wait for the backward, complete but for one factor."""

    @staticmethod
    def forward(ctx, *arguments):
        needed = list(ctx.needs_input_grad[:3])
        loss, *gradients = _ops._forward_and_gradients(*arguments, needed)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [
            tensor.dtype if wanted else None
            for tensor, wanted in zip(arguments[:3], needed, strict=True)
        ]
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        _refuse_double_backward()
        gradients = (
            _scale(gradient, grad_loss).to(dtype) if dtype is not None else None
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *gradients, *_NOT_DIFFERENTIABLE


class _GradientsInBackward(torch.autograd.Function):
    """For per-row losses. Their upstream gradients are known in the backward only."""

    @staticmethod
    def forward(ctx, *arguments):
        losses, row_max, log_sum = _ops._forward(*arguments)
        ctx.save_for_backward(*arguments[:_TENSORS], row_max, log_sum)
        ctx.options = arguments[_TENSORS:]
        return losses

    @staticmethod
    def backward(ctx, grad_losses):
        _refuse_double_backward()
        needed = list(ctx.needs_input_grad[:3])
        *tensors, row_max, log_sum = ctx.saved_tensors
        gradients = _ops._backward(*tensors, *ctx.options, needed, row_max, log_sum, grad_losses)
        gradients = (
            gradient.to(tensor.dtype) if wanted else None
            for gradient, tensor, wanted in zip(gradients, tensors[:3], needed, strict=True)
        )
        return *gradients, *_NOT_DIFFERENTIABLE


def _scale(gradient: Tensor, factor: Tensor) -> Tensor:
    # In a narrower dtype the product would round the factor first: a loss divided by 3 would
    # give BF16 gradients that are all off by the same part in 800.
    return gradient.to(factor.dtype) * factor


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "lmhead_pass: linear_cross_entropy has no second derivative (backward was called with "
            "create_graph=True). Compile this model inside `with lmhead_pass.disabled():`."
        )


def _differentiable(*arguments):
    wanted = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in arguments[:3]
    )
    if not wanted:
        with torch._C._AutoDispatchBelowAutograd():
            return _ops.linear_cross_entropy(*arguments)
    by_row = arguments[_TENSORS] == "none"
    return (_GradientsInBackward if by_row else _GradientsInForward).apply(*arguments)


_library.impl("linear_cross_entropy", _differentiable, "Autograd")
