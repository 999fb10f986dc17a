"""A language model's head and loss on random inputs, in the ways that any device runs.

"lmhead_pass" and "compile" are one function under ``torch.compile``, with the pass and without;
"floor" is the bare matrix products that the step cannot do without; "torch_lce" is PyTorch's own
``F.linear_cross_entropy``, chunked.
"""

import types
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import lmhead_pass

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
Step = Callable[[], None]


class Inputs(NamedTuple):
    hidden: Tensor
    """[tokens, hidden], with a gradient."""
    weight: Tensor
    """[vocab, hidden], with a gradient."""
    target: Tensor
    """[tokens] of int64."""


def make_inputs(tokens: int, hidden: int, vocab: int, dtype: torch.dtype) -> Inputs:
    """The same numbers each time; logits have a standard deviation of 1."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, hidden, generator=generator).to(dtype)
    weight = (torch.randn(vocab, hidden, generator=generator) * hidden**-0.5).to(dtype)
    target = torch.randint(vocab, (tokens,), generator=generator)
    return Inputs(states.requires_grad_(), weight.requires_grad_(), target)


def make_step(name: str, inputs: Inputs) -> Step:
    """Loss and gradients, which are dropped. What has to be compiled is."""
    if name == "floor":
        return lambda: _products(inputs)
    loss = _LOSSES[name]()

    def run() -> None:
        loss(*inputs).backward()
        inputs.hidden.grad = inputs.weight.grad = None

    run()
    return run


@torch.no_grad()
def _products(inputs: Inputs) -> tuple[Tensor, Tensor]:
    logits = inputs.hidden @ inputs.weight.t()
    return logits @ inputs.weight, logits.t() @ inputs.hidden


def head(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def compiled_head(head: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``head`` under ``torch.compile``, for these sizes."""
    # Dynamo keeps what it compiled with the code of the function: a copy is compiled for itself.
    code, names = head.__code__.replace(), head.__globals__
    copy = types.FunctionType(code, names, closure=head.__closure__)
    return torch.compile(copy, dynamic=False)


def rewritten(head: LossFunction) -> LossFunction:
    """``head`` with the pass; an error unless it is rewritten."""
    compiled, counters = compiled_head(head), torch._dynamo.utils.counters["lmhead_pass"]

    def run(*inputs: Tensor) -> Tensor:
        loss = compiled(*inputs)
        assert counters["rewritten"], "the head was not rewritten"
        return loss

    counters.clear()
    return run


def _unfused() -> LossFunction:
    compiled = compiled_head(head)

    def run(*inputs: Tensor) -> Tensor:
        with lmhead_pass.disabled():  # which counts where the first call compiles
            return compiled(*inputs)

    return run


def torch_lce() -> LossFunction:
    """PyTorch's own, with options."""
    options = torch.nn.LinearCrossEntropyOptions()  # without them it holds all logits
    return lambda *inputs: F.linear_cross_entropy(*inputs, options=options)


_LOSSES = {"lmhead_pass": lambda: rewritten(head), "compile": _unfused, "torch_lce": torch_lce}


def available() -> list[str]:
    """The names that this torch can run: ``F.linear_cross_entropy`` is new in 2.13."""
    names = ["lmhead_pass", "compile", "floor", "torch_lce"]
    return names if hasattr(torch.nn, "LinearCrossEntropyOptions") else names[:-1]
