"""FSDP2 (`fully_shard`) with gradient accumulation.

    torchrun --nproc-per-node 2 examples/fsdp2.py

The blocks are wrapped one by one, and the head is left to the root: a head with a `fully_shard` of
its own is in another graph than its loss, since Dynamo does not trace FSDP's hooks.
"""

import logging

import torch
import torch.distributed as dist
from gpt import GPT
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lmhead_pass  # noqa: F401  (the import is all it takes)

VOCAB, CONTEXT, BATCH = 8192, 128, 4
ACCUMULATED = 2  # micro-batches in each step


def main() -> None:
    dist.init_process_group("gloo")  # "nccl" on GPUs
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        logging.basicConfig(format="%(name)s: %(message)s")
        logging.getLogger("lmhead_pass").setLevel(logging.INFO)

    torch.manual_seed(0)
    model = GPT(VOCAB, CONTEXT, dim=64, depth=1)
    mesh = init_device_mesh("cpu", (ranks,))  # "cuda" on GPUs
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)  # embedding, norm and head
    model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    dice = torch.Generator().manual_seed(rank)  # each rank has data of its own
    data = torch.randint(VOCAB, (ACCUMULATED, BATCH, CONTEXT + 1), generator=dice)

    for step in range(5):
        total = torch.zeros(())
        for number, batch in enumerate(data, start=1):
            # Gradients go to the other ranks once a step, with the last micro-batch.
            model.set_requires_gradient_sync(number == ACCUMULATED)
            loss = model(batch[:, :-1], batch[:, 1:]) / ACCUMULATED
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)  # one number: the sum of the ranks' mean losses
        if rank == 0:
            print(f"step {step}: loss {total.item() / ranks:.3f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
