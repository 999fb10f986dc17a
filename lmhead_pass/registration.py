"""Puts the pass into Inductor's list of pre-grad passes, beside other people's.

``torch._inductor.config`` takes most of a second to import; ``import lmhead_pass`` does not. Where
nobody has imported it, the pass is added as soon as somebody (``torch.compile``) does.
"""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec

from . import compat
from .graph_pass import the_pass

_INDUCTOR_CONFIG = "torch._inductor.config"
_SETTING = "pre_grad_custom_pass"


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


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Leave alone what this thread compiles inside the ``with`` block.

    A function is compiled when it is first called, not when ``torch.compile`` wraps it.
    """
    config = importlib.import_module(_INDUCTOR_CONFIG)
    others = _passes(config, with_ours=False)
    with config.patch({_SETTING: compat.pass_setting(others)}):
        yield


def _passes(config, with_ours: bool) -> list[compat.GraphPass]:
    others = [p for p in compat.passes_in(getattr(config, _SETTING)) if p is not the_pass()]
    return [*others, the_pass()] if with_ours else others


def _update(add: bool) -> None:
    config = sys.modules[_INDUCTOR_CONFIG]
    compat.set_default(config, _SETTING, compat.pass_setting([the_pass()]) if add else None)
    setattr(config, _SETTING, compat.pass_setting(_passes(config, with_ours=add)))


class _RegistersLater(MetaPathFinder):
    """Registers the pass once ``torch._inductor.config`` has been imported."""

    def find_spec(self, fullname, path, target=None) -> ModuleSpec | None:
        if fullname != _INDUCTOR_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_register(module) -> None:
            execute(module)
            _update(add=True)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


_registers_later = _RegistersLater()
