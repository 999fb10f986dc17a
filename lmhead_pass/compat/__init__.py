"""Differences between versions of torch (2.11 to 2.15), and private APIs of torch: only here.

``lookup`` finds a private name, or logs what is off without it. ``versions`` tells versions apart,
``settings`` deals with torch's config modules and Inductor's pass setting, ``graphs`` with what
Dynamo writes on a graph, ``compiling`` with the compilation under way, ``lazy_tensors`` with tensor
subclasses, ``kernels`` with what the op asks of the dispatcher and of autograd, ``aten_trace`` with
tracing, and ``library`` with how ops are registered.

Each private name has a canary in tests/compat. Nothing here imports torch._inductor,
torch._dynamo or SymPy before it is called.
"""

from .settings import PassChain, pass_setting, passes_in
from .versions import DDP_PARTS_RETURN_SUBCLASSES, TRANSPOSING_ATTRIBUTES, warn_of_unknown_version

__all__ = [
    "DDP_PARTS_RETURN_SUBCLASSES",
    "TRANSPOSING_ATTRIBUTES",
    "PassChain",
    "pass_setting",
    "passes_in",
    "warn_of_unknown_version",
]
