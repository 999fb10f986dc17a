"""Graph breaks, as Dynamo tells of them while it captures, and what to change about them."""

import re
from dataclasses import dataclass

from torch.fx import GraphModule

from ..compat.compiling import Counters
from ..compat.graphs import end_of
from ..graph import Place, place_in

# Where Dynamo counts its explanations: of breaks, and of what else it could not trace.
TOPICS = ("graph_break", "unimplemented")

_IGNORE = "torch._dynamo.config.ignore_logging_functions = "
# The first whose pattern is found in Dynamo's text, most of which are words of its hints, its
# explanation, or the "developer debug context" that says what was called.
_FIXES = (
    (
        # From the message that Hugging Face's models log before their loss.
        r"method: <Logger .*loss_type=",
        "the model has no loss_type, and says so in a log message that Dynamo does not trace. Set "
        '`model.loss_type = "ForCausalLM"` before compiling, or, after importing transformers, '
        f"`{_IGNORE}{{logging.Logger.METHOD}}`",
    ),
    (
        r"method: <Logger ",
        f"a log message, which Dynamo does not trace. Set `{_IGNORE}{{logging.Logger.METHOD}}`",
    ),
    (
        r"module: \w*warnings, qualname: warn\b",
        f"a warning, which Dynamo does not trace. Set `{_IGNORE}{{warnings.warn}}`",
    ),
    (
        r"builtin operator `print`",
        "Dynamo does not trace print. Set "
        "`torch._dynamo.config.reorderable_logging_functions = {print}`",
    ),
    (
        r"capture_dynamic_output_shape_ops",
        "the shape of a result depends on the values of a tensor, as with a boolean mask or "
        "nonzero. Set `torch._dynamo.config.capture_dynamic_output_shape_ops = True`",
    ),
    (
        r"capture_scalar_outputs",
        "a number is taken out of a tensor. Set "
        "`torch._dynamo.config.capture_scalar_outputs = True`",
    ),
    (
        r"Data-dependent branching|generic_jump",
        "the branch depends on the values of a tensor. Take the decision outside of what is "
        "compiled, or compute it without a branch (torch.where)",
    ),
    (
        # They call it in each forward; what was disabled before is told of below.
        r"qualname: disable\b|Call to `torch\._dynamo\.disable\(\)`",
        "FSDP's hooks, which Dynamo does not trace, of a module that `fully_shard` wraps. Wrap the "
        "blocks, and leave the head to the `fully_shard` of the whole model",
    ),
    (
        r"torch\.compiler\.disable",
        "this call is kept from being compiled, and so is a head or loss in it. Take "
        "`torch.compiler.disable` away from it, or move the call before the head or behind the "
        "loss",
    ),
    (
        r"marked as skipped",
        "Dynamo does not trace this call, nor a head or loss in it. Move it before the head or "
        "behind the loss",
    ),
)
_METHOD = re.compile(r"method: <Logger .*?>\.(\w+)")
_HINT = re.compile(r"Hint: (.*)")


@dataclass(frozen=True)
class Break:
    """Something that Dynamo could not trace."""

    text: str
    """Dynamo's explanation, with its hints."""
    place: Place | None = None
    """None if no graph ended here: there was nothing in it yet, or all was left to Python."""

    def __str__(self) -> str:
        # The text goes on with advice for Dynamo's own developers, after an empty line.
        text = " ".join(line.strip() for line in self.text.split("\n\n")[0].splitlines())
        return f"{self.place}: {text}" if self.place else text

    def advice(self) -> str:
        """Say where the break is, and what does away with it."""
        return f"{self.place or self.text.splitlines()[0]}: {self._fix()}"

    def _fix(self) -> str:
        for pattern, fix in _FIXES:
            if re.search(pattern, self.text):
                method = _METHOD.search(self.text)
                return fix.replace("METHOD", method[1]) if method else fix
        if hint := _HINT.search(self.text):
            return f"Dynamo's own hint: {hint[1].strip()}"
        return "move what breaks the graph before the head or behind the loss"


def break_after(module: GraphModule, earlier: list[Break]) -> Break | None:
    """Return the break that ended the graph of ``module``; None if its function ended.

    ``earlier`` is what ``take_untraced`` gave before.
    """
    end = end_of(module)
    if end is None or not end.is_break:
        return None
    # "step_unsupported", say, explains nothing. Dynamo only counts what it met in a function that
    # it meant to inline, or at a jump.
    is_explained = "Explanation:" in end.text or not earlier
    return Break(end.text if is_explained else earlier[-1].text, place_in(end.stack_trace))


def take_untraced(counters: Counters) -> list[Break]:
    """Take out of ``counters`` what Dynamo could not trace; what it left for later comes last."""
    texts = [text for topic in TOPICS for text in counters[topic]]
    for topic in TOPICS:
        counters[topic].clear()
    return [Break(text) for text in texts]
