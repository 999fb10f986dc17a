"""A training step of a tiny language model in two processes: what test_parallel.py compares.

``main`` takes from the command line: RANK FOLDER CASE.
"""

import copy
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch._inductor.compile_fx  # once, for every process that is forked
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import lmhead_pass

from ..backend import rewrite

VOCAB, HIDDEN, ROWS, LENGTH = 96, 16, 4, 6


class Model(nn.Module):
    """Returns its logits beside the loss, as most do."""

    def __init__(self, tied: bool = True):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.block = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        hidden = torch.tanh(self.block(self.embedding(tokens[:, :-1])))
        logits = self.head(hidden)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        return loss, logits


def batches() -> list[torch.Tensor]:
    """Two batches of ``[2 ROWS, LENGTH]``, of which each process has a half."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (2 * ROWS, LENGTH), generator=generator) for _ in range(2)]


def expected(model: nn.Module, count: int) -> dict[str, torch.Tensor]:
    """The gradients of one process with whole batches."""
    for tokens in batches()[:count]:
        model(tokens)[0].backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def quickly(model: Callable) -> Callable:
    """``model``, rewritten and differentiated ahead of time, but not compiled by Inductor."""
    return rewrite(model, then=aot_eager)


def ddp(model: nn.Module, rank: int) -> nn.Module:
    return _accumulate(model, rank, DistributedDataParallel(model))


def ddp_in_buckets(model: nn.Module, rank: int) -> nn.Module:
    """Where Dynamo cuts the graph at the buckets' borders."""
    dist._DEFAULT_FIRST_BUCKET_BYTES = 1024
    return _accumulate(model, rank, DistributedDataParallel(model, bucket_cap_mb=2e-3))


def ddp_unused(model: nn.Module, rank: int) -> nn.Module:
    """Where DistributedDataParallel clones all that the model returns."""
    options = {"find_unused_parameters": True, "gradient_as_bucket_view": True}
    return _accumulate(model, rank, DistributedDataParallel(model, **options), quickly)


def ddp_static(model: nn.Module, rank: int) -> nn.Module:
    parallel = DistributedDataParallel(model, static_graph=True)
    quickly(parallel)(batches()[0][rank * ROWS :][:ROWS])[0].backward()
    return model


def _accumulate(
    model: nn.Module, rank: int, parallel: DistributedDataParallel, compile=torch.compile
) -> nn.Module:
    compiled = compile(parallel)
    first, second = (batch[rank * ROWS :][:ROWS] for batch in batches())
    with parallel.no_sync():
        compiled(first)[0].backward()
    compiled(second)[0].backward()
    return model


def fsdp(model: nn.Module, rank: int) -> nn.Module:
    fully_shard(model)
    return _one_step(model, rank)


def fsdp_resharded(model: nn.Module, rank: int) -> nn.Module:
    """Where the weight is gone after the forward, and the logits with it if nobody read them."""
    fully_shard(model, reshard_after_forward=True)
    return _one_step(model, rank, quickly)


def fsdp_by_module(model: nn.Module, rank: int) -> nn.Module:
    for part in (model.block, model.head):
        fully_shard(part)
    fully_shard(model)
    return _one_step(model, rank)


def fsdp_mixed(model: nn.Module, rank: int) -> nn.Module:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mp_policy=policy)
    return _one_step(model, rank)


def _one_step(model: nn.Module, rank: int, compile=torch.compile) -> nn.Module:
    whole = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
    alone = Model(model.head.weight is model.embedding.weight)
    alone.load_state_dict(whole, strict=False)
    tokens = batches()[0][rank * ROWS :][:ROWS]
    loss, logits = compile(model)(tokens)
    loss.backward()
    # The weight may be gone, or sharded again; other values than the model's there are none.
    try:
        values = logits.detach().clone()
    except RuntimeError as error:
        assert "was freed" in str(error) or "was changed" in str(error), error
    else:
        torch.testing.assert_close(values.float(), alone(tokens)[1], atol=0.05, rtol=0)
    return model


def tensor_parallel(model: nn.Module, rank: int) -> nn.Module:
    """Both processes have the whole batch, and half of the vocabulary each."""
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(model, mesh, {"head": ColwiseParallel(output_layouts=Replicate())})
    quickly(model)(batches()[0])[0].backward()
    return model


def tensor_parallel_loss(model: nn.Module, rank: int) -> nn.Module:
    """Where no process ever has all logits of a row."""
    mesh = init_device_mesh("cpu", (2,))
    halves = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model, mesh, {"head": halves})
    with loss_parallel():
        quickly(lambda tokens: model(tokens)[0])(batches()[0]).backward()
    return model


# Whether the embedding is tied, how many batches there are, and how far gradients may be off.
CASES: dict[str, tuple[Callable[..., nn.Module], bool, int, float]] = {
    "ddp": (ddp, True, 2, 1e-6),
    "ddp_in_buckets": (ddp_in_buckets, False, 2, 1e-6),
    "ddp_unused": (ddp_unused, True, 2, 1e-6),
    "ddp_static": (ddp_static, True, 1, 1e-6),
    "fsdp": (fsdp, True, 1, 1e-6),
    "fsdp_by_module": (fsdp_by_module, False, 1, 1e-6),
    "fsdp_mixed": (fsdp_mixed, True, 1, 2e-2),
    "fsdp_resharded": (fsdp_resharded, True, 1, 1e-6),
    "tensor_parallel": (tensor_parallel, False, 1, 1e-6),
    "tensor_parallel_loss": (tensor_parallel_loss, False, 1, 1e-6),
}


def main() -> None:
    rank, folder, case = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    run, tied, count, tolerance = CASES[case]
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    logging.getLogger("lmhead_pass").addHandler(logging.StreamHandler())
    logging.getLogger("lmhead_pass").setLevel(logging.INFO)
    torch.manual_seed(0)
    model = Model(tied)
    exact = expected(copy.deepcopy(model), count)
    with lmhead_pass.config.patch(strict=True, min_vocab_size=64):
        trained = run(model, rank)
    for name, parameter in trained.named_parameters():
        grad = parameter.grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        error = (grad - exact[name]).abs().max() / exact[name].abs().max()
        assert error < tolerance, f"{name}: {error}"
    print("rewritten", counters["lmhead_pass"]["rewritten"], flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends in the usual way
