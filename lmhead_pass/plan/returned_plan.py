"""Logits that leave the graph: whether they can be computed when they are read, and what then
stands for them."""

from dataclasses import replace

from torch.fx import Graph, Node
from typing_extensions import assert_never

from .. import compat, config
from ..compat import graphs
from ..compat.compiling import is_part_of_ddp, why_not_lazy
from ..compat.graphs import tree_leaves
from ..graph import (
    Refused,
    canonical_op,
    describe,
    hint,
    in_inference,
    is_cut_off,
    is_input,
    memory_of,
    mutation,
    tensor_of,
    value_of,
)
from ..logits import (
    AddNumber,
    AddTensor,
    Algebraic,
    Cast,
    Fill,
    Flow,
    KeepWords,
    Logits,
    Scale,
    Sigmoid,
    Stage,
    Tanh,
)
from ..returned import Step, StepKind

# A vocabulary is at least so many times as large as hidden states, or its head may be no head.
_WIDER = 6
INSTEAD = "Return the loss alone, or set lmhead_pass.config.returned_logits to 'detach'"


def check_returned(logits: Logits) -> Logits:
    """``logits``, ready to be emitted; Refused if what stands for them cannot be computed."""
    if logits.stage is not Stage.LOGITS:
        raise Refused("the compiled function returns log-probabilities. Return the loss alone")
    if config.returned_logits == "detach":
        if tensor_of(logits.node).requires_grad and ends_in_a_break(logits.node.graph):
            raise Refused(
                "a graph break follows, and code after it that uses the logits would lose their "
                "gradient, since config.returned_logits is 'detach'. Remove the break "
                "(lmhead_pass.explain names it), or set it to 'lazy'"
            )
        return logits
    if tensor_of(logits.head.node).requires_grad and _has_no_history(logits.node):
        raise Refused(
            f"the logits are returned, and {describe(logits.node)} makes a view of them under "
            f"no_grad, through which no gradient gets back. {INSTEAD}"
        )
    if lacking := why_not_lazy():
        raise Refused(f"the logits are returned, and this torch has no {lacking}. {INSTEAD}")
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
            f"or bias in place, so that they cannot be computed afterwards. {INSTEAD}"
        )
    return logits


def _has_no_history(node: Node) -> bool:
    return is_cut_off(node) or node in in_inference(node.graph)


def is_worth_deferring(flow: Flow) -> bool:
    """Whether the logits of ``flow`` look like those of a language model, and are large.

    A projection of a block (queries, keys and values; gates) is no more than a few times as wide as
    its input. Where few tokens are generated without a gradient, watching the weight for changes
    would cost more than the logits do.
    """
    hidden_size = hint(tensor_of(flow.head.hidden).size(flow.head.hidden_dim))
    rows = hint(tensor_of(flow.head.hidden).numel()) // max(1, hidden_size)
    is_wide = hint(flow.head.vocab_size) >= _WIDER * hidden_size
    return is_wide and (tensor_of(flow.head.node).requires_grad or rows >= hidden_size)


def _for_later(logits: Logits) -> Logits:
    """``logits`` with the weight that is to be kept for them; Refused if there is none."""
    if not is_whole(logits.head.node.graph):
        raise Refused(
            "the logits leave a part of the graph (gradient checkpointing, say) and not the "
            "compiled function itself. Return the loss alone"
        )
    recipe_of(logits)
    weight, is_transposed = _kept_weight(logits)
    head = replace(logits.head, weight=weight, weight_is_transposed=is_transposed)
    return replace(logits, head=head)


def is_whole(graph: Graph) -> bool:
    """Whether ``graph`` is what a compiled function runs, and not a part that it calls."""
    return graphs.is_whole(graph)


def _are_returned_from_a_part(logits: Node) -> bool:
    """Whether DDP finds the other results of its part in their places, if ``logits`` are lazy."""
    results = [leaf for leaf in tree_leaves(logits.graph.output_node().args) if leaf is not None]
    return compat.DDP_PARTS_RETURN_SUBCLASSES and results[-1] is logits


def ends_in_a_break(graph: Graph) -> bool:
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
                    f"afterwards. {INSTEAD}"
                )
            case AddTensor() | Fill():
                raise Refused(
                    "the logits are returned after a second bias or a mask of the vocabulary, and "
                    f"cannot be computed afterwards. {INSTEAD}"
                )
            case _:
                assert_never(step)
    return bias, [step.encode() for step in steps]


def _kept_weight(logits: Logits) -> tuple[Node, bool]:
    """What to keep as the head's weight, and whether it is ``[H, V]``.

    That is an input of the graph (or a view of one, if a gradient ends there), or what the graph
    computes of some if it is smaller than the logits.
    """
    head = logits.head
    node, is_transposed = head.weight, head.weight_is_transposed
    while node.op in ("call_function", "call_method") and not is_frozen_view(node):
        source = node.args[0] if node.args else None
        if isinstance(source, Node) and is_differentiable(source) == is_differentiable(node):
            if canonical_op(node) == "permute":
                before, after = tensor_of(source), tensor_of(node)
                if before.dim() == 2 and after.stride() == before.stride()[::-1]:
                    node, is_transposed = source, not is_transposed
                    continue
            # The products' dtype is known: what is cast to it before can be cast to it afterwards.
            if canonical_op(node) == "cast" and tensor_of(node).dtype == tensor_of(head.node).dtype:
                node = source
                continue
        if hint(tensor_of(head.weight).numel()) < hint(tensor_of(logits.node).numel()):
            return head.weight, head.weight_is_transposed
        raise Refused(
            f"the logits are returned, and the head's weight is computed in the graph (by "
            f"{describe(node)}): to compute them afterwards, it would have to be kept, and it is "
            f"no smaller than they are. {INSTEAD}"
        )
    return node, is_transposed


def is_frozen_view(node: Node) -> bool:
    """Whether ``node`` is in the memory of an input of the graph, and requires no gradient."""
    memory = memory_of(node)
    return not is_differentiable(node) and any(
        not memory.isdisjoint(memory_of(source)) for source in node.graph.nodes if is_input(source)
    )


def is_differentiable(node: Node) -> bool:
    """Whether a gradient goes on from ``node``. Views made under no_grad require one, too."""
    requires_grad = bool(getattr(value_of(node), "requires_grad", False))
    return requires_grad and (is_input(node) or not _has_no_history(node))
