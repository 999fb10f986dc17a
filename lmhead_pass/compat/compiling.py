"""The compilation that is under way, and what Dynamo and torch's logging tell of it."""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import AbstractContextManager
from typing import Any, NoReturn, TypeVar

from torch import Tensor
from torch.fx import Graph
from torch.utils.checkpoint import checkpoint

from .graphs import is_transformed
from .lazy_tensors import keeps_graph
from .lookup import NO_LAZY_LOGITS, find, missing, report_missing

_CompileContext = find("torch._guards.CompileContext.try_get", NO_LAZY_LOGITS)
_TracingContext = find("torch._guards.TracingContext.try_get", NO_LAZY_LOGITS)

_TRANSLATOR = "torch._dynamo.symbolic_convert.InstructionTranslator.current_tx"
_SKIP = "torch._dynamo.exc.SkipFrame"
_NOT_LEFT = "a compiled function that is given returned logits computes them"
_EACH_REGION_APART = "a loss in a checkpointed region is not joined with the others"
_HELD_TWICE = "a gradient that is multiplied by that of its loss is held twice for a moment"
_HOOKED = "a loss of returned logits that a checkpointed region takes first is seen by its hooks"
# Where what torch.compile returns has what it was given: a module, a function.
_UNCOMPILED = ("_orig_mod", "_torchdynamo_orig_callable")

_NEVER_FORGOTTEN: dict[Any, Any] = {}

Function = TypeVar("Function", bound=Callable[..., Any])
Counters = dict[str, Counter[str]]


def is_compiling() -> bool:
    """Whether this thread runs torch.compile."""
    return _CompileContext is not None and _CompileContext() is not None


def is_saved_for_once(upstream: Tensor) -> bool:
    """Whether what autograd saved for the backward of ``upstream`` is read in it for the last time.

    With several gradients at once (``is_grads_batched``) it is read once for each.
    """
    if keeps_graph is None or is_compiling():
        return False
    return not (keeps_graph() or is_transformed(upstream) or is_batched(upstream))


def is_batched(gradient: Tensor) -> bool:
    """Whether ``gradient`` stands for several (``is_grads_batched``)."""
    found = find("torch._C._functorch.is_legacy_batchedtensor", _HELD_TWICE)
    return found is None or bool(found(gradient))


def are_saved_tensors_hooked() -> bool:
    """Whether hooks see what autograd saves (``torch.autograd.graph.saved_tensors_hooks``)."""
    hooks = find("torch._C._autograd._top_saved_tensors_default_hooks", _HELD_TWICE)
    return hooks is None or hooks(False) is not None


@contextlib.contextmanager
def without_saved_tensors_hooks() -> Iterator[None]:
    """A block in which no hooks see what autograd saves, and ``torch.func`` computes gradients."""
    top, push, pop = (
        find(f"torch._C._autograd._{name}_saved_tensors_default_hooks", _HOOKED)
        for name in ("top", "push", "pop")
    )
    hooks: list[Any] = []
    while top and push and pop and (found := top(True)) is not None:
        hooks.append(found)
        pop()
    try:
        yield
    finally:
        for pair in reversed(hooks):
            push(*pair)


def is_inside_of_checkpoint() -> bool:
    """Whether a checkpoint that runs its region again in the backward is around this."""
    top = find("torch._C._autograd._top_saved_tensors_default_hooks", _HELD_TWICE)
    hooks = None if top is None else top(False)
    return hooks is not None and hooks[0].__module__ == checkpoint.__module__


def attempt() -> tuple[object, int] | None:
    """The compilation under way, and how often Dynamo has started it over; None outside of one."""
    context = None if _CompileContext is None else _CompileContext()
    if context is None:
        return None
    if not hasattr(context, "attempt"):
        report_missing(
            "torch._guards.CompileContext.attempt",
            "where Dynamo starts a compilation over, the log and the counters tell of it twice",
        )
        return None
    return context, context.attempt


def compile_id(compilation: object) -> str:
    """What Dynamo calls a compilation, as in "[0/0]" before the lines of its log."""
    return str(getattr(compilation, "compile_id", "unknown"))


def never_compiled(function: Function) -> Function:
    """Have Dynamo pass over ``function``, and all that it calls, where that runs by itself."""
    # Not torch.compiler.disable: that imports Dynamo, and ``import lmhead_pass`` does not.
    disable = find("torch._disable_dynamo", _NOT_LEFT)
    undisturbed: Function = function if disable is None else disable(function)
    return undisturbed


def graph_of_function() -> Graph | None:
    """The graph that Dynamo made last of the function that it compiles; None outside of it."""
    current = find(_TRANSLATOR, _EACH_REGION_APART)
    if current is None:
        return None
    try:
        translator = current()
    except AttributeError:  # Nothing is compiled, or Dynamo has no part in it (AOTInductor).
        return None
    if translator is None:  # what torch 2.11 says instead
        return None
    graph: Graph = translator.output.graph
    return graph


def may_be_left_to_eager() -> bool:
    """Whether ``leave_to_eager`` may be called: not where ``fullgraph`` was asked for."""
    current = find(_TRANSLATOR, _NOT_LEFT)
    if current is None or find(_SKIP, _NOT_LEFT) is None:
        return False
    translator = current()
    return not (translator.one_graph or translator.error_on_graph_break)


def names_in_function() -> tuple[str, ...]:
    """The globals and attributes that the function names which Dynamo compiles."""
    current = find(_TRANSLATOR, _NOT_LEFT)
    code = getattr(current() if current else None, "f_code", None)
    if code is None:
        report_missing(f"{_TRANSLATOR}.f_code", _NOT_LEFT)
        return ()
    names: tuple[str, ...] = code.co_names
    return names


def leave_to_eager(why: str) -> NoReturn:
    """Have Dynamo run the function that it compiles as it is, from now on, or raise an error."""
    raise (find(_SKIP, _NOT_LEFT) or RuntimeError)(why)


def forgotten_by_reset() -> MutableMapping[Any, Any]:
    """A dictionary that ``torch._dynamo.reset`` (``torch.compiler.reset``) empties."""
    without = "what is taken of returned logits is traced once, also after torch.compiler.reset()"
    failures: MutableMapping[Any, Any] | None = find("torch._dynamo.utils.guard_failures", without)
    return _NEVER_FORGOTTEN if failures is None else failures


def is_part_of_ddp() -> bool:
    """Whether DDPOptimizer compiles a part into which it has cut Dynamo's graph."""
    context = None if _TracingContext is None else _TracingContext()
    return bool(getattr(context, "fakify_first_call", False))


def why_not_lazy() -> str | None:
    """Name what torch lacks for logits to be computed later; None if it lacks nothing."""
    context = None if _TracingContext is None else _TracingContext()
    if context is not None and not hasattr(context, "fakify_first_call"):
        report_missing("torch._guards.TracingContext.fakify_first_call", NO_LAZY_LOGITS)
    return missing(NO_LAZY_LOGITS)


def counters() -> Counters:
    """``torch._dynamo.utils.counters``: for each topic, how often which event was met."""
    without = "nothing is counted, and explain does not tell what Dynamo could not trace"
    found = find("torch._dynamo.utils.counters", without)
    return defaultdict(Counter) if found is None else found


@contextlib.contextmanager
def counted_apart(topics: Iterable[str]) -> Iterator[Counters]:
    """Let Dynamo count ``topics`` from nothing inside of the block, and put the counts back."""
    counted = counters()
    before = {topic: counted[topic] for topic in topics}
    counted.update({topic: Counter() for topic in topics})
    try:
        yield counted
    finally:
        counted.update(before)


def keep_artifact(name: str, text: str) -> None:
    """Keep ``text`` for tlparse."""
    keep = find("torch._logging.trace_structured", "tlparse shows no graphs of lmhead_pass")
    if keep is not None:
        metadata = {"name": name, "encoding": "string"}
        keep("artifact", metadata_fn=lambda: metadata, payload_fn=lambda: text)


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """What ``torch.compile`` was given, if it gave ``function``; otherwise ``function``."""
    for name in _UNCOMPILED:
        function = getattr(function, name, function)
    code = getattr(function, "__code__", None)
    without = "explain takes a compiled function or module as it is"
    module = find("torch._dynamo.eval_frame.OptimizedModule", without)
    is_module = module is not None and isinstance(function, module)
    if is_module or (code is not None and code.co_filename.endswith("_dynamo/eval_frame.py")):
        report_missing("_orig_mod or _torchdynamo_orig_callable", without)
    return function


def inductor_settings(function: Callable[..., Any]) -> dict[str, Any] | None:
    """Inductor's settings for what ``function`` compiles, options of ``torch.compile`` among them.

    None if its backend has no such settings; empty if ``torch.compile`` did not give it.
    """
    for compiled in (function, getattr(function, "_compiled_call_impl", None)):
        if (ask := getattr(compiled, "get_compiler_config", None)) is not None:
            found: dict[str, Any] | None = ask()
            return found
    return {}


def without_recompile_limit() -> AbstractContextManager[Any]:
    """Let Dynamo compile one function as often as it likes inside of the block."""
    config: Any = find("torch._dynamo.config", "explain may miss graphs")
    if not hasattr(config, "recompile_limit"):
        report_missing(
            "torch._dynamo.config.recompile_limit",
            "explain misses the graphs of a function that is compiled more than a few times",
        )
        return contextlib.nullcontext()
    return config.patch(recompile_limit=1 << 16)  # type: ignore[no-any-return]
