"""What Dynamo knows of a node's value: it leaves a fake tensor with the node."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from ..compat import graphs
from ..compat.graphs import ENTER_AUTOCAST, ENTER_INFERENCE, EXIT_AUTOCAST, EXIT_INFERENCE
from .canonical_ops import canonical_op, describe
from .refusal import Refused

AUTOCAST_SWITCHES = (ENTER_AUTOCAST, EXIT_AUTOCAST)


def is_input(node: Node) -> bool:
    """Whether ``node`` stands for what the graph is given: an argument, or an attribute."""
    return node.op in ("placeholder", "get_attr")


def value_of(node: Any) -> Any:
    """Return the fake value of a node; an argument that is no node is its own value."""
    return node.meta.get(graphs.EXAMPLE_VALUE) if isinstance(node, Node) else node


def tensor_of(node: Any) -> torch.Tensor:
    """Return the fake tensor of ``node``; raise Refused if its value is not a plain tensor."""
    value = value_of(node)
    if not isinstance(node, Node) or not isinstance(value, torch.Tensor):
        raise Refused(f"{node} is not a tensor of this graph")
    if graphs.is_transformed(value):
        raise Refused(f"{describe(node)} is inside a torch.func transform (grad, vmap, ...)")
    if graphs.is_wrapper(value):
        raise Refused(f"{describe(node)} is a {type(value).__name__}, not a plain tensor")
    if value.layout != torch.strided:
        raise Refused(f"{describe(node)} is not a dense tensor")
    return value


def seen_by(node: Node) -> Any:
    """The tensor of which ``node`` reads only shape, dtype and device; None if it reads values."""
    if canonical_op(node) == "like":
        return node.args[0] if node.args else node.kwargs.get("input")
    if (
        canonical_op(node) in ("cast", "reshape", "expand")
        and len(node.args) == 2
        and not node.kwargs
    ):
        source, like = node.args  # of ``type_as``, ``view_as`` ...
        is_seen = isinstance(value_of(like), torch.Tensor) and like is not source
        return like if is_seen else None
    return None


def is_plain(value: Any) -> bool:
    """Whether ``value`` is a tensor outside of torch.func transforms.

    Inside of one, ``requires_grad`` tells of that transform alone.
    """
    return isinstance(value, torch.Tensor) and not (graphs.is_transformed(value))


def wraps_none(value: Any) -> bool:
    """Whether ``value`` is a plain tensor. A DTensor, which wraps others, is not."""
    return is_plain(value) and not graphs.is_wrapper(value)


def memory_of(node: Node) -> set[int]:
    """Return the storages of a node's value. Tensors that share memory share a storage."""
    tensors = (v for v in graphs.tree_leaves(value_of(node)) if isinstance(v, torch.Tensor))
    return {graphs.memory_of(part) for tensor in tensors for part in _inside(tensor)}


def _inside(tensor: Any) -> Iterator[torch.Tensor]:
    """Yield the plain tensors that ``tensor`` wraps, or ``tensor`` if it wraps none."""
    if graphs.is_transformed(tensor):
        yield from _inside(graphs.untransformed(tensor))
    elif graphs.is_wrapper(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _inside(getattr(tensor, name))
    else:
        yield tensor


def is_number(argument: Any) -> bool:
    """Whether an argument is a number, and not a tensor of one."""
    return not isinstance(value_of(argument), torch.Tensor | None)


def is_symbol(argument: Any) -> bool:
    """Whether an argument is a number that may be another one in the next call."""
    return isinstance(value_of(argument), torch.SymFloat | torch.SymInt)


def number_of(argument: Any) -> float | int:
    """Return an argument as a number; raise Refused if the graph computes it, or if it changes.

    With ``dynamic=True`` even the attributes of ``nn.CrossEntropyLoss`` come as dynamic numbers: a
    guard fixes them to the value they have. Otherwise a dynamic number is one that has changed, and
    would have to be compiled again for each value.
    """
    value = value_of(argument)
    if is_symbol(argument):
        if graphs.size_hint(value) is None:
            raise Refused(f"{argument} is known at run time only")
        if not graphs.are_all_numbers_dynamic():
            raise Refused(f"{argument} is another number in another call")
        return float(value) if isinstance(value, torch.SymFloat) else int(value)
    if isinstance(value, float | int) and not isinstance(value, bool):
        return value
    raise Refused(f"{argument} is computed in the graph; it has to be a number")


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are equal, whatever the dynamic sizes turn out to be."""
    return graphs.is_known_true(a == b)


def same_shape(a: Node, b: Node) -> bool:
    """Whether two tensors have the same sizes, whatever the dynamic ones turn out to be."""
    shapes = tensor_of(a).shape, tensor_of(b).shape
    return len(shapes[0]) == len(shapes[1]) and all(map(same, *shapes))


def hint(size: int | torch.SymInt) -> int:
    """Return the size seen while compiling, for choices that are right for other sizes too.

    0 if the size depends on data: nothing is known of it.
    """
    value = size if isinstance(size, int) else graphs.size_hint(size)
    return 0 if value is None else value


def product(sizes: Iterable[Any]) -> Any:
    """Multiply sizes, dynamic ones among them."""
    result = 1
    for size in sizes:
        result = result * size
    return result


class _GradMode(NamedTuple):
    recorded: bool
    inference: bool


def _modes(graph: Graph) -> Iterator[tuple[Node, _GradMode]]:
    """Each node, and the mode in which it runs."""
    mode = _GradMode(recorded=True, inference=False)
    before_block: dict[Node, _GradMode] = {}
    for node in graph.nodes:
        yield node, mode
        if node.target is graphs.SET_GRAD_ENABLED:
            mode = mode._replace(recorded=bool(node.args[0]))
        elif node.target is ENTER_INFERENCE:
            before_block[node] = mode
            enters = bool(node.args[0]) if node.args else True
            mode = _GradMode(recorded=not enters, inference=enters)
        elif node.target is EXIT_INFERENCE:
            mode = before_block[node.args[0]]


def gradients_are_recorded(node: Node) -> bool:
    """Whether the graph is outside ``no_grad`` and ``inference_mode`` at ``node``."""
    return next(recorded for earlier, recorded in gradient_modes(node.graph) if earlier is node)


def gradient_modes(graph: Graph) -> Iterator[tuple[Node, bool]]:
    """Each node, and whether gradients are recorded there."""
    return ((node, mode.recorded and not mode.inference) for node, mode in _modes(graph))


def in_inference(graph: Graph) -> set[Node]:
    """The nodes that run in inference mode."""
    return {node for node, mode in _modes(graph) if mode.inference}


def is_cut_off(node: Node) -> bool:
    """Whether ``node`` requires a gradient and has nowhere to pass it.

    A view of a view, made under no_grad, is like that. What returns a leaf as it was given it, a
    cast to the dtype that it has, is not.
    """
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or not value.requires_grad:
        return False
    if any(value is value_of(source) for source in node.all_input_nodes):
        return False
    try:
        return value.grad_fn is None
    except RuntimeError:  # some views raise it once somebody has written to what they view
        return True
