"""Puts the pass into Inductor's list of pre-grad passes, beside other people's.

``torch._inductor.config`` takes most of a second to import; ``import lmhead_pass`` does not. Where
nobody has imported it, the pass is added as soon as somebody (``torch.compile``) does.
"""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from .compat import settings
from .compat.compiling import inductor_settings
from .graph_pass import the_pass

_INDUCTOR_CONFIG = "torch._inductor.config"


def register() -> None:
    """Rewrite what is compiled from now on. Registering twice registers once."""
    if _INDUCTOR_CONFIG in sys.modules:
        _update(add=True)
    elif _registers_later not in sys.meta_path:
        sys.meta_path.insert(0, _registers_later)


def unregister() -> None:
    """Leave alone what is compiled from now on. Other passes stay registered."""
    if _registers_later in sys.meta_path:
        sys.meta_path.remove(_registers_later)
    if _INDUCTOR_CONFIG in sys.modules:
        _update(add=False)


def why_not_run(function: Callable[..., Any]) -> str:
    """What keeps the pass from the graphs of ``function``, compiled or not; "" if nothing does."""
    is_registered = the_pass() in settings.registered_passes(
        importlib.import_module(_INDUCTOR_CONFIG)
    )
    compiled_with = inductor_settings(function)
    if compiled_with is None:
        return (
            "the function is compiled with a backend other than Inductor, and the pass runs in "
            "Inductor alone. Compile it without `backend=`"
        )
    if the_pass() in settings.passes_of(compiled_with) or (is_registered and not compiled_with):
        return ""
    if is_registered:
        return (
            'options={"pre_grad_custom_pass": ...} of torch.compile replaces the registered passes '
            "for this function, this one too. Set torch._inductor.config.pre_grad_custom_pass "
            "before importing lmhead_pass instead, or call lmhead_pass.register() after it"
        )
    return (
        "the pass is not registered, by lmhead_pass.unregister(), inside of "
        "lmhead_pass.disabled(), or since something was assigned to "
        "torch._inductor.config.pre_grad_custom_pass. lmhead_pass.register() adds it again"
    )


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Leave alone what this thread compiles inside the ``with`` block.

    A function is compiled when it is first called, not when ``torch.compile`` wraps it.
    """
    config = importlib.import_module(_INDUCTOR_CONFIG)
    with settings.passes_patched(config, _others_in(config)):
        yield


def _others_in(config: ModuleType) -> list[settings.GraphPass]:
    return [item for item in settings.registered_passes(config) if item is not the_pass()]


def _update(add: bool) -> None:
    config = sys.modules[_INDUCTOR_CONFIG]
    ours = [the_pass()] if add else []
    settings.register_passes(config, [*_others_in(config), *ours], by_default=ours)


class _RegistersLater(MetaPathFinder):
    """Registers the pass once ``torch._inductor.config`` has been imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _INDUCTOR_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _update(add=True)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


_registers_later = _RegistersLater()
