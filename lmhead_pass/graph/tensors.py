"""What is known of a node's value: the fake tensor that Dynamo left with it."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from .canonical_ops import describe
from .refusal import Refused

ENTER_INFERENCE = torch.autograd.grad_mode._enter_inference_mode
EXIT_INFERENCE = torch.autograd.grad_mode._exit_inference_mode
ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast
AUTOCAST_SWITCHES = (ENTER_AUTOCAST, torch.amp.autocast_mode._exit_autocast)


def value_of(node: Any) -> Any:
    """The example value of a node, or what is not a node as it is."""
    return node.meta.get("example_value") if isinstance(node, Node) else node


def tensor_of(node: Any) -> torch.Tensor:
    """The example tensor of ``node``; Refused if it is not a plain tensor."""
    value = value_of(node)
    if not isinstance(node, Node) or not isinstance(value, torch.Tensor):
        raise Refused(f"{node} is not a tensor of this graph")
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        raise Refused(f"{describe(node)} is inside a torch.func transform (grad, vmap, ...)")
    if is_traceable_wrapper_subclass(value):
        raise Refused(f"{describe(node)} is a {type(value).__name__}, not a plain tensor")
    if value.layout != torch.strided:
        raise Refused(f"{describe(node)} is not a dense tensor")
    return value


def is_plain(value: Any) -> bool:
    """Whether ``value`` is a tensor outside of torch.func transforms: inside, what it says of
    gradients is not what is outside."""
    return isinstance(value, torch.Tensor) and not (
        torch._C._functorch.is_functorch_wrapped_tensor(value)
    )


def wraps_none(value: Any) -> bool:
    """Whether ``value`` is a plain tensor that wraps no others, as a DTensor does."""
    return is_plain(value) and not is_traceable_wrapper_subclass(value)


def memory_of(node: Node) -> set[int]:
    """The memory that a node's value lives in, as its fake tensors share it."""
    tensors = (v for v in tree_leaves(value_of(node)) if isinstance(v, torch.Tensor))
    return {part.untyped_storage()._cdata for tensor in tensors for part in _inside(tensor)}


def _inside(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that ``tensor`` wraps; itself if it is one."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        yield from _inside(torch._C._functorch.get_unwrapped(tensor))
    elif is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _inside(getattr(tensor, name))
    else:
        yield tensor


def is_number(argument: Any) -> bool:
    """Whether an argument is a number, and not a tensor of one."""
    return not isinstance(value_of(argument), torch.Tensor | None)


def number_of(argument: Any) -> float | int:
    """An argument that must be a number. A dynamic one is fixed to what it is, by a guard.

    With ``dynamic=True`` even the attributes of ``nn.CrossEntropyLoss`` come as dynamic numbers.
    """
    value = value_of(argument)
    if isinstance(value, torch.SymFloat):
        return float(value)
    if isinstance(value, torch.SymInt):
        return int(value)
    if isinstance(value, float | int) and not isinstance(value, bool):
        return value
    raise Refused(f"{argument} is computed in the graph; it has to be a number")


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are equal, whatever the dynamic sizes turn out to be."""
    return statically_known_true(a == b)


def same_shape(a: Node, b: Node) -> bool:
    """Whether two tensors have the same sizes, whatever the dynamic ones turn out to be."""
    shapes = tensor_of(a).shape, tensor_of(b).shape
    return len(shapes[0]) == len(shapes[1]) and all(map(same, *shapes))


def hint(size: int | torch.SymInt) -> int:
    """The size seen while compiling, for choices that are right for any other size too.

    0 if it depends on data, and nothing is known of it.
    """
    value = size if isinstance(size, int) else size.node.hint
    return 0 if value is None else value


def product(sizes: Iterable[Any]) -> Any:
    result = 1
    for size in sizes:
        result = result * size
    return result


def gradients_are_recorded(node: Node) -> bool:
    """Whether the graph is outside ``no_grad`` and ``inference_mode`` at ``node``."""
    recorded = True
    for earlier in node.graph.nodes:
        if earlier is node:
            return recorded
        if earlier.target is torch._C._set_grad_enabled:
            recorded = bool(earlier.args[0])
        elif earlier.target is ENTER_INFERENCE:
            return False
    raise AssertionError("a node is in its graph")


def is_cut_off(node: Node) -> bool:
    """Whether ``node`` requires a gradient, and autograd does not know what it is made of.

    That is so for a view of a view that is made under no_grad.
    """
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or not value.requires_grad:
        return False
    try:
        return value.grad_fn is None
    except RuntimeError:  # of some views, when what they view has been written to
        return True


def is_inference(node: Node) -> bool:
    """Whether the graph enters inference mode before ``node``, and leaves it after."""
    while (node := node.prev).op not in ("placeholder", "root"):
        if node.target in (ENTER_INFERENCE, EXIT_INFERENCE):
            return node.target is ENTER_INFERENCE
    return False
