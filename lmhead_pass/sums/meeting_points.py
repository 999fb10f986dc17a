"""Finds the single numbers through which all gradients of some other numbers pass."""

from collections.abc import Iterable, Iterator

from torch.fx import Node

from ..graph import is_plain, memory_of, mutation, passing, value_of


def meeting_points(numbers: Iterable[Node]) -> Iterator[Node]:
    """Each single number through which all gradients of ``numbers`` pass, in graph order."""
    numbers = set(numbers)
    graph = min(numbers).graph
    on_the_way = passing(graph)
    carriers: set[Node] = set()
    """Nodes through which a gradient of the numbers may pass."""
    written: set[int] = set()
    """The memory that carriers write to."""
    for node in mutation.nodes_between(min(numbers).prev, graph.output_node()):
        is_user = not carriers.isdisjoint(node.all_input_nodes)
        if node in numbers:
            if is_user:
                return
            carriers.add(node)
        elif node in on_the_way and (is_user or not written.isdisjoint(memory_of(node))):
            carriers.add(node)
            if is_user and mutation.may_write(node):
                written |= mutation.memory_written(node)
                names = [name for name in _before(node) if memory_of(name) & written]
                if any(name.op in ("placeholder", "get_attr") for name in names):
                    return  # it is read outside of the graph
                carriers.update(names)
            value = value_of(node)
            is_number = is_plain(value) and value.dim() == 0 and value.is_floating_point()
            if is_number and numbers <= carriers:
                others = (user for name in carriers - {node} for user in name.users)
                if all(user <= node for user in others if user in on_the_way):
                    yield node


def _before(node: Node) -> Iterator[Node]:
    return mutation.nodes_between(node.graph._root, node)
