"""Reads a linear layer, however it is written."""

from collections.abc import Callable, Iterator

from torch.fx import Graph, Node

from .. import config
from ..graph import Refused, arguments, canonical_op, hint, tensor_of
from .types import Head


def large_heads(graph: Graph) -> Iterator[Head]:
    """The linear layers in ``graph`` with at least ``config.min_vocab_size`` words."""
    for node in graph.nodes:
        if is_head(node):
            try:
                head = read_head(node)
                vocab_size = hint(head.vocab_size)
            except Refused:
                continue  # a loss that it feeds tells why
            if vocab_size >= config.min_vocab_size:
                yield head


def is_head(node: Node) -> bool:
    return canonical_op(node) in _FORMS


def read_head(node: Node) -> Head:
    """Describe the linear layer that ``node`` computes; Refused if it is none."""
    head = _FORMS[canonical_op(node)](node)
    weight, hidden, logits = tensor_of(head.weight), tensor_of(head.hidden), tensor_of(node)
    if weight.dim() != 2 and canonical_op(node) != "conv1d":
        raise Refused(f"the head's weight has {weight.dim()} dimensions; only 2 are a linear layer")
    if not (hidden.device == weight.device == logits.device):
        raise Refused("hidden states, weight and logits of the head are on different devices")
    if head.bias is not None and tuple(tensor_of(head.bias).shape) != (
        logits.size(head.vocab_dim),
    ):
        raise Refused("the head's bias is not one number per word of the vocabulary")
    return head


def _last_dim(node: Node) -> int:
    return tensor_of(node).dim() - 1


def _linear(node: Node) -> Head:
    call = arguments(node, lambda input, weight, bias=None: locals())
    if call is None:
        raise Refused("linear is called with arguments that are not understood")
    return Head(node, call["input"], call["weight"], False, call["bias"], _last_dim(node))


def _matmul(node: Node) -> Head:
    call = arguments(node, lambda input, other=None, *, mat2=None: locals())
    if call is None or (call["other"] is None) == (call["mat2"] is None):
        raise Refused("matmul is called with arguments that are not understood")
    matrix = call["mat2"] if call["other"] is None else call["other"]
    return Head(node, call["input"], matrix, True, None, _last_dim(node))


def _addmm(node: Node) -> Head:
    call = arguments(node, lambda input, mat1, mat2, *, beta=1, alpha=1: locals())
    if call is None or call["beta"] != 1 or call["alpha"] != 1:
        raise Refused("addmm is called with other arguments than a bias and two matrices")
    return Head(node, call["mat1"], call["mat2"], True, call["input"], _last_dim(node))


def _einsum(node: Node) -> Head:
    """``"...h,vh->...v"`` in any letters, order of operands, and order of the matrix."""
    refused = Refused("einsum is not understood as a linear layer")
    if len(node.args) != 3 or node.kwargs or not isinstance(node.args[0], str):
        raise refused
    equation, *operands = node.args
    inputs, arrow, out = equation.replace(" ", "").replace("...", ".").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2 or any(len(set(term)) != len(term) for term in (*terms, out)):
        raise refused
    for (hidden, weight), (rows, matrix) in (
        (operands, terms),
        (reversed(operands), reversed(terms)),
    ):
        if len(matrix) != 2 or "." in matrix:
            continue
        for word, feature, transposed in ((*matrix, False), (*reversed(matrix), True)):
            if rows.endswith(feature) and word not in rows and out.replace(word, "") == rows[:-1]:
                vocab_dim = _vocab_dim(out, word, tensor_of(node).dim())
                return Head(node, hidden, weight, transposed, None, vocab_dim)
    raise refused


def _vocab_dim(out: str, word: str, dims: int) -> int:
    if word not in out:
        raise Refused("einsum is not understood as a linear layer")
    position = out.index(word)
    return position if "." not in out[:position] else dims - (len(out) - position)


def _conv1d(node: Node) -> Head:
    """With a kernel of 1, on ``[..., H, rows]``."""
    call = arguments(
        node,
        lambda input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1: locals(),
    )
    if call is None or call["groups"] != 1 or tensor_of(call["weight"]).size(-1) != 1:
        raise Refused("conv1d is a linear layer only with a kernel of 1")
    if call["stride"] not in (1, (1,), [1]) or call["padding"] not in (0, (0,), [0], "valid"):
        raise Refused("conv1d has a stride or padding")
    dim = _last_dim(node) - 1
    return Head(node, call["input"], call["weight"], False, call["bias"], dim, hidden_dim=-2)


_FORMS: dict[str | None, Callable[[Node], Head]] = {
    "linear": _linear,
    "matmul": _matmul,
    "addmm": _addmm,
    "einsum": _einsum,
    "conv1d": _conv1d,
}
