"""Logits that leave the graph by several names: which of them are views of which."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from typing_extensions import assert_never

from ..compat import graphs
from ..compat.graphs import tree_leaves
from ..graph import Refused, describe, is_input, memory_of, value_of
from ..logits import (
    Index,
    Logits,
    Permute,
    Piece,
    Reshape,
    RowStep,
    ScaleRows,
    take_different_rows,
)
from ..returned import encode_view
from .returned_plan import INSTEAD


def views_among(returned: Sequence[Logits]) -> dict[Node, tuple[Node, str]]:
    """Those of logits that leave the graph that are views of others: of which, and how.

    Refused if some share numbers in another way, or if what leaves the graph beside them does so.
    """
    _check_others(returned)
    bases: list[Logits] = []
    views: dict[Node, tuple[Node, str]] = {}
    for logits in sorted(returned, key=lambda one: (len(one.steps), one.is_detached, one.node)):
        whole = [base for base in bases if _share_numbers(logits, base)]
        if not whole:
            bases.append(logits)
        elif whole[0].node is not logits.node:
            text = _as_view(logits, whole[0]) if len(whole) == 1 else None
            if text is None:
                raise Refused(
                    f"{describe(logits.node)} and {describe(whole[0].node)} are returned, two "
                    f"views of the same logits. {INSTEAD}"
                )
            views[logits.node] = whole[0].node, text
    return views


def _share_numbers(logits: Logits, other: Logits) -> bool:
    if logits.node is other.node:
        return True
    shared = memory_of(logits.node) & memory_of(other.node)
    return bool(shared) and not take_different_rows(logits.steps, other.steps)


def _as_view(logits: Logits, base: Logits) -> str | None:
    """The text of ``logits`` as a view of ``base``; None if they are none, or sizes are dynamic."""
    count = len(base.steps)
    if logits.history != base.history or logits.steps[:count] != base.steps:
        return None
    if base.is_detached and not logits.is_detached:
        return None
    steps: list[list[Any]] = [["detach"]] if logits.is_detached != base.is_detached else []
    steps += map(_as_words, logits.steps[count:])
    leaves = [part for leaf in tree_leaves(steps) for part in _parts(leaf)]
    if not all(isinstance(part, str | int | type(None)) for part in leaves):
        return None
    return encode_view(base.vocab_dim, steps, logits.vocab_dim)


def _as_words(step: RowStep) -> list[Any]:
    """As ``encode_view`` takes it."""
    match step:
        case Permute(order):
            return ["permute", *order]
        case Reshape(sizes):
            nodes = [size for size in sizes if isinstance(size, Node)]
            return ["reshape", *(-1 if nodes == [size] else size for size in sizes)]
        case Index(index):
            return ["index", *index]
        case Piece(method, sizes, dim, number):
            return [method, *sizes, dim, number]
        case ScaleRows():
            return [step]
        case _:
            assert_never(step)


def _parts(leaf: Any) -> tuple[Any, ...]:
    return (leaf.start, leaf.stop, leaf.step) if isinstance(leaf, slice) else (leaf,)


def _check_others(returned: Sequence[Logits]) -> None:
    """Refused if what leaves the graph beside logits shares memory that is no result's own."""
    nodes = [logits.node for logits in returned]
    results = [r for node in nodes[:1] for r in _results(node.graph) if r not in nodes]
    for result in results:
        alike = [other for other in results if memory_of(other) & memory_of(result)]
        if len(alike) > 1 and _are_views_alone(alike):
            raise Refused(
                "the logits are returned, and other results are views of the same memory, which "
                f"torch.compile takes with no tensors that are computed later. {INSTEAD}"
            )


def _results(graph: Graph) -> list[Node]:
    """The tensors that the graph returns, each once."""
    leaves = dict.fromkeys(tree_leaves(graph.output_node().args))
    return [leaf for leaf in leaves if isinstance(value_of(leaf), torch.Tensor)]


def _are_views_alone(alike: Sequence[Node]) -> bool:
    """Whether ``alike``, in the same memory, are views of what is no input and no result itself."""
    differentiable = [value for value in map(value_of, alike) if value.requires_grad]
    if not differentiable or not all(map(graphs.is_view, differentiable)):
        return False
    memory = memory_of(alike[0])
    return not any(
        is_input(node) and not memory.isdisjoint(memory_of(node)) for node in alike[0].graph.nodes
    )
