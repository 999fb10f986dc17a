"""What is known of a node's value: the fake tensor that Dynamo left with it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .match import Refused
from .spelling import describe


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


def number_of(argument: Any) -> float | int:
    """An argument that must be a number. A dynamic one is fixed to what it is, by a guard.

    With ``dynamic=True`` even the attributes of ``nn.CrossEntropyLoss`` come as dynamic numbers.
    """
    value = value_of(argument)
    if isinstance(value, torch.SymFloat):
        return float(value)
    if isinstance(value, torch.SymInt):
        return int(value)
    if isinstance(value, float | int):
        return value
    raise Refused(f"{argument} is computed in the graph; it has to be a number")


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are equal, whatever the dynamic sizes turn out to be."""
    return statically_known_true(a == b)


def hint(size: int | torch.SymInt) -> int:
    """The size seen while compiling, for choices that are right for any other size too."""
    value = size if isinstance(size, int) else size.node.hint
    if value is None:
        raise Refused("a size of the head depends on data")
    return value


def product(sizes: Iterable[Any]) -> Any:
    result = 1
    for size in sizes:
        result = result * size
    return result
