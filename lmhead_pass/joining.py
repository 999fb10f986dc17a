"""Several losses over one weight that end in one sum: one call, and one gradient of the weight.

A loop over pieces of the logits, or of the hidden states; multi-token prediction. A call for each
would hold a gradient of the weight for each until the backward. In a sum, each loss's share of the
gradient is known before, so that one call computes the gradient of the sum.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from . import mutation
from .emitter import nodes_read
from .match import NOTHING_IGNORED, Match, Rewrite
from .softmaxes import summed_dims
from .spelling import arguments, operation
from .tensors import is_number, tensor_of, value_of
from .weighting import other_operand

# A factor of a loss in the sum: the operation, and its operand.
Factor = tuple[str, Any]


@dataclass(frozen=True)
class Join:
    """Losses that one call computes together."""

    matches: tuple[Match, ...]
    factors: tuple[tuple[Factor, ...], ...]
    """What each loss is multiplied with or divided by on its way to the sum."""
    root: Node
    """The sum."""
    place: Node
    """The last of the losses: the call comes before it."""
    moved: tuple[Node, ...]
    """What uses the losses before ``place``, and has to be moved behind it, in this order."""


def join(graph: Graph, rewrites: list[Rewrite]) -> list[Join]:
    """Which of the matches of ``rewrites`` can share a call though they have rows of their own."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    alike: list[list[Match]] = []
    for rewrite in rewrites:
        for match in filter(_may_join, rewrite.matches):
            group = next((group for group in alike if _key(group[0]) == _key(match)), None)
            if group is None:
                alike.append(group := [])
            group.append(match)
    joins = (_join(group, order) for group in alike if len(group) > 1)
    return [joined for joined in joins if joined is not None]


def _may_join(match: Match) -> bool:
    reader = match.readers[0]
    return (
        len(match.readers) == 1
        and match.reduction != "none"
        and reader.kind in ("loss", "log_probability")
        and not reader.is_summed
        and tensor_of(_scalar(match)).requires_grad
    )


def _scalar(match: Match) -> Node:
    return match.weighting.nodes[-1] if match.weighting else match.node


def _key(match: Match) -> tuple[Any, ...]:
    """What has to be the same for matches to share a call."""
    logits, loss = match.logits, match.readers[0].loss
    asked = (None, NOTHING_IGNORED, 0.0)
    if loss is not None:
        asked = (loss.class_weight, loss.ignore_index, loss.label_smoothing)
    return (
        *(logits.head.weight, logits.head.weight_is_transposed, logits.values, logits.words),
        *(match.compute_dtype, asked),
    )


def _join(group: list[Match], order: dict[Node, int]) -> Join | None:
    paths = [_path(_scalar(match)) for match in group]
    common = set(paths[0]).intersection(*paths[1:])
    if not common:
        return None
    root = min(common, key=order.__getitem__)
    factors = tuple(path[root] for path in paths)
    place = max((match.node for match in group), key=order.__getitem__)
    operands = {operand for path in factors for _, operand in path if isinstance(operand, Node)}
    moved = _users_before(place, {match.node for match in group}, order)
    inputs = operands.union(*map(_inputs, group))
    if moved is None or any(order[node] >= order[place] for node in inputs):
        return None
    first = min((match.node for match in group), key=order.__getitem__)
    if any(mutation.writers(mutation.nodes_between(first, place), of=inputs)):
        return None
    return Join(tuple(group), factors, root, place, moved)


def _users_before(
    place: Node, losses: set[Node], order: dict[Node, int]
) -> tuple[Node, ...] | None:
    """What depends on ``losses`` and is before ``place``; None if it is not only numbers."""
    users: set[Node] = set()
    pending = list(losses)
    while pending:
        for user in pending.pop().users:
            if order[user] < order[place] and user not in users | losses:
                is_tensor = isinstance(value_of(user), torch.Tensor)
                if not is_tensor or operation(user) is None or _writes_to_others(user, users):
                    return None
                users.add(user)
                pending.append(user)
            elif user in losses:
                return None  # a loss that depends on another
    return tuple(sorted(users, key=order.__getitem__))


def _writes_to_others(node: Node, moved: set[Node]) -> bool:
    """Whether ``node`` writes to what others may read, who are not among those ``moved``."""
    if not mutation.may_write(node):
        return False
    total = node.args[0]  # total += loss
    return isinstance(total, Node) and total not in moved and len(total.users) > 1


def _inputs(match: Match) -> set[Node]:
    reader = match.readers[0]
    inputs = nodes_read(match.logits)
    if reader.target is not None:
        inputs.add(reader.target)
    if reader.loss is not None:
        inputs.add(reader.loss.target)
    if match.weighting is not None:
        inputs.update(_factors_of_rows(match))
    return inputs


def _factors_of_rows(match: Match) -> Iterator[Node]:
    assert match.weighting is not None
    inside = {match.node, *match.weighting.nodes}
    for node in match.weighting.nodes:
        yield from (source for source in node.all_input_nodes if source not in inside)


def _path(loss: Node) -> dict[Node, tuple[Factor, ...]]:
    """The sums that ``loss`` goes into, and by what factors: all that its gradient comes from."""
    path: dict[Node, tuple[Factor, ...]] = {}
    node = loss
    factors: tuple[Factor, ...] = ()
    while (user := _differentiable_user(node)) is not None:
        step = _STEPS.get(operation(user), lambda node, user: None)(node, user)
        if step is None:
            break
        node, factors = user, (*factors, *step)
        path[node] = factors
    return {sum_: factors for sum_, factors in path.items() if tensor_of(sum_).dim() == 0}


def _differentiable_user(node: Node) -> Node | None:
    """Who alone passes a gradient back to ``node``; None if that is not one node, once."""
    users = [user for user in node.users if user.op == "output" or _has_gradient(user)]
    if len(users) != 1 or users[0].op == "output":
        return None
    uses = sum(leaf is node for leaf in tree_leaves((users[0].args, users[0].kwargs)))
    return users[0] if uses == 1 else None


def _has_gradient(node: Node) -> bool:
    value = value_of(node)
    return not isinstance(value, torch.Tensor) or value.requires_grad


def _scaled(before: Node, after: Node) -> list[Factor] | None:
    operand = other_operand(before, after)
    is_known = operand is not None and (
        is_number(operand)
        or (tensor_of(operand).dim() == 0 and not tensor_of(operand).requires_grad)
    )
    return [(str(operation(after)), operand)] if is_known else None


def _added(before: Node, after: Node) -> list[Factor] | None:
    call = arguments(after, lambda input, other: locals())
    if call is None or tensor_of(after).dim() > tensor_of(before).dim():
        return None
    negated = operation(after) == "sub" and call["other"] is before
    return [("mul", -1)] if negated else []


def _stacked(before: Node, after: Node) -> list[Factor] | None:
    return [] if tensor_of(before).dim() == 0 and isinstance(after.args[0], tuple | list) else None


def _summed(before: Node, after: Node) -> list[Factor] | None:
    reduction = summed_dims(after)
    size = tensor_of(before).numel()
    if reduction is None or tensor_of(after).dim() > 0 or not isinstance(size, int):
        return None
    return [("div", size)] if operation(after) == "mean" else []


_STEPS: dict[str | None, Callable[[Node, Node], list[Factor] | None]] = {
    "mul": _scaled,
    "div": _scaled,
    "neg": lambda before, after: [("mul", -1)],
    "add": _added,
    "sub": _added,
    "cast": lambda before, after: [],
    "stack": _stacked,
    "sum": _summed,
    "mean": _summed,
}
