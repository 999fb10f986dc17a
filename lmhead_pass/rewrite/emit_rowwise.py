"""Inserts the calls that run regions of a graph in chunks of rows, and what stands around them."""

import operator
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Graph, Node

from ..compat.aten_trace import tree_map
from ..compat.graphs import EXAMPLE_VALUE
from ..graph import (
    NARROW,
    Emitter,
    Refused,
    memory_of,
    move_before,
    same,
    tensor_of,
    value_of,
)
from ..logits import Head
from ..op import RowInput
from ..rowwise import ConstantLeaf, Dim, Exit, Label, Outer, Region, RowCall, RowLeaf, Space, finest


def emit_region(graph: Graph, region: Region) -> tuple[dict[Node, Node], list[list[Node]]]:
    """Insert the calls for ``region``.

    Returns what replaces which node, and for each call the nodes of its differentiable results.
    """
    emit = Emitter(graph, region.place)
    made: dict[Any, Node] = {}
    numbers = [_emit_call(emit, region, call, made) for call in region.calls]
    emit.records = True
    values = {node: _result(emit, node, result, made) for node, result in region.results.items()}
    _keep_memory_apart(emit, values)
    move_before(region.place, region.moved)
    return values | region.sizes, numbers


def _keep_memory_apart(emit: Emitter, values: dict[Node, Node]) -> None:
    """Let what stands for different nodes be in different memory, as known by their fake values."""
    seen = set[int]()
    for node, found in values.items():
        if not seen.isdisjoint(memory_of(found)):
            values[node] = found = emit("clone", found)
        seen |= memory_of(found)
        if found in emit.nodes:
            # Its other names are views of the node's value.
            found.meta[EXAMPLE_VALUE] = tensor_of(node)


def _emit_call(emit: Emitter, region: Region, call: RowCall, made: dict[Any, Node]) -> list[Node]:
    hidden = [_hidden_rows(emit, region, call, head, made) for head in call.heads]
    weights = [_weight(emit, head) for head in call.heads]
    by_row, leads = [], []
    for leaf in call.by_row:
        assert isinstance(leaf.op, RowLeaf) and leaf.space is not None
        tensor = _outer(emit, leaf.op.outer, made)
        rows, lead = _rows(emit, tensor, leaf.op.dims, leaf.space, call.space, made)
        by_row.append(rows)
        leads.append(RowInput(lead))
    constants = [_constant(emit, leaf, made) for leaf in call.constants]
    part = replace(call.part, by_row=tuple(leads))
    reached = iter(call.with_gradient)
    of_heads = [next(reached) for _ in call.heads]
    hidden = [_reached(emit, *pair) for pair in zip(hidden, of_heads, strict=True)]
    weights = [_reached(emit, *pair) for pair in zip(weights, of_heads, strict=True)]
    by_row = [_reached(emit, one, next(reached)) for one in by_row]
    constants = [_reached(emit, one, next(reached)) for one in constants]
    outputs = emit(
        torch.ops.lmhead_pass.rowwise.default,
        *(hidden, weights, by_row, constants, part.text, call.rows_per_chunk),
    )
    numbers = []
    for place, (output, exits) in enumerate(zip(part.outputs, call.exits, strict=True)):
        item = emit(operator.getitem, outputs, place)
        if output.is_differentiable:
            item.meta["example_value"] = tensor_of(item).detach().requires_grad_()
            numbers.append(item)
        for exit in exits:
            made[exit] = item
    return numbers


def _reached(emit: Emitter, tensor: Node, is_reached: bool) -> Node:
    """``tensor``, without its gradient unless one may come back to it."""
    value = tensor_of(tensor)
    return tensor if is_reached or not value.is_floating_point() else emit("detach", tensor)


def _hidden_rows(
    emit: Emitter, region: Region, call: RowCall, head: Head, made: dict[Any, Node]
) -> Node:
    """``[N, H]``"""
    hidden, dims = _hidden(emit, head), _hidden_dims(region, head)
    rows, _ = _rows(emit, hidden, dims, region.root, call.space, made)
    is_flat = tensor_of(rows).dim() == 2
    return rows if is_flat else emit("reshape", rows, -1, tensor_of(rows).size(-1))


def _hidden(emit: Emitter, head: Head) -> Node:
    return (
        head.hidden if head.hidden_dim == -1 else emit("movedim", head.hidden, head.hidden_dim, -1)
    )


def _hidden_dims(region: Region, head: Head) -> tuple[Dim, ...]:
    dims = region.dims[region.heads.index(head)]
    place = head.vocab_dim % len(dims)
    return (*dims[:place], *dims[place + 1 :], None)


def _weight(emit: Emitter, head: Head) -> Node:
    weight = emit("t", head.weight) if head.weight_is_transposed else head.weight
    return emit("flatten", weight, 1) if tensor_of(weight).dim() > 2 else weight


def _outer(emit: Emitter, outer: Outer | Exit, made: dict[Any, Node]) -> Any:
    """The node of a tensor that is not computed in chunks."""
    if isinstance(outer, Exit):
        return _shaped(emit, outer, made)
    if outer.node is not None:
        return outer.node
    assert outer.call is not None
    function, args, kwargs = outer.call
    key = id(outer.call)
    if key not in made:

        def argument(leaf: Any) -> Any:
            if not isinstance(leaf, Outer | Exit):
                is_symbol = isinstance(leaf, torch.SymInt | torch.SymFloat)
                return _size(emit, leaf) if is_symbol else leaf
            node = _outer(emit, leaf, made)
            is_narrow = tensor_of(node).dtype in NARROW
            return emit("to", node, torch.float32) if is_narrow else node

        args, kwargs = tree_map(argument, (args, kwargs))
        made[key] = emit(function, *args, **kwargs)
    if outer.item is None:
        return made[key]
    if (key, outer.item) not in made:
        made[key, outer.item] = emit(operator.getitem, made[key], outer.item)
    return made[key, outer.item]


def _constant(emit: Emitter, leaf: ConstantLeaf, made: dict[Any, Node]) -> Node:
    node: Node = _outer(emit, leaf.outer, made)
    if tuple(tensor_of(node).shape) == leaf.sizes:
        return node
    return emit("reshape", node, leaf.sizes)


def _rows(
    emit: Emitter,
    tensor: Node,
    dims: tuple[Dim, ...],
    space: Space,
    wanted: Space,
    made: dict[Any, Node],
) -> tuple[Node, int]:
    """``tensor``, of rows ``space``, as ``[*rows, ...]`` of the rows ``wanted``, and how many
    dimensions of rows these are."""
    dims = finest(dims)
    labels = space.finest
    steps = wanted.steps_from(space)
    if not steps and dims[:1] == (labels,) and all(dim is None for dim in dims[1:]):
        return tensor, 1
    tensor, own = _split(emit, tensor, dims)
    rest = [number for number, label in enumerate(own) if label is None]
    order = [own.index(label) for label in labels if label in own] + rest
    if order != sorted(order):
        tensor = emit("permute", tensor, *order)
    if not set(labels) <= set(own):
        for number, label in enumerate(labels):
            if label not in own:
                tensor = emit("unsqueeze", tensor, number)
        sizes = [_size(emit, label.size) if label not in own else -1 for label in labels]
        tensor = emit("expand", tensor, *sizes, *([-1] * len(rest)))
    current = list(labels)
    for move, left in steps:
        moved = [fine for label in move.labels for fine in label.finest()]
        place = current.index(moved[0])
        if len(moved) > 1:
            tensor = emit("flatten", tensor, place, place + len(moved) - 1)
        match move.kind:
            case "slice":
                index: Any = slice(*move.numbers)
            case "select":
                (index,) = move.numbers
            case _:
                (picked,) = move.numbers
                index = _outer(emit, picked, made)
        tensor = emit(operator.getitem, tensor, (*([slice(None)] * place), index))
        if len(left) > 1:
            sizes = _sizes(emit, [label.size for label in left])
            tensor = emit("unflatten", tensor, place, sizes)
        current[place : place + len(moved)] = left
    lead = tensor_of(tensor).dim() - len(rest)
    if lead == 0:
        return emit("unsqueeze", tensor, 0), 1
    if lead > 1 and _is_flat(tensor_of(tensor), lead):
        return emit("flatten", tensor, 0, lead - 1), 1
    if lead > 1 and len(rest) == 0:
        return emit("reshape", tensor, -1), 1
    if lead > 1 and not _is_large(tensor_of(tensor), lead):
        return emit("flatten", tensor, 0, lead - 1), 1
    return tensor, lead


def _is_large(value: torch.Tensor, lead: int) -> bool:
    """Whether a copy of ``[*rows, ...]`` is to be avoided."""
    count = 1
    for size in value.shape[lead:]:
        count = count * size
    return not isinstance(count, int) or count > 8192


def _is_flat(value: torch.Tensor, lead: int) -> bool:
    """Whether the first ``lead`` dimensions lie one behind the other in memory."""
    return all(
        same(value.stride(number), value.stride(number + 1) * value.size(number + 1))
        for number in range(lead - 1)
    )


def _split(emit: Emitter, tensor: Node, dims: tuple[Dim, ...]) -> tuple[Node, list[Label | None]]:
    """``tensor`` with a dimension for each label."""
    own: list[Label | None] = []
    sizes: list[Any] = []
    for number, dim in enumerate(dims):
        own += [None] if dim is None else dim
        sizes += [tensor_of(tensor).size(number)] if dim is None else [one.size for one in dim]
    if all(dim is None or len(dim) == 1 for dim in dims):
        return tensor, own
    return emit("reshape", tensor, _sizes(emit, sizes)), own


def _sizes(emit: Emitter, sizes: Sequence[Any]) -> list[Any]:
    """``sizes`` as arguments of a reshape."""
    if 0 in (size for size in sizes if isinstance(size, int)):
        raise Refused("there are no rows")
    dynamic = [size for size in sizes if not isinstance(size, int)]
    if len(dynamic) == 1:
        return [size if isinstance(size, int) else -1 for size in sizes]
    return [_size(emit, size) for size in sizes]


def _size(emit: Emitter, size: Any) -> Any:
    """A node for a size, or another number that may change."""
    if isinstance(size, int):
        return size
    for node in emit.graph.nodes:
        if node is emit.place:
            break
        value = value_of(node)
        if isinstance(value, type(size)) and same(value, size):
            return node
        if isinstance(value, torch.Tensor) and node.op == "placeholder":
            for dim, own in enumerate(value.shape):
                if same(own, size):
                    return emit("size", node, dim)
    raise Refused(f"nothing has the size {size}")


def _shaped(emit: Emitter, exit: Exit, made: dict[Any, Node]) -> Node:
    """What a call gives for ``exit``, ``[N, ...]``, in the form of the whole."""
    if ("shaped", exit) in made:
        return made["shaped", exit]
    node, dims, value = made[exit], finest(exit.dims), exit.value
    space = exit.traced.space
    inside = [label for dim in dims if dim is not None for label in dim]
    rest = [size for dim, size in zip(dims, value.shape, strict=True) if dim is None]
    is_ordered = inside == list(space.finest) and (
        all(same(size, 1) for size in rest)
        or not any(a is None and b is not None for a, b in pairwise(dims))
    )
    if not is_ordered:
        sizes = [label.size for label in space.finest]
        node = emit("reshape", node, _sizes(emit, [*sizes, *rest]))
        labels, count = list(space.finest), iter(range(len(sizes), len(sizes) + len(rest)))
        order = [
            place
            for dim in dims
            for place in ([next(count)] if dim is None else map(labels.index, dim))
        ]
        node = emit("permute", node, *order)
    if len(tensor_of(node).shape) != len(value.shape) or not all(
        map(same, tensor_of(node).shape, value.shape)
    ):
        node = emit("reshape", node, _sizes(emit, value.shape))
    made["shaped", exit] = node
    return node


def _result(emit: Emitter, node: Node, result: Exit | Outer, made: dict[Any, Node]) -> Node:
    """What takes the place of ``node``."""
    found: Node = _outer(emit, result, made)
    value = tensor_of(node)
    if tensor_of(found).dtype != value.dtype:
        found = emit("to", found, value.dtype)
    if not value.requires_grad and tensor_of(found).requires_grad:
        found = emit("detach", found)
    if value.is_contiguous() and not tensor_of(found).is_contiguous():
        found = emit("contiguous", found)
    return found
