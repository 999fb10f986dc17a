"""The loop over chunks of rows for any part of a graph that treats rows apart.

For each chunk, one product for each head gives its logits. Blocks of rows, small enough for a
cache, then go through the part, forward and backward (``row_block.py``), and leave the gradients of
logits where the logits were; two products carry these on to hidden states and weight.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..chunking import even_rows
from ..problem import held_dtype
from ..row_part import RowPart
from .compiled_blocks import run_compiled
from .row_block import BlockWork
from .wide_products import multiply_into

# What the logits of a block may take. The part holds a dozen tensors of that size.
_BLOCK_BYTES = {"cpu": 2 << 20}
_LARGE_BLOCK_BYTES = 64 << 20
# Words of a slice of a product whose operands are widened.
_PRODUCT_WORDS = 4096


@dataclass(frozen=True)
class RowProblem:
    """What one call of the op is given."""

    hidden: Sequence[Tensor]
    """For each head ``[N, H]``."""
    weight: Sequence[Tensor]
    """For each head ``[V, H]``."""
    by_row: Sequence[Tensor]
    """``[*rows, ...]`` each, where ``rows`` are ``N`` in all."""
    constants: Sequence[Tensor]
    part: RowPart
    batch_chunk_size: int
    """At most this many rows of logits exist at once."""

    @property
    def rows(self) -> int:
        return self.hidden[0].size(0)

    @property
    def inputs(self) -> list[Tensor]:
        """What may have a gradient, in this order everywhere."""
        return [*self.hidden, *self.weight, *self.by_row, *self.constants]

    @property
    def accumulate_dtype(self) -> torch.dtype:
        wide = torch.float64 in self.part.products
        return torch.float64 if wide else torch.float32

    @cached_property
    def compute_weight(self) -> list[Tensor]:
        return [
            weight.to(dtype) for weight, dtype in zip(self.weight, self.part.products, strict=True)
        ]


def run_forward(problem: RowProblem) -> list[Tensor]:
    """The outputs of the part, ``[N, ...]`` each."""
    outputs: list[Tensor] = []
    work = BlockWork(problem.part.text)
    for chunk in _chunks(problem):
        logits = _logits(problem, chunk)
        for block in _blocks(problem, chunk):
            results = _run(problem, work, block, _block_inputs(problem, logits, chunk, block))
            _store(problem, outputs, results, block)
    return outputs


def run_with_gradients(
    problem: RowProblem,
    needed: Sequence[bool],
    upstream: Sequence[Tensor | None],
    keeps_outputs: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs, if they are to be kept, and gradients of the inputs that are ``needed``: ``[0]``
    for the others.

    ``upstream`` has the gradient of each output, ``[N, ...]``; None if it is 0.
    """
    outputs: list[Tensor] = []
    gradients = _GradientSums(problem, needed)
    work = BlockWork(
        problem.part.text,
        keeps_outputs,
        tuple(gradients.wanted),
        tuple(given is not None for given in upstream),
    )
    count = len(problem.part.outputs) if keeps_outputs else 0
    for chunk in _chunks(problem):
        logits = _logits(problem, chunk)
        rooms = [gradients.room(given) for given in logits]
        for block in _blocks(problem, chunk):
            inside = slice(block.start - chunk.start, block.stop - chunk.start)
            tensors = [
                *_block_inputs(problem, logits, chunk, block),
                *(given[block] for given in upstream if given is not None),
            ]
            found = _run(problem, work, block, tensors)
            if keeps_outputs:
                _store(problem, outputs, found[:count], block)
            of_inputs = found[count:]
            for room, gradient in zip(rooms, of_inputs, strict=False):
                if gradient is None:
                    room[inside] = 0
                else:
                    room[inside].copy_(gradient)
            gradients.add_inputs(of_inputs[len(rooms) :], block)
        gradients.add_products(chunk, rooms)
    return outputs, gradients.finish()


def _run(
    problem: RowProblem, work: BlockWork, block: slice, tensors: Sequence[Tensor]
) -> Sequence[Any]:
    is_whole = block.stop - block.start == _block_rows(problem)
    return run_compiled(work, tensors) if is_whole else work(*tensors)


def _chunks(problem: RowProblem) -> Iterator[slice]:
    size = even_rows(problem.rows, problem.batch_chunk_size)
    of_block = _block_rows(problem)
    if problem.rows > problem.batch_chunk_size:  # whole blocks, but for the last chunk
        size = min(-(-size // of_block), problem.batch_chunk_size // of_block) * of_block
    # A problem without rows has one chunk without any: its outputs have their forms.
    for start in range(0, max(1, problem.rows), size):
        yield slice(start, min(start + size, problem.rows))


def _block_rows(problem: RowProblem) -> int:
    """The rows of a block: one number for each call, so that one compilation serves all."""
    words = sum(weight.size(0) for weight in problem.weight)
    most = _BLOCK_BYTES.get(problem.hidden[0].device.type, _LARGE_BLOCK_BYTES)
    rows = most // max(1, words * problem.accumulate_dtype.itemsize)
    return max(1, min(rows, problem.batch_chunk_size))


def _blocks(problem: RowProblem, chunk: slice) -> Iterator[slice]:
    size = _block_rows(problem)
    for start in range(chunk.start, max(chunk.start + 1, chunk.stop), size):
        yield slice(start, min(start + size, chunk.stop))


def _logits(problem: RowProblem, chunk: slice) -> list[Tensor]:
    """For each head ``[rows, V]``, in the compute dtype on a CPU, and else in FP32 or FP64."""
    found = []
    for hidden, weight in zip(problem.hidden, problem.compute_weight, strict=True):
        rows = hidden[chunk].to(weight.dtype)
        if rows.device.type == "cpu":
            found.append(rows @ weight.t())
        else:
            wide = torch.promote_types(weight.dtype, torch.float32)
            found.append(rows.new_empty((len(rows), len(weight)), dtype=wide))
            multiply_into(found[-1], rows, weight.t())
    return found


def _block_inputs(
    problem: RowProblem, logits: Sequence[Tensor], chunk: slice, block: slice
) -> list[Tensor]:
    """What the part reads."""
    inside = slice(block.start - chunk.start, block.stop - chunk.start)
    by_row = (
        rows_of(tensor, given.lead, block)
        for tensor, given in zip(problem.by_row, problem.part.by_row, strict=True)
    )
    return [*(of[inside] for of in logits), *by_row, *problem.constants]


def rows_of(tensor: Tensor, lead: int, rows: slice) -> Tensor:
    """``[n, ...]``: the ``rows`` of a tensor whose first ``lead`` dimensions are rows."""
    if lead == 1:
        return tensor[rows]
    return tensor[_place_of(tensor, lead, rows)]


def _place_of(tensor: Tensor, lead: int, rows: slice) -> tuple[Tensor, ...]:
    index = torch.arange(rows.start, rows.stop, device=tensor.device)
    return torch.unravel_index(index, tensor.shape[:lead])


def _store(
    problem: RowProblem, outputs: list[Tensor], results: Sequence[Tensor], rows: slice
) -> None:
    """Put what a block gave in its place, and make the place with the first block."""
    for number, (result, output) in enumerate(zip(results, problem.part.outputs, strict=True)):
        if len(outputs) <= number:
            shape = (problem.rows, *result.shape[1:])
            outputs.append(result.new_empty(shape, dtype=output.dtype))
        outputs[number][rows] = result


class _GradientSums:
    """Adds up the shares of chunks and blocks."""

    def __init__(self, problem: RowProblem, needed: Sequence[bool]) -> None:
        self._problem = problem
        heads = len(problem.hidden)
        self._hidden, self._weight = needed[:heads], needed[heads : 2 * heads]
        self.wanted = [
            *(a or b for a, b in zip(self._hidden, self._weight, strict=True)),
            *needed[2 * heads :],
        ]
        """Of the part's inputs, those whose gradients are needed."""
        self._is_one_chunk = problem.rows <= problem.batch_chunk_size
        self.sums = []
        for number, (tensor, is_needed) in enumerate(zip(problem.inputs, needed, strict=True)):
            if not is_needed:
                self.sums.append(tensor.new_empty(0))
                continue
            # What is summed is held in FP32; each row of the others comes once.
            is_sum = heads <= number < 2 * heads or number >= 2 * heads + len(problem.by_row)
            dtype = torch.promote_types(tensor.dtype, torch.float32)
            if not is_sum or (number < 2 * heads and self._is_one_chunk):
                dtype = held_dtype(tensor.dtype)
            self.sums.append(tensor.new_zeros(tensor.shape, dtype=dtype))

    def room(self, logits: Tensor) -> Tensor:
        """Where the gradients of ``logits`` go: over them, if they hold these as well."""
        if logits.dtype == torch.float16:
            return torch.empty_like(logits, dtype=torch.float32)
        return logits

    def add_inputs(self, found: Sequence[Tensor | None], rows: slice) -> None:
        """The gradients of inputs by row, which are of these ``rows``, and of constants."""
        start, by_row = 2 * len(self._hidden), self._problem.part.by_row
        for number, gradient in enumerate(found):
            if gradient is None:
                continue
            total = self.sums[start + number]
            if number >= len(by_row):
                total += gradient
            elif by_row[number].lead == 1:
                total[rows] = gradient.to(total.dtype)
            else:
                lead = by_row[number].lead
                total[_place_of(total, lead, rows)] = gradient.to(total.dtype)

    def add_products(self, rows: slice, grad_logits: Sequence[Tensor]) -> None:
        heads = len(grad_logits)
        for number, gradient in enumerate(grad_logits):
            weight = self._problem.compute_weight[number]
            if self._hidden[number]:
                of_rows = self.sums[number][rows]
                _multiply(of_rows, gradient, weight)
            if self._weight[number]:
                hidden = self._problem.hidden[number][rows].to(weight.dtype)
                _add_product(self.sums[heads + number], gradient, hidden, self._is_one_chunk)

    def finish(self) -> list[Tensor]:
        return [
            total if total.numel() == 0 else total.to(held_dtype(tensor.dtype))
            for total, tensor in zip(self.sums, self._problem.inputs, strict=True)
        ]


def _multiply(out: Tensor, gradient: Tensor, weight: Tensor) -> None:
    """``out = gradient @ weight``, where ``gradient`` may be in more bits than ``weight``."""
    if gradient.device.type != "cpu":
        multiply_into(out, gradient.to(weight.dtype), weight)
    elif gradient.dtype == weight.dtype:
        out.copy_(gradient @ weight)
    else:  # FP16: what is small would vanish in it, and sums would overflow
        total = torch.zeros_like(out, dtype=gradient.dtype)
        parts = torch.split(weight, _PRODUCT_WORDS)
        for part, block in zip(parts, torch.split(gradient, _PRODUCT_WORDS, 1), strict=True):
            total.addmm_(block, part.to(gradient.dtype))
        out.copy_(total)


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor, is_one_chunk: bool) -> None:
    """``total += gradient.T @ hidden``."""
    if gradient.device.type != "cpu":
        multiply_into(total, gradient.to(hidden.dtype).t(), hidden, add=True)
        return
    if gradient.dtype == hidden.dtype == total.dtype:
        total.addmm_(gradient.t(), hidden)
        return
    hidden = hidden.to(gradient.dtype)
    parts = torch.split(total, _PRODUCT_WORDS)
    for part, block in zip(parts, torch.split(gradient, _PRODUCT_WORDS, 1), strict=True):
        share = block.t() @ hidden
        part.add_(share)
        if share.dtype == torch.bfloat16 and not is_one_chunk:
            # Shares of chunks may nearly cancel, and their rounding errors would show: add each
            # error, which addmm computes in FP32.
            part.add_(torch.addmm(share, block.t(), hidden, beta=-1))
