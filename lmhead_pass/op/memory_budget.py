"""What fits into ``config.memory_budget`` bytes, or that they are too few.

The setting is a promise for each call of the op: the logits that exist at once, and the FP32 sum of
the weight's gradient where there is one, take no more than that. Plans, the fastest first:

    one chunk         the logits of all rows, and no sum
    chunks of rows    the logits of some rows, and the sum
    blocks of words   the logits of some rows, and then, for some words at a time, those again with
                      a sum for these words: four products instead of three (``by_words.py``)

A gradient of the weight in FP32 is its own sum. One in FP16 waits in FP32 for its loss scale, so
that blocks of words would save nothing.
"""

import functools
import math
from typing import NamedTuple

import torch

from .. import config
from ..log import log
from .chunking import plan_rows, row_bytes

# A block of words has at least so many, and is a multiple of it: products work in such tiles.
_WORDS = 256
# More rows do not make the products of a block faster.
_MOST_ROWS = 4096
# Products of fewer rows are slow.
_FEW_ROWS = 128
# With fewer rows in a chunk, reading and writing the sum takes longer than a product more.
_ROWS_WITH_SUM = {True: 64, False: 512}  # on a CPU, on a GPU


class MemoryBudgetTooSmall(ValueError):
    """``config.memory_budget`` does not hold what a call of the op takes at least."""


class Chunks(NamedTuple):
    """What a call of the op holds at once."""

    rows: int
    """Of logits."""
    words: int | None = None
    """Of the sum of the weight's gradient; None: all, if there is a sum."""


def plan_chunks(
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    tokens: int = 0,
    is_dynamic: bool = False,
    gradient_dtype: torch.dtype = torch.float32,
    needs_whole_rows: bool = False,
) -> Chunks:
    """The chunks of a call with logits ``[tokens, vocab_size]`` from products in ``dtype``.

    They follow from the settings and, as ``plan_rows`` says, from the sizes. ``is_dynamic``: the
    number of tokens is that of an example. ``needs_whole_rows``: no gradient of a logit is known
    without the whole row. Raises MemoryBudgetTooSmall, which says the least.
    """
    sizes = (hidden_size, vocab_size, dtype, device)
    if config.memory_budget is None or config.batch_chunk_size is not None:
        return Chunks(plan_rows(*sizes, tokens, gradient_dtype))
    of_row, budget = row_bytes(*sizes), config.memory_budget
    # Where exponentials can be held, some calls hold half as many rows of FP32 logits.
    of_one_row = of_row if device.type == "cpu" else max(of_row, 4 * vocab_size)
    has_sum = gradient_dtype.itemsize < torch.float32.itemsize
    of_sum = 4 * vocab_size * hidden_size if has_sum else 0
    # The sum for a block of words is rounded into memory of its own.
    of_logit, of_word = of_row // vocab_size, 6 * hidden_size
    block = min(_WORDS, vocab_size)
    with_sum, in_one_chunk, by_words = of_sum + of_one_row, math.inf, math.inf
    if has_sum and gradient_dtype != torch.float16:
        if tokens > 0 and not is_dynamic:
            in_one_chunk = max(of_one_row, tokens * of_row)
        if not needs_whole_rows:
            by_words = max(of_one_row, block * (of_one_row // vocab_size + of_word))
    least = min(with_sum, in_one_chunk, by_words)
    if budget < least:
        raise MemoryBudgetTooSmall(
            f"lmhead_pass.config.memory_budget is {budget:,} bytes; a head of {vocab_size:,} words "
            f"and {hidden_size:,} hidden features in {dtype} takes at least {least:,}"
        )
    if budget >= in_one_chunk:
        return Chunks(tokens)
    rows, words = (budget - of_sum) // of_row, None
    if rows < _ROWS_WITH_SUM[device.type == "cpu"] and budget >= by_words:
        rows = min(budget // of_row, (budget // block - of_word) // of_logit, _MOST_ROWS)
        words = min(budget // (rows * of_logit + of_word) // block * block, vocab_size)
    if rows == 1:
        _warn_of_single_rows(budget, of_row)
    return Chunks(rows, words)


@functools.cache
def _warn_of_single_rows(budget: int, of_row: int) -> None:
    log.warning(
        "lmhead_pass.config.memory_budget = %d leaves one row per chunk: a row of logits takes %d "
        "bytes here. That is slow. For %d rows, set it to %d; with None it is planned from the "
        "sizes",
        *(budget, of_row, _FEW_ROWS, _FEW_ROWS * of_row),
    )
