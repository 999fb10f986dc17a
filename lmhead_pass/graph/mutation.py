"""Which nodes of a pre-grad graph may write to a tensor.

Pre-grad graphs are not functional: ``hidden.add_(1)`` between the head and the loss has no edge to
the loss, and still decides what a head that is moved down to the loss would read. A node counts as
writing to its arguments unless it is known to leave them alone.
"""

import builtins
import inspect
import operator
from collections.abc import Container, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch.fx import Node

from ..compat.graphs import checkpointed_call, is_torch_op, writes_by_schema
from .bodies import bodies_of
from .tensors import memory_of

_WRITING_OPERATORS = {
    operator.setitem,
    operator.delitem,
    *(
        getattr(operator, f"i{name}")
        for name in (
            *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "concat"),
            *("and", "or", "xor", "lshift", "rshift"),
        )
    ),
}
# The same as methods; others, such as __eq__, write to nothing.
_WRITING_SPECIAL_METHODS = {f"__{function.__name__}__" for function in _WRITING_OPERATORS}
_PURE_MODULES = ("_operator", "builtins", "math", "torch.functional", "torch.special")
# These do not say in their names, or by an ``inplace`` argument, that they write.
_WRITING_IF_MAX_NORM = {F.embedding: ("weight",), F.embedding_bag: ("weight",)}
_WRITING_STATISTICS = dict.fromkeys(
    (F.batch_norm, F.instance_norm), ("running_mean", "running_var")
)
_QUIET_WRITERS = _WRITING_IF_MAX_NORM | _WRITING_STATISTICS


def writers(nodes: Iterable[Node], of: Iterable[Node]) -> Iterator[Node]:
    """Yield those of ``nodes`` that may write to the memory of any of the tensors ``of``."""
    memory = {storage for node in of for storage in memory_of(node)}
    for node in nodes:
        if not memory.isdisjoint(memory_written(node)):
            yield node


def memory_written(node: Node) -> set[int]:
    """Return the storages that ``node`` may write to."""
    if not may_write(node):
        return set()
    return {storage for argument in _written_by(node) for storage in memory_of(argument)}


def has_other_names(made: Node, but: Container[Node] = ()) -> bool:
    """Whether an earlier node holds what ``made`` makes or writes to, and is read later.

    An input of the graph counts as read later, by the caller. Other nodes in ``but`` do not count.
    """
    memory = memory_of(made) | memory_written(made)
    for node in made.graph.nodes:
        if node is made:
            return False
        is_input = node.op in ("placeholder", "get_attr")
        is_read_later = node not in but and any(user > made for user in node.users)
        if (is_input or is_read_later) and not memory.isdisjoint(memory_of(node)):
            return True
    raise AssertionError("a node is in its graph")


def _written_by(node: Node) -> list[Node]:
    """Return the arguments that ``node`` may write to."""
    if node.target in _QUIET_WRITERS:
        given = _bound(node)
        named = (given.get(name) for name in _QUIET_WRITERS[node.target])
        return [argument for argument in named if isinstance(argument, Node)]
    if "out" not in node.kwargs and (node.op == "call_method" or node.target in _WRITING_OPERATORS):
        return [argument for argument in node.args[:1] if isinstance(argument, Node)]
    return list(node.all_input_nodes)


def may_write(node: Node) -> bool:
    """Whether ``node`` may write to any of its arguments."""
    return writes(node) or not _is_known(node)


def writes(node: Node) -> bool:
    """Whether ``node`` is known to write to any of its arguments."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if "out" in node.kwargs:
        return True
    if node.op == "call_method":
        name = str(node.target)
        return name in _WRITING_SPECIAL_METHODS if name.endswith("__") else name.endswith("_")
    if node.op != "call_function":
        return False
    target = node.target
    if target in _QUIET_WRITERS:
        return target in _WRITING_STATISTICS or _bound(node).get("max_norm") is not None
    if is_torch_op(target):
        return writes_by_schema(target)
    if target in _WRITING_OPERATORS or target.__name__.endswith("_"):
        return True
    return bool(target.__module__ == F.__name__ and _bound(node).get("inplace"))


def _is_known(node: Node) -> bool:
    """Whether ``node`` calls torch or Python, not a higher-order op or other people's code."""
    if node.op != "call_function":
        return bool(node.op != "call_module")
    target = node.target
    if is_torch_op(target):
        return True
    name, module = target.__name__, target.__module__ or ""
    is_torch_builtin = inspect.isbuiltin(target) and (
        module.startswith("torch") or getattr(torch, name, None) is target
    )
    if target is torch.batch_norm:  # it writes to its statistics
        return False
    if target is checkpointed_call():
        bodies = bodies_of(node)
        return bool(bodies) and not any(may_write(n) for body in bodies for n in body.graph.nodes)
    is_pure = module in (*_PURE_MODULES, F.__name__) or target is builtins.getattr
    return is_torch_builtin or is_pure


def _bound(node: Node) -> dict[str, object]:
    return inspect.signature(node.target).bind_partial(*node.args, **node.kwargs).arguments


def nodes_between(first: Node, last: Node) -> Iterator[Node]:
    """Yield the nodes after ``first`` and before ``last``."""
    node = first
    while node is not last:
        node = node.next
        if node is not last:
            yield node
