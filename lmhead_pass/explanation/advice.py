"""What keeps head and loss apart in what was captured of a function, and what to do about it.

A graph break matters only between a head and its loss. Others may well be there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.fx import Graph, Node

from ..graph import Place, Refusal, describe, hint, place_of, tensor_of
from ..logits import class_count, is_head, is_loss
from ..plan import has_no_head, is_whole, unread_heads
from .fixes import OPAQUE, TOGETHER, fix_for
from .graph_breaks import Break

_PLAIN = ("aten", "prims", "prim", "lmhead_pass")


@dataclass
class Captured:
    """A graph, as far as it matters whether head and loss are in the same one."""

    before: list[Break]
    """What Dynamo could not trace since the graph before."""
    end: Break | None
    """What ended the graph; None: the end of a function."""
    rewrites: bool = False
    refuses: bool = False
    without_head: list[tuple[int, Place | None]] = field(default_factory=list)
    """Losses whose logits are an input: how many classes, and where."""
    leaving: list[tuple[int, Place | None]] = field(default_factory=list)
    """Logits that leave the graph and that no loss in it takes: how many words, and where."""
    opaque_heads: list[str] = field(default_factory=list)
    """A sentence for each call that hides where the logits of a loss come from."""
    opaque_readers: list[str] = field(default_factory=list)
    """A sentence for each call that reads a head and hides what it makes of it."""

    def look(self, graph: Graph, rewrites: bool, refused: list[Refusal]) -> None:
        """Note whether something in ``graph``, or in a part of it, is rewritten, and what is not."""
        self.rewrites |= rewrites
        self.refuses |= bool(refused)
        for refusal in refused:
            if (call := _opaque_source(refusal.loss)) is not None:
                self.opaque_heads.append(_opaque_sentence(call))
            elif has_no_head(refusal):
                classes = hint(class_count(refusal.loss))
                self.without_head.append((classes, place_of(refusal.loss)))
        for flow in unread_heads(graph):
            node = flow.head.node
            if flow.returned and is_whole(graph):
                words = hint(tensor_of(node).size(flow.head.vocab_dim))
                self.leaving.append((words, place_of(node)))
            opaque = filter(_is_opaque, flow.unsupported)
            self.opaque_readers += map(_opaque_sentence, opaque)


def advise(graphs: Sequence[Captured], afterwards: list[Break]) -> list[str]:
    """What to do so that heads and losses in ``graphs`` come together."""
    advice: list[str] = []
    for number, graph in enumerate(graphs):
        for classes, place in graph.without_head:
            apart = _breaks_before(graphs, number, classes)
            advice += map(_fix, apart) if apart else [f"{_at(place)}the loss alone: {TOGETHER}"]
        advice += graph.opaque_heads
    if not any(graph.rewrites or graph.refuses for graph in graphs):
        advice += _no_loss(graphs, afterwards)
    return list(dict.fromkeys(advice))


def _breaks_before(graphs: Sequence[Captured], loss: int, classes: int) -> list[Break]:
    """What separates the loss in graph number ``loss`` from its head."""
    heads = [
        number
        for number, graph in enumerate(graphs[:loss])
        if any(words == classes for words, _ in graph.leaving)
    ]
    # Where Dynamo left a whole function to Python, no graph ends; the last word is on that.
    without_graph = [item for graph in graphs[: loss + 1] for item in graph.before][-1:]
    if not heads:
        # The head is in no graph: most likely in what was called just before.
        return _in_order(graphs[:loss])[-1:] or without_graph
    between = _in_order(graphs[heads[-1] : loss])
    if graphs[heads[-1]].end is None:
        # The head's function was compiled apart from that of the loss, as a break in a function
        # makes Dynamo do with those that call it.
        between = _in_order(graphs[: heads[-1]]) + between
    return between or without_graph


def _in_order(graphs: Sequence[Captured]) -> list[Break]:
    return [graph.end for graph in graphs if graph.end is not None]


def _no_loss(graphs: Sequence[Captured], afterwards: list[Break]) -> list[str]:
    """What to do where no loss over logits was captured at all."""
    leaving = [number for number, graph in enumerate(graphs) if graph.leaving]
    if not leaving:
        return [sentence for graph in graphs for sentence in graph.opaque_readers][-1:]
    rest = graphs[leaving[-1] :]
    later = _in_order(rest) or [item for graph in rest[1:] for item in graph.before] + afterwards
    if later:
        return list(map(_fix, later))
    words, place = graphs[leaving[-1]].leaving[-1]
    return [
        f"{_at(place)}logits of {words} words are returned, and their loss taken outside of "
        f"what is compiled: {TOGETHER}"
    ]


def _fix(item: Break) -> str:
    return f"{item.place or item.text.splitlines()[0]}: {fix_for(item.text)}"


def _at(place: Place | None) -> str:
    return f"{place}: " if place else ""


def _opaque_source(loss: Node) -> Node | None:
    """The call that hides where the logits of ``loss`` come from."""
    node = loss if is_loss(loss) else None
    while node is not None and not _is_opaque(node):
        if is_head(node):
            return None
        source = node.args[0] if node.args else node.kwargs.get("input")
        node = source if isinstance(source, Node) else None
    return node


def _is_opaque(node: Node) -> bool:
    """Whether ``node`` calls an autograd.Function or a custom op."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace not in _PLAIN
    return target is torch.ops.higher_order.autograd_function_apply


def _opaque_sentence(node: Node) -> str:
    is_function = not isinstance(node.target, torch._ops.OpOverload)
    name = "an autograd.Function" if is_function else f"the custom op {describe(node)}"
    return f"{_at(place_of(node))}{name}: {OPAQUE}"
