"""Memory-lean cross entropy for language models, through torch.compile alone.

    import lmhead_pass            # registers the pass
    model = torch.compile(model)  # as usual

Each linear layer whose output goes into a cross entropy over a large vocabulary is rewritten
into one op that never holds the ``[tokens, vocabulary]`` logits. ``TORCH_LOGS="lmhead_pass"`` and
``lmhead_pass.explain`` say what was rewritten, and why not what was not.
"""

# torch imports this package while it is itself importing when TORCH_LOGS names it, and users
# import it on every start: nothing here may import torch._inductor or torch._dynamo.
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import compat, config
from . import op as _op  # noqa: F401  torch.ops.lmhead_pass, for compiled code from a cache too
from . import returned as _returned  # noqa: F401
from .registration import disabled, register, unregister, why_not_run

if TYPE_CHECKING:
    from .explanation import Explanation

__all__ = ["__version__", "config", "disabled", "explain", "register", "unregister"]

__version__ = "0.2.0"


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> "Explanation":
    """Run ``fn(*args, **kwargs)`` once and tell what the pass makes of each loss over logits.

    ``fn`` is a module or function, compiled or not. Its graphs are captured by Dynamo as
    ``torch.compile`` would and run as they are, without Inductor and its caches; whatever ``fn``
    does (update buffers, step an optimizer) is done once. Random numbers are drawn from a copy of
    the generators' state. Settings are those of ``lmhead_pass.config``.
    """
    from .explanation import explain

    return explain(fn, args, kwargs, why_not_run(fn))


compat.warn_of_unknown_version()
register()
