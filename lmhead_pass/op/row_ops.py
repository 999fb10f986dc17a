"""The ops that run a part of a graph chunk by chunk: schemas, fake kernels and autograd.

    rowwise(hidden, weight, by_row, constants, part, batch_chunk_size, *, report="") -> outputs
    rowwise_sum(hidden, weight, by_row, constants, part, batch_chunk_size, upstream, *, report="")
        -> [sum, *outputs]

``part`` is the text of a ``RowPart`` (``row_part.py``), whose logits are ``hidden @ weight.T`` for
each head (``RowProblem`` in ``kernels/row_loop.py`` has the shapes). The outputs are ``[N, ...]``.

``rowwise`` has the gradients of its differentiable outputs in the backward, where it computes the
logits again: four products. ``rowwise_sum`` is given ``upstream``, a tensor ``[N, ...]`` for each
differentiable output, and has the gradient of the ``sum`` of all products of these with the
outputs, which it computes in the forward: three products. Its other outputs have none. A ``report``
is what a graph's first run tells where the graph comes from a cache (``log.py``).
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..compat.compiling import are_saved_tensors_hooked
from ..compat.kernels import below_autograd, is_forward_mode
from ..compat.library import add_fake_kernel, add_kernel, define
from ..log import tell_from_cache
from .held_gradients import scaled
from .kernels.row_loop import RowProblem, run_forward, run_with_gradients
from .problem import held_dtype
from .row_part import RowPart, parse

_PROBLEM = (
    "Tensor[] hidden, Tensor[] weight, Tensor[] by_row, Tensor[] constants, str part, "
    "SymInt batch_chunk_size"
)


def _problem(arguments: Sequence[Any]) -> RowProblem:
    hidden, weight, by_row, constants, part, rows = arguments
    return RowProblem(hidden, weight, by_row, constants, parse(part), rows)


def _define(name: str, extra: str, kernel: Any, fake_kernel: Any) -> None:
    def run(*arguments: Any, report: str = "") -> list[Tensor]:
        if report:
            tell_from_cache(report)
        problem = _problem(arguments[:6])
        with torch.no_grad(), torch.autocast(problem.hidden[0].device.type, enabled=False):
            return cast(list[Tensor], kernel(problem, *arguments[6:]))

    def run_fake(*arguments: Any, report: str = "") -> list[Tensor]:
        return cast(list[Tensor], fake_kernel(_problem(arguments[:6]), *arguments[6:]))

    define(f"{name}({_PROBLEM}{extra}, *, str report='') -> Tensor[]", run)
    add_fake_kernel(name, run_fake)


def _fake_outputs(problem: RowProblem) -> list[Tensor]:
    """Of the part's results for one row, with as many rows as there are."""
    rows = problem.hidden[0].size(0)
    one = [
        weight.new_empty((1, weight.size(0)), dtype=torch.promote_types(dtype, torch.float32))
        for weight, dtype in zip(problem.weight, problem.part.products, strict=True)
    ]
    for tensor, given in zip(problem.by_row, problem.part.by_row, strict=True):
        one.append(_fake_wide(tensor, (1, *tensor.shape[given.lead :])))
    one += [_fake_wide(tensor, tensor.shape) for tensor in problem.constants]
    results = problem.part.run(one, 1)
    return [
        result.new_empty((rows, *result.shape[1:]), dtype=output.dtype)
        for result, output in zip(results, problem.part.outputs, strict=True)
    ]


def _fake_wide(tensor: Tensor, shape: Sequence[Any]) -> Tensor:
    is_narrow = tensor.is_floating_point() and tensor.dtype.itemsize < torch.float32.itemsize
    return tensor.new_empty(shape, dtype=torch.float32 if is_narrow else tensor.dtype)


def _fake_gradients(problem: RowProblem, needed: Sequence[bool]) -> list[Tensor]:
    return [
        tensor.new_empty(tensor.shape, dtype=held_dtype(tensor.dtype))
        if is_needed
        else tensor.new_empty(0)
        for tensor, is_needed in zip(problem.inputs, needed, strict=True)
    ]


def _upstream_of_each(part: RowPart, upstream: Sequence[Tensor]) -> list[Tensor | None]:
    given = iter(upstream)
    return [next(given) if output.is_differentiable else None for output in part.outputs]


def _sum(problem: RowProblem, outputs: Sequence[Tensor], upstream: Sequence[Tensor]) -> Tensor:
    total = problem.hidden[0].new_zeros((), dtype=problem.accumulate_dtype)
    for output, of in zip(outputs, _upstream_of_each(problem.part, upstream), strict=True):
        if of is not None:
            total = total + (output.to(total.dtype) * of.to(total.dtype)).sum()
    return total


def _forward_sum(problem: RowProblem, upstream: Sequence[Tensor]) -> list[Tensor]:
    outputs = run_forward(problem)
    return [_sum(problem, outputs, upstream), *outputs]


def _fake_sum(problem: RowProblem) -> Tensor:
    return problem.hidden[0].new_empty((), dtype=problem.accumulate_dtype)


def _forward_and_gradients(
    problem: RowProblem, upstream: Sequence[Tensor], needed: list[bool]
) -> list[Tensor]:
    of_each = _upstream_of_each(problem.part, upstream)
    outputs, gradients = run_with_gradients(problem, needed, of_each, keeps_outputs=True)
    return [_sum(problem, outputs, upstream), *outputs, *gradients]


def _backward(
    problem: RowProblem, upstream: Sequence[Tensor | None], needed: list[bool]
) -> list[Tensor]:
    _, gradients = run_with_gradients(problem, needed, upstream, keeps_outputs=False)
    return gradients


_define("rowwise", "", run_forward, _fake_outputs)
_define(
    "rowwise_sum",
    ", Tensor[] upstream",
    _forward_sum,
    lambda problem, _: [_fake_sum(problem), *_fake_outputs(problem)],
)
_define(
    "_rowwise_and_gradients",
    ", Tensor[] upstream, bool[] needed",
    _forward_and_gradients,
    lambda problem, _, needed: [
        _fake_sum(problem),
        *_fake_outputs(problem),
        *_fake_gradients(problem, needed),
    ],
)
_define(
    "_rowwise_backward",
    ", Tensor?[] upstream, bool[] needed",
    _backward,
    lambda problem, _, needed: _fake_gradients(problem, needed),
)
_ops = torch.ops.lmhead_pass


class _Inputs:
    """The tensors of a call one after the other, as autograd takes them."""

    def __init__(self, lists: Sequence[Sequence[Tensor]]) -> None:
        self.sizes = [len(of) for of in lists]
        self.tensors = [tensor for of in lists for tensor in of]

    def lists(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        left = iter(tensors)
        return [[next(left) for _ in range(size)] for size in self.sizes]


class _GradientsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: _Inputs, part: str, rows: int, report: str, *tensors: Tensor
    ) -> Any:
        outputs = _ops.rowwise(*inputs.lists(tensors), part, rows, report=report)
        ctx.inputs, ctx.part, ctx.rows = inputs, part, rows
        ctx.save_for_backward(*tensors)
        _mark(ctx, part, outputs)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        needed = list(ctx.needs_input_grad[4:])
        if all(given is None for given in upstream):
            return (None,) * len(ctx.needs_input_grad)
        tensors = ctx.saved_tensors
        found = _ops._rowwise_backward(
            *ctx.inputs.lists(tensors), ctx.part, ctx.rows, upstream, needed
        )
        gradients = (
            gradient.to(tensor.dtype) if is_needed else None
            for gradient, tensor, is_needed in zip(found, tensors, needed, strict=True)
        )
        return None, None, None, None, *gradients


class _GradientsInForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: _Inputs,
        part: str,
        rows: int,
        upstream: list[Tensor],
        report: str,
        *tensors: Tensor,
    ) -> Any:
        needed = list(ctx.needs_input_grad[5:])
        results = _ops._rowwise_and_gradients(
            *inputs.lists(tensors), part, rows, upstream, needed, report=report
        )
        count = 1 + len(parse(part).outputs)
        ctx.save_for_backward(*(g for g, w in zip(results[count:], needed, strict=True) if w))
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.are_hooked = are_saved_tensors_hooked()
        ctx.mark_non_differentiable(*results[1:count])
        ctx.set_materialize_grads(False)
        return tuple(results[:count])

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        if grad_sum is None:
            return (None,) * len(ctx.needs_input_grad)
        saved = iter(ctx.saved_tensors)
        gradients = (
            scaled(next(saved), grad_sum, ctx.are_hooked).to(dtype) if is_needed else None
            for dtype, is_needed in zip(ctx.dtypes, ctx.needs_input_grad[5:], strict=True)
        )
        return None, None, None, None, None, *gradients


_in_backward: Any = _GradientsInBackward.apply
_in_forward: Any = _GradientsInForward.apply


def _mark(ctx: Any, part: str, outputs: Sequence[Tensor]) -> None:
    ctx.mark_non_differentiable(
        *(
            result
            for result, output in zip(outputs, parse(part).outputs, strict=True)
            if not output.is_differentiable
        )
    )


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "lmhead_pass: what is computed chunk by chunk has no second derivative (backward was "
            "called with create_graph=True). Compile this model inside `with "
            "lmhead_pass.disabled():`."
        )


def _wants_gradient(inputs: _Inputs) -> bool:
    return is_forward_mode() or (
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs.tensors)
    )


def _differentiable(*arguments: Any, report: str = "") -> list[Tensor]:
    *lists, part, rows = arguments
    inputs = _Inputs(lists)
    if _wants_gradient(inputs):
        return list(_in_backward(inputs, part, rows, report, *inputs.tensors))
    with below_autograd():
        return cast(list[Tensor], _ops.rowwise(*arguments, report=report))


def _differentiable_sum(*arguments: Any, report: str = "") -> list[Tensor]:
    *lists, part, rows, upstream = arguments
    inputs = _Inputs(lists)
    if _wants_gradient(inputs):
        upstream = [given.detach() for given in upstream]
        return list(_in_forward(inputs, part, rows, upstream, report, *inputs.tensors))
    with below_autograd():
        return cast(list[Tensor], _ops.rowwise_sum(*arguments, report=report))


add_kernel("rowwise", _differentiable, "Autograd")
add_kernel("rowwise_sum", _differentiable_sum, "Autograd")
