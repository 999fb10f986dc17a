"""Compiled functions that are given logits which nobody has computed yet.

Compiled, such a function reads them. Some are run as they are instead: those that write to the
logits; and those that do little else than take a loss of them, which the op then computes without
them, or that are on their way to one when the graph breaks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from .. import config
from ..compat.compiling import leave_to_eager, may_be_left_to_eager, names_in_function
from ..compat.graphs import EXAMPLE_VALUE
from ..graph import hint, memory_of, mutation, product, value_of
from ..logits import Logits
from ..plan import ends_in_a_break
from ..returned import LazyLogits
from . import report
from .edit import GraphEdit
from .report import EmittedCall, EmittedRegion
from .rewriter import prepare

_LOSSES = ("cross_entropy", "log_softmax", "logsumexp", "gather")
# So many numbers for each row of the logits may a loss compute beside them.
_NUMBERS_PER_ROW = 16
_SOME_HIDDEN_SIZE = 8


def leave_lazy_inputs_to_eager(graph: Graph) -> None:
    """Have Dynamo run the function of ``graph`` as it is, if that is of the two kinds."""
    lazy = [
        node
        for node in graph.find_nodes(op="placeholder")
        if isinstance(value_of(node), LazyLogits)
    ]
    if not lazy:
        return
    if (node := _writer(graph, lazy)) and (may_be_left_to_eager() or len(_names(graph, lazy)) > 1):
        why = "it writes to returned logits"
    elif may_be_left_to_eager() and (losses := losses_of_inputs(graph, lazy)):
        node, why = losses[0], "it takes a loss of returned logits, which are not computed for it"
    elif may_be_left_to_eager() and (handed_on := _on_their_way(graph, lazy)):
        node, why = handed_on[0], "a loss of returned logits follows, which are not computed for it"
    else:
        return
    report.left_to_eager(node, why)
    leave_to_eager(why)


def losses_of_inputs(graph: Graph, logits: Sequence[Node]) -> list[Node]:
    """What the op would compute of these inputs of ``graph``, if the function does little else."""
    return _losses(graph, logits) if _does_little_else(graph, logits) else []


def _on_their_way(graph: Graph, logits: Sequence[Node]) -> list[Node]:
    """Views of these inputs of ``graph`` that it returns to code which goes on to a loss."""
    names_loss = any("loss" in name.lower() or name in _LOSSES for name in names_in_function())
    if not (names_loss and ends_in_a_break(graph) and _does_little_else(graph, logits)):
        return []
    with _prepared(graph, logits) as (calls, deferred):
        return [one.node for one in deferred] if not calls else []


def _writer(graph: Graph, lazy: Sequence[Node]) -> Node | None:
    """What writes to lazy logits in ``graph``.

    Compiled, other names of theirs would keep the old values: AOTAutograd compares the memory of
    its inputs, and a tensor that is computed later has none. Nor does it know views of them.
    """
    memory = _memory(lazy)
    return next((n for n in graph.nodes if not memory.isdisjoint(mutation.memory_written(n))), None)


def _names(graph: Graph, lazy: Sequence[Node]) -> list[Node]:
    """The inputs of ``graph`` that may share memory with lazy logits, in the next call at least."""
    memory, inputs = _memory(lazy), graph.find_nodes(op="placeholder")
    return [node for node in inputs if node in lazy or not memory.isdisjoint(memory_of(node))]


def _memory(lazy: Sequence[Node]) -> set[int]:
    return {memory for node in lazy for memory in memory_of(node)}


def _does_little_else(graph: Graph, logits: Sequence[Node]) -> bool:
    """Whether nothing large is computed in ``graph`` but from these inputs."""
    most = max(_NUMBERS_PER_ROW * hint(product(value_of(node).shape[:-1])) for node in logits)
    from_logits = set(logits)
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if not from_logits.isdisjoint(node.all_input_nodes):
            from_logits.add(node)
        elif isinstance(value := value_of(node), Tensor) and hint(value.numel()) > most:
            return False
    return True


def _losses(graph: Graph, logits: Sequence[Node]) -> list[Node]:
    with _prepared(graph, logits) as (calls, _):
        # What has no fused form may do what is not written down outside: it stays compiled.
        fused = [call for call in calls if isinstance(call, EmittedCall)]
        return [call.node for call in fused] if len(fused) == len(calls) else []


@contextmanager
def _prepared(
    graph: Graph, logits: Sequence[Node]
) -> Iterator[tuple[Sequence[EmittedCall | EmittedRegion], Sequence[Logits]]]:
    """What would be rewritten and deferred, if linear layers made these inputs of ``graph``."""
    # The heads that are put there have any size: no budget is for them.
    any_budget = config.patch(memory_budget=None)
    with _heads_in_place_of(graph, logits), any_budget:
        edit = GraphEdit(graph)
        try:
            calls, _ = prepare(edit)
        except Exception as error:
            report.failure(error)
            calls, edit.deferred = [], []
        try:
            yield calls, edit.deferred
        finally:
            edit.roll_back()


@contextmanager
def _heads_in_place_of(graph: Graph, logits: Sequence[Node]) -> Iterator[None]:
    """As if linear layers made these logits from inputs of the graph, which there are not."""
    values = {n: value for n in graph.nodes if isinstance(value := value_of(n), LazyLogits)}
    for node, value in values.items():
        node.meta[EXAMPLE_VALUE] = _plain(value)
    heads = {node: _insert_head(graph, node) for node in logits}
    for node, head in heads.items():
        node.replace_all_uses_with(head)
    try:
        yield
    finally:
        for node, head in heads.items():
            head.replace_all_uses_with(node)
            for made in (head, *head.args):
                graph.erase_node(made)
        for node, value in values.items():
            node.meta[EXAMPLE_VALUE] = value


def _plain(logits: LazyLogits) -> Tensor:
    """The values in the same memory, as a linear layer would have made them."""
    leaf = logits._value.detach().requires_grad_(logits.requires_grad)
    with torch.enable_grad():
        value: Tensor = torch.ops.aten.alias(leaf)
        return value


def _insert_head(graph: Graph, logits: Node) -> Node:
    value = value_of(logits)
    *rows, vocab = value.shape
    inputs = []
    after = graph.find_nodes(op="placeholder")[-1]
    for name, first in {"hidden": rows, "weight": [vocab]}.items():
        with graph.inserting_after(after):
            after = graph.placeholder(f"{logits.name}_{name}")
        like = value.new_empty((*first, _SOME_HIDDEN_SIZE))
        after.meta[EXAMPLE_VALUE] = like.requires_grad_(value.requires_grad)
        inputs.append(after)
    with graph.inserting_after(after):
        head = graph.call_function(F.linear, tuple(inputs))
    head.meta[EXAMPLE_VALUE] = value
    return head
