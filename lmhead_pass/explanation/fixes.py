"""What to change about a graph break, by what Dynamo says of it."""

import re

TOGETHER = (
    "compile one function that computes head and loss, `def step(*batch): return "
    "loss_fn(model(...), ...)` and `torch.compile(step)`, or take the loss in the model's forward"
)
OPAQUE = (
    "what it computes cannot be seen, so that there is no head and loss to rewrite: write the head "
    "as a linear layer or matrix product, and the loss as F.cross_entropy"
)

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


def fix_for(text: str) -> str:
    """The change that does away with the graph break that Dynamo explains with ``text``."""
    for pattern, fix in _FIXES:
        if re.search(pattern, text):
            method = _METHOD.search(text)
            return fix.replace("METHOD", method[1]) if method else fix
    if hint := _HINT.search(text):
        return f"Dynamo's own hint: {hint[1].strip()}"
    return "move what breaks the graph before the head or behind the loss"
