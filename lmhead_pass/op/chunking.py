"""How many rows of logits exist at once.

The only scratch of the op that grows with the vocabulary is the buffer that holds the logits of
one chunk of rows. The plan is a number of rows, not of chunks: it does not depend on the batch
size, so a dynamic batch adds no guard and no recompile.
"""

import math
from dataclasses import dataclass

import torch

from .. import config
from .holding import EXPONENTIAL_BYTES, can_hold_exponentials

# A GPU's products work in tiles of this many rows, or of a divisor of it.
_GPU_TILE = 128


@dataclass(frozen=True)
class _Plan:
    """How much scratch the logits of a chunk may take, for one kind of device."""

    least: int
    """Bytes that any head gets: with less, the products are short and slow."""
    share: float
    """The scratch of a large head may grow to this share of the FP32 weight gradient, which has to
    be held anyway and is read and written once per chunk."""
    most: float
    """Bytes that no head exceeds."""
    most_rows: float
    """Longer products are no faster."""
    enough_rows: float
    """Shorter products are slow. Beyond that, a chunk is at most a quarter of all rows: there would
    be nothing to avoid else."""


_CPU = _Plan(least=44 << 20, share=1 / 4, most=math.inf, most_rows=math.inf, enough_rows=128)
# On a GPU, reading and writing the sum of the weight's gradient takes longer, compared with the
# products, than on a CPU, so chunks are larger. With the scratch of cuBLAS, 1.45 GB stay below 1.5.
_GPU = _Plan(least=256 << 20, share=1, most=1.45e9, most_rows=4096, enough_rows=math.inf)


def row_bytes(hidden_size: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """What is held of one row of logits that come from products in ``dtype``."""
    if can_hold_exponentials(device, dtype, hidden_size):
        return vocab_size * EXPONENTIAL_BYTES
    # On a GPU the logits come out of the product in FP32, or as exponentials.
    held = dtype if device.type == "cpu" else torch.promote_types(dtype, torch.float32)
    return vocab_size * held.itemsize


def plan_rows(
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
    tokens: int = 0,
    gradient_dtype: torch.dtype = torch.float32,
) -> int:
    """Rows per chunk, at least one, of logits ``[rows, vocab_size]`` from products in ``dtype``.

    That is ``config.batch_chunk_size``; else as many as a budget holds that is planned from the
    sizes, for ``tokens`` rows in all (0: not known). ``gradient_dtype`` is the dtype of the
    weight's gradient.
    """
    if config.batch_chunk_size is not None:
        return config.batch_chunk_size
    on_cpu = device.type == "cpu"
    of_row = row_bytes(hidden_size, vocab_size, dtype, device)
    plan = _CPU if on_cpu else _GPU
    of_sum = 4 * vocab_size * hidden_size
    budget = max(plan.least, min(plan.most, of_sum * plan.share))
    rows = int(max(1, budget // of_row))
    if tokens > 0:
        rows = int(min(rows, max(plan.enough_rows, math.ceil(tokens / 4))))
    # A sum over chunks is held in FP32. A single chunk has no sum: its product is the gradient. The
    # memory of an FP32 sum of ``[V, H]`` holds some more rows of logits.
    has_sum = gradient_dtype.itemsize < torch.float32.itemsize
    if 0 < tokens <= rows + (of_sum // of_row if has_sum else 0):
        return max(rows, tokens)
    rows = int(min(rows, plan.most_rows))
    return rows if on_cpu else _whole_tiles(rows)


def _whole_tiles(rows: int) -> int:
    return rows if rows < _GPU_TILE else rows // _GPU_TILE * _GPU_TILE


def even_rows(rows: int, most: int) -> int:
    """Rows per chunk, at most ``most``, so that ``rows`` split into chunks of about one size."""
    chunks = max(1, math.ceil(rows / most))
    return max(1, math.ceil(rows / chunks))


def gpu_chunks(rows: int, most: int) -> list[slice]:
    """The chunks of ``rows`` on a GPU: ``most`` rows each, but for the first.

    So the last has ``min(rows, most)`` rows, which is known without knowing how many chunks there
    are: what is left of it for the backward has one size for every batch.
    """
    stops = [*range(rows, 0, -most)][::-1]
    return [slice(max(0, stop - most), stop) for stop in stops]
