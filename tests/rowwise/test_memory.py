"""Memory of losses without a fused form, in bytes."""

import pytest
import torch

import lmhead_pass
from benchmarks.memory import peak_bytes
from lmhead_pass.op.kernels import row_loop

from ..backend import rewrite
from .losses import confident, entropy_bonus, focal, given_teacher, jensen_shannon

N, H, V = 1024, 16, 4096


@pytest.mark.parametrize(
    "function", [given_teacher, jensen_shannon, focal, confident, entropy_bonus]
)
def test_a_quarter_of_the_logits_beyond_gradients(function, monkeypatch):
    """As at 4096 x 32000, where a block is 3 % of a chunk, and a chunk 9 % of the rows."""
    monkeypatch.setitem(row_loop._BLOCK_BYTES, "cpu", V * 4 * 8)
    h, w, h2, w2 = (torch.randn(*size, H) for size in ((1, N), (V,), (1, N), (V,)))
    trained = (h, w, h2, w2) if function is jensen_shannon else (h, w)
    for tensor in trained:
        tensor.requires_grad_()
    y = torch.randint(V, (1, N))
    z = torch.randn(1, N, V) if function is given_teacher else torch.zeros(1)
    step = rewrite(function)

    def run():
        for tensor in trained:
            tensor.grad = None
        step(h, w, y, h2, w2, z).backward()

    with lmhead_pass.config.patch(batch_chunk_size=96 // (len(trained) // 2)):
        run()
        for tensor in trained:
            tensor.grad = None
        peak = peak_bytes(run)
    of_gradients = sum(4 * tensor.numel() for tensor in trained)
    assert peak - of_gradients <= N * V * 4 / 4
