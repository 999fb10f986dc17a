"""Lifts heads and losses out of checkpointed regions (``torch.utils.checkpoint``).

A region is a graph of its own, and a head and its loss may be in different ones. Once they are
rewritten there are no logits that a checkpoint would save, and inside it everything, the gradients
too, would be computed twice. So what depends on logits moves behind the region, which then returns
hidden states.
"""

import operator
from collections.abc import Iterator

import torch
from torch.fx import Graph, GraphModule, Node

from ..compat.compiling import graph_of_function
from ..compat.graphs import checkpointed_call
from ..graph import Refusal, draws, mutation, value_of
from ..logits import Flow, follow_logits, is_loss, large_heads
from ..plan import Rewrite, find
from .edit import GraphEdit
from .lifted_region import LiftedRegion, is_call

_STUCK = (
    "head and loss are not in the same checkpointed region, and what the region does besides (a "
    "write in place, a change of autocast or no_grad) keeps them from being moved out of it"
)


def will_be_seen_with_its_caller(graph: Graph) -> bool:
    """Whether ``graph`` is a region of the function that is being compiled.

    Inductor runs passes on the graphs that a graph calls first, then on that graph.
    """
    todo = [graph_of_function()]
    for caller in todo:
        if caller is not None:
            todo += (body.graph for _, body in regions_of(caller))
    return graph in todo[1:]


def find_across_regions(
    edit: GraphEdit, of_loss_alone: bool
) -> tuple[list[Rewrite | Refusal], dict[Node, Refusal]]:
    """What ``find`` finds once heads and losses are lifted out of the regions in the graph.

    What was lifted for nothing is put back; the rest becomes part of ``edit``. Beside it, the
    regions out of which nothing can be lifted.
    """
    stuck: dict[Node, Refusal] = {}
    for region, body in list(regions_of(edit.graph)):
        if roots := _roots(region, body):
            lifted = _lift(region, body, roots)
            if lifted is None:
                stuck[region] = Refusal(region, _STUCK)
            else:
                edit.regions.append(lifted)
    found = find(edit.graph, of_loss_alone)
    rewritten: set[Node] = set()
    for item in found:
        if isinstance(item, Rewrite):
            rewritten.update(item.nodes)
            rewritten.update(
                consumer.node for match in item.matches for consumer in match.consumers
            )
    useful = [lifted for lifted in edit.regions if lifted.is_useful(rewritten)]
    for lifted in reversed([lifted for lifted in edit.regions if lifted not in useful]):
        lifted.undo()
    edit.regions = useful
    return found, stuck


def _roots(region: Node, body: GraphModule) -> set[Node]:
    """Heads and calls of the op in ``body``, and those of its inputs that are logits.

    A large linear layer that feeds an attention or an activation of the region is no head.
    """
    has_loss = any(map(is_loss, body.graph.nodes))
    roots = {
        head.node
        for head in large_heads(body.graph)
        if has_loss or _may_have_loss(follow_logits(head))
    }
    roots.update(node for node in body.graph.nodes if is_call(node))
    for head in large_heads(region.graph):
        flow = follow_logits(head)
        if region in flow.unsupported:
            inputs = zip(body.graph.find_nodes(op="placeholder"), region.args[1:], strict=True)
            roots.update(inner for inner, outer in inputs if outer in flow.nodes)
    return roots


def _may_have_loss(flow: Flow) -> bool:
    """Whether these logits are read as logits in a region without a loss, or leave it."""
    return bool(flow.consumers or flow.returned)


def _lift(region: Node, body: GraphModule, roots: set[Node]) -> LiftedRegion | None:
    """Copy what depends on ``roots``, nodes of ``body``, behind ``region``; None if that is not
    to be done."""
    if not all(map(_may_move, body.graph.nodes)):
        return None
    inputs = dict(zip(body.graph.find_nodes(op="placeholder"), region.args[1:], strict=True))
    constants = {inner for inner, outer in inputs.items() if _is_input(outer)}
    moved = _with_weights(body.graph, _depending_on(body.graph, roots), constants)
    if any(map(draws, moved)):  # it would be drawn in the region, and behind it again
        return None
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


def regions_of(graph: Graph) -> Iterator[tuple[Node, GraphModule]]:
    """The calls of checkpointed bodies in ``graph``, and the body of each."""
    if (target := checkpointed_call()) is not None:
        for region in graph.find_nodes(op="call_function", target=target):
            if (body := _body_of(region)) is not None:
                yield region, body


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


def _is_input(argument: object) -> bool:
    return isinstance(argument, Node) and argument.op in ("placeholder", "get_attr")


def _depending_on(graph: Graph, roots: set[Node]) -> list[Node]:
    moved: dict[Node, None] = {}
    for node in graph.nodes:
        is_root = node in roots and node.op != "placeholder"
        if node.op not in ("placeholder", "output") and (
            is_root or any(source in moved or source in roots for source in node.all_input_nodes)
        ):
            moved[node] = None
    return list(moved)


def _with_weights(graph: Graph, moved: list[Node], constants: set[Node]) -> list[Node]:
    """``moved``, with what makes weights, biases and targets of ``constants`` for it alone.

    These are inputs of the whole graph. Behind the regions, what each of them makes of one weight
    can be seen to be the same. Hidden states stay: their layers would not be checkpointed.
    """
    hidden = {head.hidden for head in large_heads(graph)}
    found, made = set(moved), set(constants)
    for node in graph.nodes:
        is_made = node.op not in ("placeholder", "output") and not draws(node)
        if is_made and made.issuperset(node.all_input_nodes):
            made.add(node)
    for node in reversed(graph.nodes):
        if node in made - constants - hidden and node.users and found.issuperset(node.users):
            found.add(node)
    return sorted(found)
