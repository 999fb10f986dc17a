"""An edit of a graph: prepared beside what is there, then committed or rolled back."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch.fx import Graph, Node

from ..logits import Logits
from .lifted_region import LiftedRegion


@dataclass
class GraphEdit:
    """New nodes are inserted at once, and nothing reads them before ``commit``.

    Nodes may be moved before, too: ``roll_back`` knows where they were.
    """

    graph: Graph
    replaced: dict[Node, Node] = field(default_factory=dict)
    """What all users of a node are to read instead."""
    returned: dict[Node, Node] = field(default_factory=dict)
    """What the graph is to return instead of a node."""
    deferred: list[Logits] = field(default_factory=list)
    """Logits of which no loss is taken here: they leave the graph, to be computed if read."""
    beside: list[Node] = field(default_factory=list)
    """What the graph is to return after all else, unseen by Dynamo, which counts from the front."""
    erased: set[Node] = field(default_factory=set)
    regions: list[LiftedRegion] = field(default_factory=list)
    """What was lifted out of checkpointed regions."""
    parts: list["GraphEdit"] = field(default_factory=list)
    """The edits of those regions out of which nothing was lifted."""

    def __post_init__(self) -> None:
        self._before = dict.fromkeys(self.graph.nodes)

    def graphs(self) -> Iterator[Graph]:
        """The graph, and those of its checkpointed regions that are edited by themselves."""
        yield self.graph
        for part in self.parts:
            yield from part.graphs()

    def check(self) -> None:
        """AssertionError unless, after ``commit``, each node would find what it reads before it."""
        order = {node: number for number, node in enumerate(self.graph.nodes)}
        for node in self.graph.nodes:
            if node in self.erased:
                continue
            for source in node.all_input_nodes:
                found = self.replaced.get(source, source)
                if node.op == "output":
                    found = self.returned.get(source, found)
                found = source if found is node else found
                if found in self.erased or order[found] >= order[node]:
                    raise AssertionError(f"{node} needs {found}, which is not there")
        for part in self.parts:
            part.check()

    def commit(self) -> None:
        for region in self.regions:
            region.commit()
        for before, after in self.replaced.items():
            before.replace_all_uses_with(after, lambda user, after=after: user is not after)
        for before, after in self.returned.items():
            self.graph.output_node().replace_input_with(before, after)
        output = self.graph.output_node()
        if self.beside:
            output.args = ((*output.args[0], *self.beside),)
        for node in reversed([node for node in self.graph.nodes if node in self.erased]):
            self.graph.erase_node(node)
        for part in self.parts:
            part.commit()
            part.graph.owning_module.recompile()

    def roll_back(self) -> None:
        """Leave the graph as it was when this edit began."""
        for part in self.parts:
            part.roll_back()
        for region in self.regions:
            region.let_go()
        for node in reversed([node for node in self.graph.nodes if node not in self._before]):
            self.graph.erase_node(node)
        for node in self._before:
            self.graph.output_node().prepend(node)
