"""The pass as Inductor sees it: a callable on graphs with a cache key."""

import functools
import hashlib
import importlib
from collections.abc import Callable
from pathlib import Path

from torch.fx import Graph

from . import config
from .compat.settings import cached_pass_type, caches_come_first, settings_of
from .log import cache_is_asked, pass_is_called


class GraphPass:
    """Rewrites each linear -> cross entropy over a large vocabulary in a pre-grad graph."""

    def __call__(self, graph: Graph) -> None:
        pass_is_called()
        # This object has to exist before torch._dynamo is imported; what it needs to work, after.
        rewrite = importlib.import_module("lmhead_pass.rewrite")
        rewrite.leave_lazy_inputs_to_eager(graph)
        rewrite.rewrite_graph(graph, keeps_note=caches_come_first())

    def uuid(self) -> str:
        """What the rewritten graph depends on: every file of the package and every setting."""
        cache_is_asked()
        settings = repr(sorted(settings_of(config).items()))
        return f"lmhead_pass-{_hash_of_package()}-{hashlib.sha256(settings.encode()).hexdigest()}"

    def __reduce__(self) -> tuple[Callable[[], "GraphPass"], tuple[()]]:
        # Copies and pickles (Inductor makes both) are the one pass itself.
        return the_pass, ()


def the_pass() -> GraphPass:
    """The one pass, as the ``CustomGraphPass`` that Inductor's caches ask for.

    Made on demand, since that class comes with all of Inductor. That import may itself register
    the pass, so that it has to be over before one is made.
    """
    return _pass_of(cached_pass_type())


@functools.cache
def _pass_of(base: type) -> GraphPass:
    made: GraphPass = type("LMHeadPass", (GraphPass, base), {"__module__": __name__})()
    return made


@functools.cache
def _hash_of_package() -> str:
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
