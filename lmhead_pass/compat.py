"""Differences between the supported versions of torch (2.11 to 2.15): all of them, only here."""

import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch.fx import Graph

GraphPass = Callable[[Graph], None]

_OLDEST, _NEWEST = "2.11", "2.15"

# What ``x.T`` and ``x.mT`` are in a graph: a getattr or, in torch 2.15, one of these.
TRANSPOSING_ATTRIBUTES = (torch.ops.aten.numpy_T, torch.ops.aten.mT)


def warn_of_unknown_version() -> None:
    """Warn if torch is newer than what this package was tested with. It is used all the same."""
    if _release(torch.__version__) > _release(_NEWEST):
        warnings.warn(
            f"lmhead_pass was tested with torch {_OLDEST} to {_NEWEST}; this is "
            f"{torch.__version__}. What it does not recognise in a graph it leaves as it was. "
            "A newer lmhead_pass may know this torch.",
            stacklevel=3,  # where lmhead_pass is imported
        )


def _release(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:2]]


# A part that DDPOptimizer cuts off is run once on fake tensors, and then gives what is inside of a
# subclass instead. Torch 2.15 fails on that (2.14 was not tried).
DDP_PARTS_RETURN_SUBCLASSES = _release(torch.__version__) < _release("2.14")


class PassChain:
    """Several passes as one callable, for torch 2.11, whose pass setting takes a single one."""

    def __init__(self, passes: Sequence[GraphPass]):
        self.passes = list(passes)

    def __call__(self, graph: Graph) -> None:
        for graph_pass in self.passes:
            graph_pass(graph)


def passes_in(setting: Any) -> list[GraphPass]:
    """The passes that a value of ``torch._inductor.config.pre_grad_custom_pass`` stands for."""
    if setting is None:
        return []
    if isinstance(setting, PassChain):
        return list(setting.passes)
    return list(setting) if isinstance(setting, list | tuple) else [setting]


def pass_setting(passes: Sequence[GraphPass]) -> Any:
    """The value of ``torch._inductor.config.pre_grad_custom_pass`` that stands for ``passes``."""
    from torch._inductor import custom_graph_pass

    if not passes:
        return None
    if hasattr(custom_graph_pass, "get_custom_graph_passes"):  # from torch 2.12 on
        return list(passes)
    return passes[0] if len(passes) == 1 else PassChain(passes)


def set_default(config: Any, name: str, value: Any) -> None:
    """Let setting ``name`` of a torch config module be ``value`` in threads that never set it.

    From torch 2.13 on, what is assigned to a setting is seen by the assigning thread only.
    """
    entry = config._config[name]
    if isinstance(entry.user_override, ContextVar):
        entry.default = value
