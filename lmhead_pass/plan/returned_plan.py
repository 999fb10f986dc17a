"""Logits that leave the graph: whether they can be computed when they are read, and what then
stands for them."""

from dataclasses import replace

import torch
from torch.fx import Graph, Node
from typing_extensions import assert_never

from .. import compat, config
from ..compat import graphs
from ..compat.compiling import is_part_of_ddp, why_not_lazy
from ..compat.graphs import tree_leaves
from ..compat.lazy_tensors import version_of
from ..graph import (
    Refused,
    canonical_op,
    describe,
    memory_of,
    mutation,
    tensor_of,
    value_of,
    wraps_none,
)
from ..logits import (
    AddNumber,
    AddTensor,
    Algebraic,
    Cast,
    Fill,
    KeepWords,
    Logits,
    Scale,
    Sigmoid,
    Stage,
    Tanh,
)
from ..returned import Step, StepKind

_INSTEAD = "Return the loss alone, or set lmhead_pass.config.returned_logits to 'detach'"


def check_returned(logits: Logits) -> Logits:
    """``logits``, ready to be emitted; Refused if what stands for them cannot be computed."""
    if logits.stage is not Stage.LOGITS:
        raise Refused("the compiled function returns log-probabilities. Return the loss alone")
    if config.returned_logits == "detach":
        if tensor_of(logits.node).requires_grad and _ends_in_a_break(logits.node.graph):
            raise Refused(
                "a graph break follows, and code after it that uses the logits would lose their "
                "gradient, since config.returned_logits is 'detach'. Remove the break "
                "(lmhead_pass.explain names it), or set it to 'lazy'"
            )
        return logits
    if lacking := why_not_lazy():
        raise Refused(f"the logits are returned, and this torch has no {lacking}. {_INSTEAD}")
    if is_part_of_ddp() and not _are_returned_from_a_part(logits.node):
        raise Refused(
            "the logits are returned, and DistributedDataParallel has the graph cut at the borders "
            "of its buckets, where this torch knows no tensors that are computed later. Return the "
            "loss alone, or set torch._dynamo.config.optimize_ddp = False"
        )
    logits = _for_later(logits)
    later = mutation.nodes_between(logits.head.node, logits.head.node.graph.output_node())
    for writer in mutation.writers(later, of=logits.inputs):
        raise Refused(
            f"the logits are returned, and {describe(writer)} may change the head's input, weight "
            f"or bias in place, so that they cannot be computed afterwards. {_INSTEAD}"
        )
    _check_sources(logits)
    return logits


def _check_sources(logits: Logits) -> None:
    """Refused if a gradient of ``logits`` by an input of the graph would be dropped silently.

    What a compiled function returns keeps the history of plain inputs that it leaves as they are.
    """
    sources = sources_of(logits)
    reasons = [
        f"{describe(source)} is a {type(value_of(source)).__name__}, not a plain tensor"
        for source in sources
        if not wraps_none(value_of(source))
    ]
    known = filter(mutation.writes, logits.node.graph.nodes)
    writers = mutation.writers(known, of=sources)
    reasons += (f"{describe(writer)} changes an input in place" for writer in writers)
    # Of what only may write, such as custom autograd functions, Dynamo's run on these fakes tells.
    reasons += (
        f"{describe(source)} is changed in place"
        for source in sources
        if version_of(value_of(source)) > 0
    )
    for reason in reasons:
        raise Refused(
            "the logits are returned, and a gradient through them could not be refused, since "
            f"{reason}. {_INSTEAD}"
        )


def sources_of(logits: Logits) -> list[Node]:
    """The inputs of the graph that a gradient of the logits would flow to."""
    if not tensor_of(logits.node).requires_grad:
        return []
    nodes = list(logits.node.graph.nodes)
    needed, memory = {logits.node}, memory_of(logits.node)
    for node in reversed(nodes[: nodes.index(logits.node) + 1]):
        if node in needed or not memory.isdisjoint(mutation.memory_written(node)):
            needed.update(node.all_input_nodes)
            memory.update(*map(memory_of, node.all_input_nodes))
    return [
        node
        for node in nodes
        if node.op == "placeholder"
        and node in needed
        and isinstance(value_of(node), torch.Tensor)
        and value_of(node).requires_grad
    ]


def _for_later(logits: Logits) -> Logits:
    """``logits`` with an input of the graph as the head's weight; Refused if there is none."""
    if not is_whole(logits.head.node.graph):
        raise Refused(
            "the logits leave a part of the graph (gradient checkpointing, say) and not the "
            "compiled function itself. Return the loss alone"
        )
    recipe_of(logits)
    weight, is_transposed = _input_weight(logits)
    head = replace(logits.head, weight=weight, weight_is_transposed=is_transposed)
    return replace(logits, head=head)


def is_whole(graph: Graph) -> bool:
    """Whether ``graph`` is what a compiled function runs, and not a part that it calls."""
    return graphs.is_whole(graph)


def _are_returned_from_a_part(logits: Node) -> bool:
    """Whether DDP finds the other results of its part in their places, if ``logits`` are lazy."""
    results = [leaf for leaf in tree_leaves(logits.graph.output_node().args) if leaf is not None]
    return compat.DDP_PARTS_RETURN_SUBCLASSES and results[-1] is logits


def _ends_in_a_break(graph: Graph) -> bool:
    """Whether what ``graph`` returns goes to the rest of the function, or may do so."""
    end = graphs.end_of(graph.owning_module)
    return end is None or end.is_break


def recipe_of(logits: Logits) -> tuple[Node | None, list[str]]:
    """The bias, and the steps of a ``Recipe``, encoded."""
    bias = logits.head.bias
    steps = [Step(StepKind.CAST, (tensor_of(logits.head.node).dtype,))]
    for step in logits.history:
        match step:
            case Cast(dtype):
                steps.append(Step(StepKind.CAST, (dtype,)))
            case Scale(number, divides):
                steps.append(Step(StepKind.DIVIDE if divides else StepKind.MULTIPLY, (number,)))
            case AddNumber(number):
                steps.append(Step(StepKind.ADD, (number,)))
            case AddTensor(tensor, 1) if bias is None:
                bias = tensor
                steps.append(Step(StepKind.ADD_BIAS))
            case Tanh():
                steps.append(Step(StepKind.TANH))
            case Sigmoid():
                steps.append(Step(StepKind.SIGMOID))
            case Fill(range(start=start, stop=stop, step=1), float(value)):
                steps.append(Step(StepKind.FILL, (start, stop, value)))
            case KeepWords(start, stop):
                steps.append(Step(StepKind.TAKE_WORDS, (start, stop)))
            case Algebraic():
                raise Refused(
                    "the logits are returned after an algebraic softcap, and cannot be computed "
                    f"afterwards. {_INSTEAD}"
                )
            case AddTensor() | Fill():
                raise Refused(
                    "the logits are returned after a second bias or a mask of the vocabulary, and "
                    f"cannot be computed afterwards. {_INSTEAD}"
                )
            case _:
                assert_never(step)
    return bias, [step.encode() for step in steps]


def _input_weight(logits: Logits) -> tuple[Node, bool]:
    """The graph's input that is the head's weight, and whether it is ``[H, V]``."""
    head = logits.head
    node, is_transposed = head.weight, head.weight_is_transposed
    while node.op == "call_function" or node.op == "call_method":
        source = node.args[0] if node.args else None
        if canonical_op(node) == "permute" and isinstance(source, Node):
            before, after = tensor_of(source), tensor_of(node)
            if before.dim() == 2 and after.stride() == before.stride()[::-1]:
                node, is_transposed = source, not is_transposed
                continue
        # The products' dtype is known: what is cast to it before can be cast to it afterwards.
        if canonical_op(node) == "cast" and tensor_of(node).dtype == tensor_of(head.node).dtype:
            node = source
            continue
        raise Refused(
            f"the logits are returned, and the head's weight is computed in the graph (by "
            f"{describe(node)}): to compute them afterwards, it would have to be kept. "
            f"{_INSTEAD}"
        )
    return node, is_transposed
