"""DistributedDataParallel with gradient accumulation.

    torchrun --nproc-per-node 2 examples/ddp.py

The model returns its loss alone, or its loss first. With more than one bucket of gradients Dynamo
cuts the graph at the buckets' borders, and logits that are returned are then left as they are.
"""

import contextlib
import logging

import torch
import torch.distributed as dist
from gpt import GPT
from torch.nn.parallel import DistributedDataParallel

import lmhead_pass  # noqa: F401  (the import is all it takes)

VOCAB, CONTEXT, BATCH = 8192, 128, 4
ACCUMULATED = 2  # micro-batches in each step


def main() -> None:
    dist.init_process_group("gloo")  # "nccl" on GPUs
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        logging.basicConfig(format="%(name)s: %(message)s")
        logging.getLogger("lmhead_pass").setLevel(logging.INFO)
    train(rank, ranks)
    # Not while the model is there, which holds the group: Gloo's threads may then never end.
    dist.destroy_process_group()


def train(rank: int, ranks: int) -> None:
    torch.manual_seed(0)
    parallel = DistributedDataParallel(GPT(VOCAB, CONTEXT, dim=64, depth=1))
    model = torch.compile(parallel)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    dice = torch.Generator().manual_seed(rank)  # each rank has data of its own
    data = torch.randint(VOCAB, (ACCUMULATED, BATCH, CONTEXT + 1), generator=dice)

    for step in range(5):
        total = torch.zeros(())
        for number, batch in enumerate(data, start=1):
            last = number == ACCUMULATED
            # Gradients go to the other ranks once a step, with the last micro-batch.
            with contextlib.nullcontext() if last else parallel.no_sync():
                loss = model(batch[:, :-1], batch[:, 1:]) / ACCUMULATED
                loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)  # one number: the sum of the ranks' mean losses
        if rank == 0:
            print(f"step {step}: loss {total.item() / ranks:.3f}", flush=True)


if __name__ == "__main__":
    main()
