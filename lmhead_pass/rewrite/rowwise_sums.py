"""Has the forward compute the gradients of a call that runs a part of the graph in chunks.

Where all gradients pass through one sum whose weights are known before, the call is given the
weights, computes the gradient of the sum with its logits at hand, and passes it on in the backward:
three products instead of four.
"""

import operator

import torch
from torch.fx import Graph, Node

from ..compat.graphs import tree_leaves
from ..graph import (
    Emitter,
    canonical_op,
    gradients_are_recorded,
    move_before,
    mutation,
    size_of,
    tensor_of,
    value_of,
)
from ..plan import run_the_same_behind
from ..sums import LinearReduction, can_be_made_behind, emit_weights, sums
from .edit import GraphEdit


def sum_in_forward(edit: GraphEdit, numbers: list[Node]) -> None:
    """Replace the call that gives ``numbers``, if they end in one sum with known weights."""
    if not numbers:
        return
    for reduction in sums(numbers):
        if _replace(edit, numbers, reduction):
            return


def _replace(edit: GraphEdit, numbers: list[Node], reduction: LinearReduction) -> bool:
    call, graph = numbers[0].args[0], edit.graph
    assert isinstance(call, Node)
    last = max([call, *reduction.reads])
    moved = _users_until(last, call)
    if last >= reduction.sum or moved is None or not gradients_are_recorded(last.next):
        return False
    if call in reduction.reads or not reduction.reads.isdisjoint(moved):
        return False
    if not can_be_made_behind(last, reduction) or not run_the_same_behind(last, (call, *moved)):
        return False
    # The gradient is put behind the sum: who holds the memory by another name would lack it.
    after_call = mutation.nodes_between(call, graph.output_node())
    if mutation.has_other_names(reduction.sum) and any(
        mutation.writers(after_call, of=[reduction.sum])
    ):
        return False
    if any(node.op == "call_method" and node.target == "backward" for node in graph.nodes):
        return False
    _emit(edit, graph, call, numbers, last, moved, reduction)
    return True


def _users_until(last: Node, call: Node) -> tuple[Node, ...] | None:
    """What depends on ``call`` and stands before ``last``, or is it; None if it cannot move."""
    found, pending = set[Node](), [call]
    while pending:
        for user in pending.pop().users:
            if user <= last and user not in found:
                is_known = canonical_op(user) is not None or _is_aten(user)
                if not is_known or not tree_leaves(value_of(user)):
                    return None
                found.add(user)
                pending.append(user)
    return tuple(sorted(found))


def _is_aten(node: Node) -> bool:
    return str(getattr(node.target, "namespace", "")) == "aten"


def _emit(
    edit: GraphEdit,
    graph: Graph,
    call: Node,
    numbers: list[Node],
    last: Node,
    moved: tuple[Node, ...],
    reduction: LinearReduction,
) -> None:
    emit = Emitter(graph, last.next)
    (hidden, *_), *_ = call.args
    assert isinstance(hidden, Node)
    likes = {
        number: emit(
            "new_zeros",
            hidden,
            (size_of(emit, hidden, 0), *tensor_of(number).shape[1:]),
            dtype=tensor_of(number).dtype,
        )
        for number in reduction.shaped_by
    }
    weights = emit_weights(emit, reduction, likes)
    upstream = [weights[number, 1] for number in numbers]
    results = emit(torch.ops.lmhead_pass.rowwise_sum.default, *call.args, upstream, **call.kwargs)
    total = emit(operator.getitem, results, 0)
    for item in call.users:
        edit.replaced[item] = emit(operator.getitem, results, 1 + item.args[1])
        edit.erased.add(item)
    edit.erased.add(call)
    move_before(emit.place, [node for node in moved if node not in edit.erased])
    behind = Emitter(graph, reduction.sum.next)
    edit.replaced[reduction.sum] = behind(
        torch.ops.lmhead_pass.with_gradient_of.default, reduction.sum, total
    )
