"""How many rows of logits exist at once.

The only scratch of the op that grows with the vocabulary is the buffer that holds the
logits of one chunk of rows. Rows, not a number of chunks, are planned: that needs no
batch size, so a dynamic batch adds no guard and no recompile.
"""

import math

import torch

from . import config

# Below this much scratch the matrix products get short and slow, whatever the sizes.
_LEAST_SCRATCH = {"cpu": 48 << 20, "cuda": 256 << 20}
# Where the head is large, scratch may grow to this share of the FP32 weight gradient,
# which has to be held anyway and is read and written once per chunk.
_SHARE_OF_WEIGHT_GRADIENT = 1 / 4


def plan_rows(hidden_size: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows per chunk for logits of ``vocab_size`` columns held in ``dtype``.

    ``config.batch_chunk_size`` is taken as it is; else ``config.memory_budget`` bytes are
    filled; else a budget is planned from the sizes. At least one row.
    """
    if config.batch_chunk_size is not None:
        return config.batch_chunk_size
    budget = config.memory_budget
    if budget is None:
        least = _LEAST_SCRATCH.get(device.type, _LEAST_SCRATCH["cuda"])
        budget = max(least, int(4 * vocab_size * hidden_size * _SHARE_OF_WEIGHT_GRADIENT))
    return max(1, budget // (vocab_size * dtype.itemsize))


def even_rows(rows: int, most: int) -> int:
    """Rows per chunk, at most ``most``, so that ``rows`` split into chunks of about one size."""
    chunks = max(1, math.ceil(rows / most))
    return max(1, math.ceil(rows / chunks))
