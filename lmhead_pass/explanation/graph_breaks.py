"""Graph breaks, as Dynamo tells of them while it captures."""

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch._dynamo.utils import counters
from torch.fx import GraphModule

from ..graph import Place, place_in

# Where Dynamo counts its explanations: of breaks, and of what else it could not trace.
_COUNTED = ("graph_break", "unimplemented")


@dataclass(frozen=True)
class Break:
    """What Dynamo could not trace."""

    text: str
    """Dynamo's explanation, with its hints."""
    place: Place | None = None
    """None if no graph ended here: there was nothing in it yet, or all was left to Python."""

    def __str__(self) -> str:
        # The text goes on with advice for Dynamo's own developers, after an empty line.
        text = " ".join(line.strip() for line in self.text.split("\n\n")[0].splitlines())
        return f"{self.place}: {text}" if self.place else text


def break_after(module: GraphModule, earlier: list[Break]) -> Break | None:
    """The break that ended a graph; ``earlier`` is what ``told`` gave of the time before."""
    reason = getattr(module, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    text = reason.reason
    if "Explanation:" not in text and earlier:
        # "step_unsupported", say. What was met in a function that was to be inlined, or at a jump,
        # has been counted only.
        text = earlier[-1].text
    return Break(text, place_in("".join(traceback.format_list(reason.user_stack))))


@contextlib.contextmanager
def counted_apart() -> Iterator[None]:
    """Let Dynamo count its explanations anew, for ``told``, and keep its counts as they were."""
    before = {name: counters[name] for name in _COUNTED}
    for name in _COUNTED:
        counters[name] = Counter()
    try:
        yield
    finally:
        counters.update(before)


def told() -> list[Break]:
    """What Dynamo could not trace since this was last called; what it left for later comes last."""
    texts = [text for name in _COUNTED for text in counters[name]]
    for name in _COUNTED:
        counters[name].clear()
    return [Break(text) for text in texts]
