"""Lifts heads and losses out of checkpointed regions (``torch.utils.checkpoint``).

A region is a graph of its own, and a head and its loss may be in different ones. Once they are
rewritten there are no logits that a checkpoint would save, and inside it everything, the gradients
too, would be computed twice. So what depends on logits moves behind the region, which then returns
hidden states.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.fx import Graph, GraphModule, Node

from ..compat.graphs import EXAMPLE_VALUE, checkpointed_call, namespace_of
from ..graph import Refusal, mutation, value_of
from ..logits import follow_logits
from ..plan import Rewrite, find, heads

_STUCK = (
    "head and loss are not in the same checkpointed region, and what the region does besides (a "
    "write in place, a change of autocast or no_grad) keeps them from being moved out of it"
)


def find_across_regions(graph: Graph) -> "tuple[list[Rewrite | Refusal], list[LiftedRegion]]":
    """What ``find`` finds once heads and losses are lifted out of the regions in ``graph``.

    Copies that are no use are gone again; of the others, the caller has to ``keep`` or ``undo``
    each, before any other change to the graph.
    """
    lifted: list[LiftedRegion] = []
    stuck: list[Refusal] = []
    for region in list(_regions(graph)):
        body = _body_of(region)
        roots = set() if body is None else _roots(region, body)
        if body is not None and roots:
            copied = _lift(region, body, roots)
            if copied is not None:
                lifted.append(copied)
            else:
                stuck.append(Refusal(region, _STUCK))
    found = find(graph)
    rewritten: set[Node] = set()
    for item in found:
        if isinstance(item, Rewrite):
            rewritten.update(item.nodes)
            rewritten.update(
                consumer.node for match in item.matches for consumer in match.consumers
            )
    useless = [part for part in lifted if not part.is_useful(rewritten)]
    for part in reversed(useless):
        part.undo()
    return [*found, *stuck], [part for part in lifted if part not in useless]


def _roots(region: Node, body: GraphModule) -> set[Node]:
    """Heads and calls of the op in ``body``, and what of its inputs are logits."""
    roots = {head.node for head in heads(body.graph)}
    roots.update(node for node in body.graph.nodes if _is_call(node))
    for head in heads(region.graph):
        flow = follow_logits(head)
        if region in flow.unsupported:
            inputs = zip(body.graph.find_nodes(op="placeholder"), region.args[1:], strict=True)
            roots.update(inner for inner, outer in inputs if outer in flow.nodes)
    return roots


def _is_call(node: Node) -> bool:
    return node.op == "call_function" and namespace_of(node.target) == "lmhead_pass"


@dataclass
class LiftedRegion:
    """The end of a region, copied behind it. The region itself is unchanged until ``keep``."""

    region: Node
    """The call of the checkpointed body."""
    body: GraphModule
    copies: dict[Node, Node]
    """Nodes of the body that depend on logits, and their copies behind the region."""
    needed: list[Node]
    """What of the body, besides its inputs, the copies read."""
    inputs: list[Node] = field(default_factory=list)
    """The copies' ``needed``, as results of the region."""
    taken: dict[Node, Node] = field(default_factory=dict)
    """The results of the region, and the copies that are used instead of them for now."""
    withheld: dict[int, Node] = field(default_factory=dict)
    """Logits that were arguments of the region: the copies read them now."""

    def is_useful(self, rewritten: set[Node]) -> bool:
        """Whether some of it is rewritten, or was before."""
        return any(map(_is_call, self.copies)) or not rewritten.isdisjoint(self.copies.values())

    def keep(self) -> None:
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


def _lift(region: Node, body: GraphModule, roots: set[Node]) -> LiftedRegion | None:
    """Copy what depends on ``roots``, nodes of ``body``, behind ``region``; None if that is not
    to be done."""
    if not all(map(_may_move, body.graph.nodes)):
        return None
    moved = _depending_on(body.graph, roots)
    outputs = body.graph.output_node().args[0]
    needed = [
        node
        for node in body.graph.nodes
        if node.op not in ("placeholder", "output")
        and node not in moved
        and any(user in moved for user in node.users)
    ]
    if any(not isinstance(value_of(node), torch.Tensor) for node in needed):
        return None
    lifted = LiftedRegion(region, body, {}, needed)
    graph = region.graph
    inputs = dict(zip(body.graph.find_nodes(op="placeholder"), region.args[1:], strict=True))
    place = region.next
    with graph.inserting_before(place):
        for number, node in enumerate(needed):
            inputs[node] = graph.call_function(operator.getitem, (region, len(outputs) + number))
            inputs[node].meta.update(node.meta)
            lifted.inputs.append(inputs[node])
        for node in moved:
            inputs[node] = graph.node_copy(node, lambda argument: inputs[argument])
            lifted.copies[node] = inputs[node]
    for result in list(region.users):
        if result not in lifted.inputs and (value := outputs[result.args[1]]) in moved:
            result.replace_all_uses_with(inputs[value])
            lifted.taken[result] = inputs[value]
    for number, inner in enumerate(body.graph.find_nodes(op="placeholder"), 1):
        if inner in roots:
            lifted.withheld[number] = region.args[number]
            region.update_arg(number, None)
    return lifted


def _regions(graph: Graph) -> Iterator[Node]:
    """The calls of checkpointed bodies in ``graph``."""
    if (target := checkpointed_call()) is not None:
        yield from graph.find_nodes(op="call_function", target=target)


def _body_of(region: Node) -> GraphModule | None:
    """The body that ``region`` alone calls; None if there is none."""
    name = region.args[0]
    module = region.graph.owning_module
    if name.op != "get_attr" or len(name.users) != 1 or module is None:
        return None
    same = [node for node in region.graph.find_nodes(op="get_attr") if node.target == name.target]
    body = getattr(module, name.target, None)
    outputs = body.graph.output_node().args[0] if isinstance(body, GraphModule) else None
    if len(same) != 1 or not isinstance(outputs, tuple | list):
        return None
    if any(user.target is not operator.getitem for user in region.users):
        return None
    return body


def _may_move(node: Node) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    changes_mode = isinstance(value_of(node), type(None)) or node.op == "get_attr"
    return not changes_mode and not mutation.may_write(node)


def _depending_on(graph: Graph, roots: set[Node]) -> list[Node]:
    moved: dict[Node, None] = {}
    for node in graph.nodes:
        is_root = node in roots and node.op != "placeholder"
        if node.op not in ("placeholder", "output") and (
            is_root or any(source in moved or source in roots for source in node.all_input_nodes)
        ):
            moved[node] = None
    return list(moved)
