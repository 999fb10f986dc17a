"""What is computed of each row of a region, as calls of the op."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..graph import Refused, hint, product, tensor_of
from ..logits import Head
from ..op import Chunks, Output, RowInput, RowPart, Step, Value, plan_chunks
from .expressions import collect, heads_of, is_head, with_gradient
from .layout import Space
from .types import RowCall
from .values import ConstantLeaf, Exit, Expression, RowLeaf


def row_calls(
    heads: Sequence[Head], exits: Mapping[Exit, bool], written_over: Sequence[Expression]
) -> Iterator[RowCall]:
    """Calls that give ``exits``; of each, whether a gradient may reach it.

    Refused if a gradient of 0 goes to what nothing but ``written_over`` is made of.

    What is made of the same heads and the same rows is one call.
    """
    groups: list[tuple[Space, set[int], list[Exit]]] = []
    for exit in exits:
        space, read = exit.traced.space, set(heads_of(exit.expression)) or {0}
        joined = [g for g in groups if g[0] is space and g[1] & read]
        merged: tuple[Space, set[int], list[Exit]] = (space, read, [exit])
        for group in joined:
            groups.remove(group)
            merged = (space, merged[1] | group[1], [*group[2], *merged[2]])
        groups.append(merged)
    for space, numbers, of_group in groups:
        of_call = {number: heads[number] for number in sorted(numbers)}
        yield _row_call(space, of_call, {exit: exits[exit] for exit in of_group}, written_over)


def _row_call(
    space: Space,
    heads: Mapping[int, Head],
    exits: Mapping[Exit, bool],
    written_over: Sequence[Expression],
) -> RowCall:
    steps: dict[Expression, None] = {}
    for exit in exits:
        collect(exit.expression, steps)
    by_row = [one for one in steps if isinstance(one.op, RowLeaf)]
    constants = [one for one in steps if isinstance(one.op, ConstantLeaf)]
    given = [
        *(next((one for one in steps if is_head(one, number)), number) for number in heads),
        *(*by_row, *constants),
    ]
    numbers: dict[Any, int] = {one: number for number, one in enumerate(given)}
    made: list[Step] = []
    for one in steps:
        if isinstance(one.op, str):
            numbers[one] = len(given) + len(made)
            args, kwargs = _numbered((one.args, one.kwargs), numbers)
            made.append(Step(one.op, args, kwargs))
    outputs: dict[tuple[int, torch.dtype], tuple[bool, list[Exit]]] = {}
    for exit, has_gradient in exits.items():
        key = numbers[exit.expression], exit.value.dtype
        before, alike = outputs.get(key, (False, []))
        has_gradient &= exit.value.is_floating_point()
        outputs[key] = (before or has_gradient, [*alike, exit])
    part = RowPart(
        products=tuple(tensor_of(head.node).dtype for head in heads.values()),
        by_row=tuple(RowInput(1) for _ in by_row),
        constants=len(constants),
        steps=tuple(made),
        outputs=tuple(
            Output(number, dtype, has_gradient)
            for (number, dtype), (has_gradient, _) in outputs.items()
        ),
    )
    ends = [exit.expression for exit, has_gradient in exits.items() if has_gradient]
    reached = with_gradient(ends)
    leaves_nothing = with_gradient(written_over).intersection(given) - reached
    if ends and (leaves_nothing or reached.isdisjoint(given[: len(heads)])):
        raise Refused("what is made of the logits has a gradient, but one of 0")
    return RowCall(
        heads=tuple(heads.values()),
        space=space,
        by_row=tuple(by_row),
        constants=tuple(one.op for one in constants),
        part=part,
        exits=tuple(tuple(alike) for _, alike in outputs.values()),
        with_gradient=tuple(one in reached for one in given),
        rows_per_chunk=_chunks(list(heads.values()), space, bool(ends)).rows,
    )


def _chunks(heads: Sequence[Head], space: Space, has_gradient: bool) -> Chunks:
    tokens = product(label.size for label in space.finest)
    weights = [tensor_of(head.weight) for head in heads]
    device = tensor_of(heads[0].node).device
    words = sum(hint(head.vocab_size) for head in heads)
    # On a CPU the gradients of FP16 logits are in FP32, beside them: 6 bytes instead of 2.
    if device.type == "cpu" and has_gradient:
        halves = (head for head in heads if tensor_of(head.node).dtype == torch.float16)
        words += sum(2 * hint(head.vocab_size) for head in halves)
    # On a GPU the logits come out of the products in FP32.
    least = torch.float32 if device.type != "cpu" else torch.bfloat16
    dtypes = [torch.promote_types(tensor_of(head.node).dtype, least) for head in heads]
    summed = [w.dtype for w in weights if has_gradient and w.requires_grad] or [torch.float32]
    return plan_chunks(
        -(-sum(hint(weight.numel()) for weight in weights) // words),
        words,
        max(dtypes, key=lambda dtype: dtype.itemsize),
        device,
        tokens=hint(tokens),
        is_dynamic=not isinstance(tokens, int),
        gradient_dtype=min(summed, key=lambda dtype: dtype.itemsize),
        needs_whole_rows=True,
    )


def _numbered(argument: Any, numbers: Mapping[Any, int]) -> Any:
    match argument:
        case Expression():
            return Value(numbers[argument])
        case list():
            return [_numbered(part, numbers) for part in argument]
        case tuple():
            return tuple(_numbered(part, numbers) for part in argument)
        case dict():
            return {name: _numbered(part, numbers) for name, part in argument.items()}
    return argument
