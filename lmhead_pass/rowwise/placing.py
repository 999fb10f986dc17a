"""Where the calls of a region come in its graph."""

from collections.abc import Collection, Iterable

from torch.fx import Graph, Node

from ..compat.graphs import tree_leaves
from ..graph import (
    Refused,
    at,
    canonical_op,
    describe,
    gradients_are_recorded,
    mutation,
    value_of,
)
from ..plan import run_the_same_behind


class Placing:
    def __init__(
        self, graph: Graph, inside: set[Node], traced: set[Node], dependents: set[Node]
    ) -> None:
        """``inside`` are the nodes that are run in chunks, ``traced`` those of the region, and
        ``dependents`` what depends on its heads."""
        self._graph, self._inside, self._traced = graph, inside, traced
        self._dependents = dependents
        self._order = {node: number for number, node in enumerate(graph.nodes)}

    def place(
        self, sources: set[Node], results: Collection[Node], is_differentiated: bool
    ) -> tuple[Node, tuple[Node, ...]]:
        """Where the calls come, which read ``sources``, and what moves behind them."""
        order, inside = self._order, self._inside
        read = {source: self._read_by(source) for source in sources}
        since = [self._known_since(source, first) for source, (first, _) in read.items()]
        last = max(since, key=order.__getitem__)
        first = min(results, key=order.__getitem__, default=None)
        if first is None:
            raise Refused("nothing is made of the logits")
        place = first if order[first] > order[last] else last.next
        while is_differentiated and not gradients_are_recorded(place) and place.op != "output":
            place = place.next
        moved = sorted(self._moved(results, place), key=order.__getitem__)
        if moved and not run_the_same_behind(place.prev, tuple(moved)):
            raise Refused("what reads one loss has to run before another one is known")
        end = self._graph.output_node() if is_differentiated else place
        for source, (start, stop) in read.items():
            stop = max(stop, end, key=order.__getitem__)
            for writer in mutation.writers(mutation.nodes_between(start, stop), of=[source]):
                if writer not in inside:
                    raise Refused(
                        f"{describe(writer)}{at(writer)} may change what the head and its losses "
                        "read in place"
                    )
        return place, tuple(moved)

    def _read_by(self, source: Node) -> tuple[Node, Node]:
        """The first and the last that read ``source`` in chunks."""
        readers = [user for user in source.users if user in self._inside] or self._inside
        return min(readers, key=self._order.__getitem__), max(readers, key=self._order.__getitem__)

    def _known_since(self, source: Node, first: Node) -> Node:
        """The node behind which ``source`` holds what its reader ``first`` reads."""
        between = mutation.nodes_between(source, first)
        writers = list(mutation.writers(between, of=[source]))
        for writer in writers:
            if writer in self._dependents:
                raise Refused(
                    f"{describe(writer)}{at(writer)} writes what is made of the logits to what is "
                    "read with them"
                )
        return max([source, *writers], key=self._order.__getitem__)

    def _moved(self, results: Iterable[Node], place: Node) -> set[Node]:
        """What depends on the results and stands before ``place``."""
        found, pending = set[Node](), list(results)
        while pending:
            for user in pending.pop().users:
                if self._order[user] < self._order[place] and user not in found | self._traced:
                    if canonical_op(user) is None or not tree_leaves(value_of(user)):
                        raise Refused(f"{describe(user)} has to run before the losses are known")
                    found.add(user)
                    pending.append(user)
        return found
