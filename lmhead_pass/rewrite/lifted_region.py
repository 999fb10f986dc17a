"""The end of a checkpointed region, copied into the graph that calls the region."""

from dataclasses import dataclass, field

from torch.fx import GraphModule, Node

from ..compat.graphs import EXAMPLE_VALUE, namespace_of
from ..graph import value_of


def is_call(node: Node) -> bool:
    """Whether ``node`` calls an op of this package."""
    return node.op == "call_function" and namespace_of(node.target) == "lmhead_pass"


@dataclass
class LiftedRegion:
    """The end of a region, copied behind it. The region itself is unchanged until ``commit``."""

    region: Node
    """The call of the checkpointed body."""
    body: GraphModule
    copies: dict[Node, Node]
    """Nodes of the body that depend on logits, and their copies behind the region."""
    needed: list[Node]
    """Nodes of the body that the copies read, besides its inputs."""
    inputs: list[Node] = field(default_factory=list)
    """``needed``, as the copies read them: as results of the region."""
    taken: dict[Node, Node] = field(default_factory=dict)
    """Results of the region, and the copies that stand for them."""
    withheld: dict[int, Node] = field(default_factory=dict)
    """Logits that were arguments of the region: the copies read them now."""

    def is_useful(self, rewritten: set[Node]) -> bool:
        """Whether some of it is rewritten, or was before."""
        return any(map(is_call, self.copies)) or not rewritten.isdisjoint(self.copies.values())

    def commit(self) -> None:
        """Let the region return what the copies read, and not compute them itself."""
        outputs = list(self.body.graph.output_node().args[0])
        kept = [value for value in outputs if value not in self.copies]
        places = {old: kept.index(value) for old, value in enumerate(outputs) if value in kept}
        for result in list(self.region.users):
            if result in self.inputs:
                result.args = (self.region, len(kept) + self.inputs.index(result))
            elif result.args[1] in places:
                result.args = (self.region, places[result.args[1]])
            else:
                result.graph.erase_node(result)
        results = (*kept, *self.needed)
        self.body.graph.output_node().args = (results,)
        self.region.meta[EXAMPLE_VALUE] = tuple(map(value_of, results))
        for node in reversed(self.copies):
            self.body.graph.erase_node(node)
        placeholders = self.body.graph.find_nodes(op="placeholder")
        for number in self.withheld:
            self.body.graph.erase_node(placeholders[number - 1])
        arguments = enumerate(self.region.args)
        self.region.args = tuple(arg for number, arg in arguments if number not in self.withheld)
        self.body.recompile()
        if not results:
            self.region.graph.erase_node(self.region)

    def let_go(self) -> None:
        """Let the results of the region be used again."""
        for result, copy in self.taken.items():
            copy.replace_all_uses_with(result)
        for number, logits in self.withheld.items():
            self.region.update_arg(number, logits)

    def undo(self) -> None:
        """Take the copies away again."""
        self.let_go()
        for node in reversed([*self.inputs, *self.copies.values()]):
            self.region.graph.erase_node(node)
