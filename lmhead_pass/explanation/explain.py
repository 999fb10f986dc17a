"""``lmhead_pass.explain``: what the pass would do to a function, without compiling it.

And what keeps heads and losses apart. A graph break matters only between a head and its loss;
there may well be others.
"""

import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..compat.compiling import counted_apart, uncompiled, without_recompile_limit
from ..compat.graphs import why_not_rewritten
from ..compat.lookup import NO_REWRITE
from ..graph import Place, Refusal, describe, hint, place_of, tensor_of, value_of
from ..logits import class_count
from ..plan import has_no_head, is_whole, unread_heads, way_up
from ..rewrite import (
    GraphEdit,
    MemoryBudgetTooSmall,
    losses_of_inputs,
    prepare,
    regions_of,
    summary,
)
from .fused_elsewhere import at, fused_elsewhere, is_opaque, name_of
from .graph_breaks import TOPICS, Break, break_after, take_untraced

_TOGETHER = (
    "compile one function that computes head and loss, `def step(*batch): return "
    "loss_fn(model(...), ...)` and `torch.compile(step)`, or take the loss in the model's forward"
)
_OPAQUE = (
    "what it computes cannot be seen, so that there is no head and loss to rewrite: write the head "
    "as a linear layer or matrix product, and the loss as F.cross_entropy"
)


@dataclass
class Explanation:
    """What became of every loss over logits; ``print`` it."""

    rewritten: list[str] = field(default_factory=list)
    """A sentence for each head and loss that are rewritten: where, shapes, what is saved."""
    refused: list[str] = field(default_factory=list)
    """A sentence for each loss that is left alone: where, and why."""
    deferred: list[str] = field(default_factory=list)
    """A sentence for each head whose logits are returned, for losses that are taken outside."""
    fused_elsewhere: list[str] = field(default_factory=list)
    """A sentence for each head whose loss a library's own call computes without logits."""
    graph_breaks: list[str] = field(default_factory=list)
    """A sentence for each place where Dynamo ended a graph: where, and why."""
    graphs: int = 0
    """How many graphs Dynamo made."""
    advice: list[str] = field(default_factory=list)
    """A sentence for each thing that keeps a head and its loss apart: where, and what to do."""

    def __str__(self) -> str:
        lines = [
            f"lmhead_pass: {len(self.rewritten)} rewritten, {len(self.refused)} left alone, "
            f"in {self.graphs} graph{'s' * (self.graphs != 1)}"
        ]
        told = (*self.rewritten, *self.refused, *self.deferred, *self.fused_elsewhere)
        lines += (f"  {sentence}" for sentence in told)
        if not told:
            lines.append("  no loss over logits reached a graph")
        lines += (f"  graph break: {sentence}" for sentence in self.graph_breaks)
        lines += (f"fix: {sentence}" for sentence in self.advice)
        return "\n".join(lines)


def explain(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], not_run: str = ""
) -> Explanation:
    """See :func:`lmhead_pass.explain`. ``not_run`` says what keeps the pass from running, if
    anything does: then nothing is rewritten.
    """
    explanation = Explanation()
    graphs: list[_Captured] = []

    def backend(module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        before = take_untraced(counters)
        deferred = {words for graph in graphs for words in graph.deferred}
        captured = _Captured(before, break_after(module, before))
        graphs.append(captured)
        captured.look_at(module, explanation, not_run, deferred)
        forward: Callable[..., Any] = module.forward
        return forward

    # Compiled code is kept with the code object of a function: a new one leaves none behind.
    code = _call.__code__.replace(co_name="explained")
    call = types.FunctionType(code, _call.__globals__)
    with (
        torch.random.fork_rng(range(torch.cuda.device_count())),
        without_recompile_limit(),
        counted_apart(TOPICS) as counters,
    ):
        torch.compile(call, backend=backend)(uncompiled(fn), args, kwargs)
        explanation.advice = _advise(graphs, take_untraced(counters))
    explanation.graphs = len(graphs)
    explanation.graph_breaks = list(map(str, _breaks_in(graphs)))
    return explanation


def _call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return fn(*args, **kwargs)


@dataclass
class _Captured:
    """A graph, as far as it matters whether a head and its loss are in the same one."""

    before: list[Break]
    """What Dynamo could not trace since the graph before."""
    end: Break | None
    """What ended the graph; None: the end of a function."""
    has_losses: bool = False
    """Whether a loss over logits is in it, rewritten or left alone."""
    without_head: list[tuple[int, Place | None]] = field(default_factory=list)
    """Losses whose logits are an input: how many classes, and where."""
    leaving: list[tuple[int, Place | None]] = field(default_factory=list)
    """Logits that leave the graph and that no loss in it takes: how many words, and where."""
    deferred: list[int] = field(default_factory=list)
    """How many words there are in logits that leave the graph to be computed if they are read."""
    opaque_heads: list[str] = field(default_factory=list)
    """A sentence for each call that hides where the logits of a loss come from."""
    opaque_readers: list[str] = field(default_factory=list)
    """A sentence for each call that reads a head and hides what it makes of it."""

    def look_at(
        self, module: GraphModule, explanation: Explanation, not_run: str, words: set[int]
    ) -> None:
        """Note what is in the graph of ``module`` and in its parts, and explain it.

        Earlier graphs have deferred logits of so many ``words``.
        """
        if lacking := why_not_rewritten(module.graph):
            explanation.refused.append(f"this torch has no {lacking}: {NO_REWRITE}")
            return
        parts = [part for part in module.modules() if isinstance(part, GraphModule)]
        regions = {body for part in parts for _, body in regions_of(part.graph)}
        for part in parts:
            explanation.fused_elsewhere += fused_elsewhere(part.graph)
            if part in regions:  # it was looked at with the graph that calls it
                self._look(part.graph, (), set())
            else:
                outside = _losses_outside(part.graph, words)
                edit = GraphEdit(part.graph)
                try:
                    calls, refusals = prepare(edit)
                except MemoryBudgetTooSmall as error:
                    explanation.refused.append(str(error))
                    edit.roll_back()
                    continue
                refusals = [refusal for refusal in refusals if refusal.loss not in outside]
                self.has_losses |= bool(calls or refusals or outside)
                if not_run:
                    refusals += [Refusal(call.node, not_run) for call in calls]
                else:
                    explanation.rewritten += map(summary, calls)
                    explanation.rewritten += map(_outside_sentence, outside)
                    explanation.deferred += map(summary, edit.deferred)
                explanation.refused += map(summary, refusals)
                heads = () if not_run else [logits.head for logits in edit.deferred]
                self.deferred += (hint(head.vocab_size) for head in heads)
                self._look(part.graph, refusals, {head.node for head in heads})
                edit.roll_back()

    def _look(self, graph: Graph, refusals: Iterable[Refusal], deferred: set[Node]) -> None:
        for refusal in refusals:
            if (call := _opaque_source(refusal.loss)) is not None:
                self.opaque_heads.append(_opaque_sentence(call))
            elif has_no_head(refusal):
                classes = hint(class_count(refusal.loss))
                self.without_head.append((classes, place_of(refusal.loss)))
        for flow in unread_heads(graph):
            node = flow.head.node
            if flow.returned and is_whole(graph) and node not in deferred:
                words = hint(tensor_of(node).size(flow.head.vocab_dim))
                self.leaving.append((words, place_of(node)))
            self.opaque_readers += map(_opaque_sentence, filter(is_opaque, flow.unsupported))


def _losses_outside(graph: Graph, words: set[int]) -> list[Node]:
    """Losses of logits that an earlier graph defers: they are fused when they run."""
    logits = [
        node
        for node in graph.find_nodes(op="placeholder")
        if isinstance(value := value_of(node), torch.Tensor)
        and value.dim() > 1
        and hint(value.size(-1)) in words
    ]
    return losses_of_inputs(graph, logits) if logits else []


def _outside_sentence(loss: Node) -> str:
    return (
        f"rewritten: {describe(loss)} at {place_of(loss) or 'unknown place'}: of logits that are "
        "deferred; its function is run as it is, not compiled"
    )


def _advise(graphs: Sequence[_Captured], afterwards: list[Break]) -> list[str]:
    """Say what brings the heads and losses in ``graphs`` together."""
    advice: list[str] = []
    for number, graph in enumerate(graphs):
        for classes, place in graph.without_head:
            apart = _breaks_before(graphs, number, classes)
            advice += map(Break.advice, apart)
            if not apart:
                advice.append(f"{at(place)}the loss alone: {_TOGETHER}")
        advice += graph.opaque_heads
    if not any(graph.has_losses for graph in graphs):
        advice += _advise_without_loss(graphs, afterwards)
    return list(dict.fromkeys(advice))


def _breaks_before(graphs: Sequence[_Captured], loss: int, classes: int) -> list[Break]:
    """Find what separates the loss in graph number ``loss`` from its head."""
    heads = [
        number
        for number, graph in enumerate(graphs[:loss])
        if any(words == classes for words, _ in graph.leaving)
    ]
    # Where Dynamo left a whole function to Python, no graph ends; the last word is on that.
    without_graph = [item for graph in graphs[: loss + 1] for item in graph.before][-1:]
    if not heads:
        # The head is in no graph: most likely in what was called just before.
        return _breaks_in(graphs[:loss])[-1:] or without_graph
    between = _breaks_in(graphs[heads[-1] : loss])
    if graphs[heads[-1]].end is None:
        # The head's function was compiled apart from that of the loss, as a break in a function
        # makes Dynamo do with those that call it.
        between = _breaks_in(graphs[: heads[-1]]) + between
    return between or without_graph


def _advise_without_loss(graphs: Sequence[_Captured], afterwards: list[Break]) -> list[str]:
    leaving = [number for number, graph in enumerate(graphs) if graph.leaving]
    if not leaving:
        return [sentence for graph in graphs for sentence in graph.opaque_readers][-1:]
    rest = graphs[leaving[-1] :]
    later = _breaks_in(rest) or [item for graph in rest[1:] for item in graph.before] + afterwards
    if later:
        return list(map(Break.advice, later))
    words, place = rest[0].leaving[-1]
    return [
        f"{at(place)}logits of {words} words are returned, and their loss taken outside of "
        f"what is compiled: {_TOGETHER}"
    ]


def _breaks_in(graphs: Sequence[_Captured]) -> list[Break]:
    return [graph.end for graph in graphs if graph.end is not None]


def _opaque_source(loss: Node) -> Node | None:
    """Find the call that hides where the logits of ``loss`` come from."""
    return next(filter(is_opaque, way_up(loss)), None)


def _opaque_sentence(node: Node) -> str:
    return f"{at(place_of(node))}{name_of(node)}: {_OPAQUE}"
