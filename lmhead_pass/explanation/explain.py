"""``lmhead_pass.explain``: what the pass would do to a function, without compiling it."""

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule

from ..rewrite import GraphEdit, prepare, summary
from .advice import Captured, advise
from .graph_breaks import break_after, counted_apart, told


@dataclass
class Explanation:
    """What became of every loss over logits; ``print`` it."""

    rewritten: list[str] = field(default_factory=list)
    """A sentence for each head and loss that are rewritten: where, shapes, what is saved."""
    refused: list[str] = field(default_factory=list)
    """A sentence for each loss that is left alone: where, and why."""
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
        lines += (f"  {sentence}" for sentence in (*self.rewritten, *self.refused))
        if not self.rewritten and not self.refused:
            lines.append("  no loss over logits reached a graph")
        lines += (f"  graph break: {sentence}" for sentence in self.graph_breaks)
        lines += (f"fix: {sentence}" for sentence in self.advice)
        return "\n".join(lines)


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Run ``fn(*args, **kwargs)`` once and tell what the pass makes of each loss over logits.

    ``fn`` is a module or function, compiled or not. Its graphs are captured by Dynamo as
    ``torch.compile`` would and run as they are, without Inductor and its caches; whatever ``fn``
    does (update buffers, step an optimizer) is done once. Random numbers are drawn from a copy of
    the generators' state. Settings are those of ``lmhead_pass.config``, whether or not the pass is
    registered.
    """
    explanation = Explanation()
    graphs: list[Captured] = []

    def backend(module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(_look_at(module, explanation))
        return module.forward

    fn = getattr(fn, "_orig_mod", fn)
    fn = getattr(fn, "_torchdynamo_orig_callable", fn)
    devices = range(torch.cuda.device_count())
    # Compiled code is kept with the code object of a function: a new one leaves none behind.
    code = _call.__code__.replace(co_name="explained")
    call = types.FunctionType(code, _call.__globals__)
    with (
        torch.random.fork_rng(devices),
        torch._dynamo.config.patch(recompile_limit=1 << 16),
        counted_apart(),
    ):
        torch.compile(call, backend=backend)(fn, args, kwargs)
        explanation.advice = advise(graphs, told())
    return explanation


def _call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return fn(*args, **kwargs)


def _look_at(module: GraphModule, explanation: Explanation) -> Captured:
    explanation.graphs += 1
    before = told()
    captured = Captured(before, break_after(module, before))
    for part in module.modules():
        if isinstance(part, GraphModule):
            edit = GraphEdit(part.graph)
            calls, refusals = prepare(edit)
            captured.look(part.graph, bool(calls), refusals)
            explanation.rewritten += map(summary, calls)
            explanation.refused += map(summary, refusals)
            edit.roll_back()
    if captured.end is not None:
        explanation.graph_breaks.append(str(captured.end))
    return captured
