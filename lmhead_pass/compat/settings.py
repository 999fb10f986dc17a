"""Torch's config modules, and the setting of Inductor's that holds the pre-grad passes."""

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from torch.fx import Graph

from .lookup import find, report_missing

GraphPass = Callable[[Graph], None]

_SETTING = "pre_grad_custom_pass"


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
    if not passes:
        return None
    # From torch 2.12 on. Not by the version number: nightlies bear that of the next release.
    module = importlib.import_module("torch._inductor.custom_graph_pass")
    if hasattr(module, "get_custom_graph_passes"):
        return list(passes)
    return passes[0] if len(passes) == 1 else PassChain(passes)


def passes_of(inductor: dict[str, Any]) -> list[GraphPass]:
    """The passes in a copy of Inductor's settings."""
    return passes_in(inductor.get(_SETTING))


def registered_passes(config: ModuleType) -> list[GraphPass]:
    """The passes in Inductor's ``config``."""
    return passes_in(getattr(config, _SETTING, None))


def passes_patched(
    config: ModuleType, passes: Sequence[GraphPass]
) -> AbstractContextManager[object]:
    """Let Inductor's ``config`` hold ``passes``, for this thread, inside of the block."""
    if not hasattr(config, _SETTING):
        return nullcontext()
    return config.patch({_SETTING: pass_setting(passes)})  # type: ignore[no-any-return]


def register_passes(
    config: ModuleType, passes: Sequence[GraphPass], by_default: Sequence[GraphPass]
) -> None:
    """Put ``passes`` into Inductor's ``config``; other threads start with those ``by_default``."""
    if not hasattr(config, _SETTING):
        report_missing(f"torch._inductor.config.{_SETTING}", "no graph is rewritten")
        return
    _set_default(config, _SETTING, pass_setting(by_default))
    setattr(config, _SETTING, pass_setting(passes))


def _set_default(config: ModuleType, name: str, value: Any) -> None:
    """Let setting ``name`` of a torch config module be ``value`` in threads that never set it.

    From torch 2.13 on, what is assigned to a setting is seen by the assigning thread only.
    """
    try:
        entry = vars(config)["_config"][name]
        if isinstance(entry.user_override, ContextVar):
            _ = entry.default
            entry.default = value
    except (AttributeError, KeyError):
        report_missing(
            "torch._inductor.config._config[...].default",
            "only graphs that the thread compiles which imports lmhead_pass are rewritten",
        )


def caches_come_first() -> bool:
    """Whether a later process may get the graph from a cache that is asked before passes run."""
    # From torch 2.13 on. Not by the version number: nightlies bear that of the next release.
    config = importlib.import_module("torch._inductor.config")
    if getattr(config, "pre_grad_pass_timing", "early") == "early":
        return False
    without = "what was rewritten is not told again where a graph comes from a cache"
    local = find(
        "torch._functorch._aot_autograd.autograd_cache.should_use_local_autograd_cache", without
    )
    remote = find(
        "torch._functorch._aot_autograd.autograd_cache.should_use_remote_autograd_cache", without
    )
    return any(used is not None and used() for used in (local, remote))


def cache_folder() -> str | None:
    """Where Inductor keeps its caches; None if torch does not tell."""
    name = "torch._inductor.runtime.cache_dir_utils.cache_dir"
    folder = find(name, "python -m lmhead_pass env does not tell where Inductor's caches are")
    return None if folder is None else str(folder())


def cached_pass_type() -> type:
    """The base class of passes whose graphs Inductor caches. It comes with all of Inductor."""
    without = "Inductor caches no graph"
    return find("torch._inductor.custom_graph_pass.CustomGraphPass", without) or object


def make_config_module(module: ModuleType) -> None:
    """Make each plain value in ``module`` a setting that ``module.patch`` takes."""
    name = "torch.utils._config_module.install_config_module"
    install = find(name, "lmhead_pass.config has no patch(), and is the same in all threads")
    if install is not None:
        install(module)


def settings_of(module: ModuleType) -> dict[str, object]:
    """All settings in a module that was made a config module, by name."""
    if (copy := getattr(module, "get_config_copy", None)) is not None:
        return dict(copy())
    return {name: getattr(module, name) for name in module.__annotations__}
