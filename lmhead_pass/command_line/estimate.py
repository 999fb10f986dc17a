"""What the pass would save a head of given sizes, under the plan that it would choose."""

import math

import torch

from .. import config
from ..op import Chunks, can_hold_exponentials, held_dtype, plan_chunks, row_bytes
from .tables import Table


def estimate(
    tokens: int, hidden: int, vocab: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Table]:
    """Tables of a training step of ``cross_entropy(linear([tokens, hidden]), [tokens])``.

    Head, hidden states and logits are of ``dtype``. Settings are those of ``lmhead_pass.config``.
    """
    planned = plan_chunks(hidden, vocab, dtype, device, tokens=tokens, gradient_dtype=dtype)
    chunks = planned._replace(rows=min(tokens, planned.rows))
    return {
        f"[{tokens}, {hidden}] x [{vocab}, {hidden}], {_name(dtype)}, on {device.type}": [
            *_left_alone(vocab),
            *_memory(tokens, hidden, vocab, dtype, device, chunks),
        ],
        "Plan": _plan(tokens, hidden, vocab, dtype, device, chunks),
        "Time": _time(tokens, hidden, vocab, chunks),
    }


def _left_alone(vocab: int) -> Table:
    if vocab >= config.min_vocab_size:
        return []
    least = f"lmhead_pass.config.min_vocab_size ({config.min_vocab_size})"
    return [
        ("left alone", f"{vocab} words are fewer than {least}: set that lower for what follows")
    ]


def unfused_bytes(tokens: int, hidden: int, vocab: int, dtype: torch.dtype) -> int:
    """What a compiled step allocates at its peak without the pass: logits and gradients."""
    return tokens * vocab * dtype.itemsize + (tokens + vocab) * hidden * dtype.itemsize


def fused_bytes(
    tokens: int, hidden: int, vocab: int, dtype: torch.dtype, device: torch.device, chunks: Chunks
) -> int:
    """What it allocates with the pass: a chunk, the sum over chunks, and gradients."""
    chunk = chunks.rows * row_bytes(hidden, vocab, dtype, device)
    return (
        chunk
        + _sum_bytes(tokens, hidden, vocab, dtype, chunks)
        + _gradient_bytes(tokens, hidden, vocab, dtype)
    )


def _sum_bytes(tokens: int, hidden: int, vocab: int, dtype: torch.dtype, chunks: Chunks) -> int:
    """Of the weight's gradient, where it is summed, or waits, in another dtype than it has."""
    if chunks.words is not None:
        return chunks.words * hidden * torch.float32.itemsize
    is_apart = chunks.rows < tokens and dtype.itemsize < torch.float32.itemsize
    is_apart |= held_dtype(dtype) != dtype
    return vocab * hidden * torch.float32.itemsize if is_apart else 0


def _gradient_bytes(tokens: int, hidden: int, vocab: int, dtype: torch.dtype) -> int:
    return (tokens + vocab) * hidden * dtype.itemsize


def _memory(
    tokens: int, hidden: int, vocab: int, dtype: torch.dtype, device: torch.device, chunks: Chunks
) -> Table:
    logits = tokens * vocab * dtype.itemsize
    gradients = _gradient_bytes(tokens, hidden, vocab, dtype)
    chunk = chunks.rows * row_bytes(hidden, vocab, dtype, device)
    before = unfused_bytes(tokens, hidden, vocab, dtype)
    after = fused_bytes(tokens, hidden, vocab, dtype, device, chunks)
    parts = [f"{_size(chunk)} for a chunk of logits"]
    if total := _sum_bytes(tokens, hidden, vocab, dtype, chunks):
        parts.append(f"{_size(total)} for the weight's gradient in float32, as it is summed")
    parts.append(f"{_size(gradients)} for the gradients")
    return [
        (
            "torch.compile",
            f"{_size(before)}: {_size(logits)} of logits, once, and {_size(gradients)} for the "
            "gradients. Uncompiled, two or three times the logits",
        ),
        ("with lmhead_pass", f"{_size(after)}: {', '.join(parts)}"),
        ("saved", _saved(before, after)),
    ]


def _saved(before: int, after: int) -> str:
    if after >= before:
        return "nothing: there are too few tokens"
    return f"{_size(before - after)}, about {100 * (1 - after / before):.0f}%"


def _plan(
    tokens: int, hidden: int, vocab: int, dtype: torch.dtype, device: torch.device, chunks: Chunks
) -> Table:
    of_row = row_bytes(hidden, vocab, dtype, device)
    what = "exponentials of 16 bits" if can_hold_exponentials(device, dtype, hidden) else "logits"
    number = math.ceil(tokens / chunks.rows)
    many = f"{number} chunk{'s' * (number != 1)}"
    planned = [
        ("rows per chunk", f"{chunks.rows}, in {many}: {_why(tokens, chunks.rows)}"),
        ("held of a row", f"{_size(of_row)} of {what}"),
    ]
    if device.type != "cpu" and not getattr(torch, device.type).is_available():
        text = f"none here: planned as for a {device.type} device that is not a Hopper GPU"
        planned.append(("device", text))
    return planned


def _why(tokens: int, rows: int) -> str:
    if config.batch_chunk_size is not None:
        return "lmhead_pass.config.batch_chunk_size"
    if config.memory_budget is not None:
        return f"what lmhead_pass.config.memory_budget ({_size(config.memory_budget)}) holds"
    if rows >= tokens:
        return "all rows fit into what a chunk and a sum over chunks would take"
    return "planned from the sizes, so that products stay long and a chunk stays small"


def _time(tokens: int, hidden: int, vocab: int, chunks: Chunks) -> Table:
    product = 2 * tokens * hidden * vocab
    step = "3 products, as without the pass: logits, and the two gradients"
    if chunks.words is not None:
        step = f"4 products: logits twice, the second time for {chunks.words} words at a time"
    return [
        ("one product", f"{product / 1e12:.3g} TFLOP (2 x {tokens} x {hidden} x {vocab})"),
        ("training step", step),
        ("loss alone", "1 product, as without the pass"),
        ("losses by row", "4 products, if each row's gradient is known in the backward only"),
    ]


def _size(number: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} bytes"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
