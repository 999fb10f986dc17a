"""``lmhead_pass.explain``: what the pass would do to a function, without compiling it."""

import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule

from .lifting import find_across_regions
from .match import Rewrite
from .report import summary
from .source import place_in


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

    def __str__(self) -> str:
        lines = [
            f"lmhead_pass: {len(self.rewritten)} rewritten, {len(self.refused)} left alone, "
            f"in {self.graphs} graph{'s' * (self.graphs != 1)}"
        ]
        lines += (f"  {sentence}" for sentence in (*self.rewritten, *self.refused))
        if not self.rewritten and not self.refused:
            lines.append("  no loss over logits reached a graph")
        lines += (f"  graph break: {sentence}" for sentence in self.graph_breaks)
        if self.graph_breaks and not self.rewritten:
            lines.append(
                "  a head and its loss can be rewritten only if no graph break lies between them"
            )
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

    def backend(module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        _look_at(module, explanation)
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
    ):
        torch.compile(call, backend=backend)(fn, args, kwargs)
    return explanation


def _call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return fn(*args, **kwargs)


def _look_at(module: GraphModule, explanation: Explanation) -> None:
    explanation.graphs += 1
    for part in module.modules():
        if isinstance(part, GraphModule):
            found, lifted = find_across_regions(part.graph)
            for item in found:
                if isinstance(item, Rewrite):
                    explanation.rewritten += map(summary, item.matches)
                else:
                    explanation.refused.append(summary(item))
            for copied in reversed(lifted):
                copied.undo()
    reason = getattr(module, "compile_subgraph_reason", None)
    if reason is not None and reason.graph_break:
        explanation.graph_breaks.append(_break_sentence(reason))


def _break_sentence(reason: Any) -> str:
    # Dynamo's text goes on with advice for its own developers, after an empty line.
    advice = " ".join(line.strip() for line in reason.reason.split("\n\n")[0].splitlines())
    return f"{place_in(''.join(traceback.format_list(reason.user_stack)))}: {advice}"
