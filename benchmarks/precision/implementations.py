"""What is compared: ways to compute the loss of a linear layer, mostly in chunks."""

import contextlib
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import metrics

import lmhead_pass

from .cases import Inputs
from .errors import Results

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor | None]
"""Of hidden, weight, bias and target the mean loss ``[]``; None if it was not computed as meant."""


def head(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), target)


def autocast_head(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.float16):
        return head(hidden, weight, bias, target)


# Each takes the number of rows in a chunk, the number of chunks, and whether to autocast to FP16.


def rewritten(rows: int, chunks: int, autocast: bool = False) -> Loss:
    settings = {"batch_chunk_size": rows, "min_vocab_size": 1, "strict": True}
    counters = torch._dynamo.utils.counters["lmhead_pass"]
    return _compiled(
        autocast, lambda: lmhead_pass.config.patch(settings), lambda: counters["rewritten"]
    )


def unfused(rows: int, chunks: int, autocast: bool = False) -> Loss:
    return _compiled(autocast, lmhead_pass.disabled)


def linear_cross_entropy(rows: int, chunks: int, autocast: bool = False) -> Loss:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            return F.linear_cross_entropy(hidden, weight, target, linear_bias=bias, options=options)

    return loss


def auto_chunked(rows: int, chunks: int, autocast: bool = False) -> Loss:
    settings = {
        "auto_chunker.enable": True,
        "auto_chunker.num_chunk": chunks,
        # Else it leaves small problems alone.
        "auto_chunker.output_size_threshold": 0,
        "auto_chunker.amplify_ratio_threshold": 0,
    }

    @contextlib.contextmanager
    def chunking() -> Iterator[None]:
        with lmhead_pass.disabled(), torch._inductor.config.patch(settings):
            yield

    return _compiled(autocast, chunking, lambda: metrics.num_auto_chunking)


IMPLEMENTATIONS = {"lmhead_pass": rewritten, "torch.compile": unfused}
if hasattr(F, "linear_cross_entropy"):  # from torch 2.13 on
    IMPLEMENTATIONS["F.linear_cross_entropy"] = linear_cross_entropy
IMPLEMENTATIONS["auto_chunker"] = auto_chunked


def _compiled(
    autocast: bool,
    settings: Callable[[], AbstractContextManager],
    applications: Callable[[], int] | None = None,
) -> Loss:
    """The head compiled under ``settings``, if that makes ``applications()`` count up."""
    function = autocast_head if autocast else head
    # Dynamo keeps what it compiled with the code of the function: a copy is compiled for itself.
    copy = types.FunctionType(function.__code__.replace(), function.__globals__)
    run = torch.compile(copy, dynamic=False)
    applied: bool | None = None

    def loss(*inputs: Tensor) -> Tensor | None:
        nonlocal applied
        before = applications() if applications else 0
        with settings():  # compiles in the first call
            result = run(*inputs)
        if applied is None:
            applied = applications is None or applications() > before
        return result if applied else None

    return loss


def train(loss_function: Loss, inputs: Inputs, loss_scale: float = 1.0) -> Results | None:
    """The loss, and the gradients of it times ``loss_scale``."""
    inputs = inputs.to(inputs.hidden.dtype)
    loss = loss_function(*inputs)
    if loss is None:
        return None
    torch.amp.GradScaler("cpu", init_scale=loss_scale).scale(loss).backward()
    return Results(loss.detach(), *(leaf.grad for leaf in inputs[:3]))
