"""A node of the autograd graph that lets no gradient through: it raises.

It stands between logits that were returned without being computed and what a gradient would have
flowed to, so that whoever asks for the gradient of any of that hears of it.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

SETTING = (
    "lmhead_pass.config.returned_logits (it counts when the model is compiled): 'keep' returns "
    "logits as without lmhead_pass, 'detach' returns them computed, without a gradient"
)


class Sources:
    """Inputs of a compiled function that a gradient would flow to.

    Nothing that was saved for a backward is kept. Of an input that autograd knows the history of,
    these are the leaves that it was made of; and the input itself, while somebody else has it.
    """

    def __init__(self, inputs: Iterable[Tensor]):
        leaves: dict[int, Tensor] = {}
        self._others = []
        for tensor in inputs:
            if tensor.grad_fn is None:
                leaves[id(tensor)] = tensor
                continue
            self._others.append(weakref.ref(tensor))
            leaves |= {id(leaf): leaf for leaf in _leaves(tensor.grad_fn)}
        self.leaves = [leaf for leaf in leaves.values() if leaf.requires_grad]

    def alive(self) -> list[Tensor]:
        """With the inputs that are not leaves, and that somebody has."""
        others = (reference() for reference in self._others)
        return [*self.leaves, *(tensor for tensor in others if tensor is not None)]


def _leaves(node: torch.autograd.graph.Node) -> Iterator[Tensor]:
    """The leaves of the autograd graph that ``node`` is the root of."""
    seen, pending = {node}, [node]
    while pending:
        node = pending.pop()
        if isinstance(node, torch._C._functions.AccumulateGrad):  # type: ignore[attr-defined]
            yield node.variable
        for source, _ in node.next_functions:
            if source is not None and source not in seen:
                seen.add(source)
                pending.append(source)


def refuse_gradient(tensor: Tensor, sources: Sequence[Tensor]) -> None:
    """Let ``tensor`` require a gradient, and raise a RuntimeError if one arrives that is not zero.

    To autograd it is computed from ``sources``.
    """
    if not any(source.requires_grad for source in sources):
        sources = [torch.empty(0, requires_grad=True)]
    with torch.inference_mode(False), torch.enable_grad():
        _RefuseGradient.apply(tensor, *sources)


class _RefuseGradient(torch.autograd.Function):
    """In place, so that the caller's tensor is the one that the gradient would flow into."""

    @staticmethod
    def forward(ctx, tensor, *sources):
        ctx.mark_dirty(tensor)
        ctx.set_materialize_grads(False)
        ctx.of_sources = (None,) * len(sources)
        return tensor

    @staticmethod
    def backward(ctx, gradient):
        # Zeros, or none: from what wraps all outputs of a model, as DDP and hooks of modules do.
        if gradient is None or not gradient.any():
            return None, *ctx.of_sources
        raise RuntimeError(
            "lmhead_pass: a gradient would flow into logits that a compiled model returned without "
            "computing them, and it cannot get through to the model. Compute the loss inside the "
            "compiled model, detach() the logits if no gradient is meant, or set "
            f"{SETTING}."
        )
