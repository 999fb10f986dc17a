"""What Dynamo writes on a graph, and what the nodes of a graph call."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from traceback import format_list
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from .lookup import NO_REWRITE, find, find_any, missing, report_missing

EXAMPLE_VALUE = "example_value"
"""The key in ``node.meta`` of the fake value that Dynamo saw at the node."""
UNBACKED_BINDINGS = "unbacked_bindings"
"""The key in ``node.meta`` of the sizes that depend on data and come in with the node."""
_COMPILE_ID = "dynamo_compile_id"
_REASON = "compile_subgraph_reason"
_ORIGINAL_NAMES = "dynamo_flat_name_to_original_fqn"

# The functions that switch a mode on and off.
SET_GRAD_ENABLED = find("torch._C._set_grad_enabled", NO_REWRITE)
ENTER_INFERENCE = find("torch.autograd.grad_mode._enter_inference_mode", NO_REWRITE)
EXIT_INFERENCE = find("torch.autograd.grad_mode._exit_inference_mode", NO_REWRITE)
ENTER_AUTOCAST = find("torch.amp.autocast_mode._enter_autocast", NO_REWRITE)
EXIT_AUTOCAST = find("torch.amp.autocast_mode._exit_autocast", NO_REWRITE)
# The function that starts a forward-mode derivative; the second is in graphs from torch 2.13 on.
MAKE_DUAL = find_any(("torch._make_dual", "torch._functorch.predispatch._make_dual"), NO_REWRITE)

is_transformed = find("torch._C._functorch.is_functorch_wrapped_tensor", NO_REWRITE)
"""Whether a tensor is inside of a torch.func transform (grad, vmap, ...)."""
untransformed = find("torch._C._functorch.get_unwrapped", NO_REWRITE)
"""The tensor that a torch.func transform wraps."""
is_wrapper = find("torch.utils._python_dispatch.is_traceable_wrapper_subclass", NO_REWRITE)
"""Whether a tensor is of a subclass that wraps other tensors, as DTensor does."""
is_view = find("torch.Tensor._is_view", NO_REWRITE)
"""Whether autograd knows a tensor as a view of another."""
tree_leaves = find("torch.utils._pytree.tree_leaves", NO_REWRITE)
"""Everything in nested containers."""

_FakeTensor = find("torch._subclasses.fake_tensor.FakeTensor", NO_REWRITE)
_OpOverload = find("torch._ops.OpOverload", NO_REWRITE)
_OpOverloadPacket = find("torch._ops.OpOverloadPacket", NO_REWRITE)
find("torch.ops.aten.add.Tensor._schema.is_mutable", NO_REWRITE)
find("torch.UntypedStorage._cdata", NO_REWRITE)


def why_not_rewritten(graph: Graph) -> str | None:
    """Name what torch lacks for ``graph`` to be understood; None if it can be."""
    # A graph may consist of nothing but modes that are entered and left. An input has a value.
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    has_values = any(EXAMPLE_VALUE in node.meta for node in graph.nodes)
    if inputs and not has_values and _is_dynamos(graph.owning_module):
        report_missing(f"Node.meta[{EXAMPLE_VALUE!r}]", NO_REWRITE)
    return missing(NO_REWRITE)


def is_whole(graph: Graph) -> bool:
    """Whether ``graph`` is what a compiled function runs, and not a part that it calls."""
    module = graph.owning_module
    if _COMPILE_ID in module.meta:
        return True
    if _is_dynamos(module):
        report_missing(
            f"GraphModule.meta[{_COMPILE_ID!r}]",
            "every graph counts as a part of one: a loss is left alone if its logits are returned, "
            "and nothing tells of losses whose logits come from another graph",
        )
    return False


def _is_dynamos(module: GraphModule | None) -> bool:
    """Whether Dynamo made ``module`` for a compiled function, by any sign of it."""
    signs = {_COMPILE_ID, _ORIGINAL_NAMES}
    return hasattr(module, _REASON) or not signs.isdisjoint(getattr(module, "meta", ()))


@dataclass(frozen=True)
class GraphEnd:
    """Why Dynamo ended a graph."""

    is_break: bool
    """False if the function ended."""
    text: str
    stack_trace: str


def end_of(module: GraphModule) -> GraphEnd | None:
    """Why Dynamo ended the graph of ``module``; None if Dynamo does not tell."""
    if not hasattr(module, _REASON) and not _is_dynamos(module):
        return None
    try:
        reason = getattr(module, _REASON)
        stack_trace = "".join(format_list(reason.user_stack))
        return GraphEnd(bool(reason.graph_break), str(reason.reason), stack_trace)
    except AttributeError:
        report_missing(
            f"GraphModule.{_REASON}",
            "explain names no graph breaks, and with config.returned_logits 'detach' every graph "
            "counts as one that a break ends",
        )
        return None


def size_hint(size: torch.SymInt | torch.SymFloat) -> Any:
    """The value of a dynamic number while the graph is compiled; None if nothing is known of it."""
    try:
        return size.node.hint
    except AttributeError:
        report_missing("SymInt.node.hint", "heads with a dynamic vocabulary are left alone")
        return None


def are_all_numbers_dynamic() -> bool:
    """Whether Dynamo takes each number for one that may change (``torch.compile(dynamic=True)``).

    Else only those are dynamic that have changed from one call to another.
    """
    name = "torch._dynamo.config.assume_static_by_default"
    try:
        return not torch._dynamo.config.assume_static_by_default
    except AttributeError:
        report_missing(
            name, "losses with a dynamic number, such as an ignore_index, are left alone"
        )
        return False


def is_known_true(condition: Any) -> bool:
    """Whether ``condition`` holds, whatever the dynamic sizes in it turn out to be."""
    name = "torch.fx.experimental.symbolic_shapes.statically_known_true"
    known = find(name, "dynamic sizes count as different, unless they are the same object")
    return bool(known(condition)) if known is not None else condition is True


def memory_of(tensor: Tensor) -> int:
    """A number that all tensors in the same memory share, fake ones too."""
    address: int = tensor.untyped_storage()._cdata
    return address


def fake_mode_of(values: Iterable[Any]) -> AbstractContextManager[Any]:
    """The mode in which what is computed with the fake tensors in ``values`` is fake, too."""
    modes = (value.fake_mode for value in tree_leaves(values) if isinstance(value, _FakeTensor))
    return next(modes, nullcontext())


def new_symbols_are_dropped(graph: Graph) -> AbstractContextManager[Any]:
    """A block in which sizes that depend on data may be made with the fake tensors of ``graph``.

    The compilation waits for each of them in vain otherwise, and fails.
    """
    modes = (getattr(node.meta.get(EXAMPLE_VALUE), "fake_mode", None) for node in graph.nodes)
    environment = next((mode.shape_env for mode in modes if mode is not None), None)
    drop = getattr(environment, "ignore_fresh_unbacked_symbols", nullcontext)
    context: AbstractContextManager[Any] = drop()
    return context


def is_torch_op(target: Any) -> bool:
    """Whether ``target`` is of ``torch.ops``, with a schema."""
    return isinstance(target, _OpOverload | _OpOverloadPacket)


def namespace_of(target: Any) -> str | None:
    """The ``aten`` of ``torch.ops.aten.add.Tensor``; None for all but such overloads."""
    return target.namespace if isinstance(target, _OpOverload) else None


def writes_by_schema(target: Any) -> bool:
    """Whether a ``torch.ops`` operation, or any of its overloads, writes to an argument."""
    if isinstance(target, _OpOverload):
        return bool(target._schema.is_mutable)
    return any(getattr(target, name)._schema.is_mutable for name in target.overloads())


def checkpointed_call() -> Any:
    """What a graph calls to run a checkpointed region; None, and no region is found, without it."""
    name = "torch.ops.higher_order.tag_activation_checkpoint"
    return find(name, "a loss is left alone if its head is in another checkpointed region")


def autograd_function_call() -> Any:
    """What a graph calls to run a torch.autograd.Function."""
    name = "torch.ops.higher_order.autograd_function_apply"
    return find(name, "explain gives no advice on heads in an autograd.Function")


def reduction_of(size_average: bool | None, reduce: bool | None) -> str | None:
    """What the two old arguments of losses mean as ``reduction``; None if that is not known."""
    name = "torch.nn._reduction.legacy_get_string"
    read = find(name, "losses with the arguments size_average or reduce are left alone")
    return None if read is None else read(size_average, reduce, False)
