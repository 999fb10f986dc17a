"""The library's products: sizes that are no multiple of 8 are cut."""

import pytest
import torch

from lmhead_pass.op.kernels import wide_products


def _padded(rows, columns, dtype=torch.float32):
    return torch.full((rows, 2 * columns // 16 * 16 + 16), float("nan"), dtype=dtype)[:, :columns]


@pytest.fixture
def sizes(monkeypatch):
    """Of the products that are made."""
    made, multiply = [], wide_products._multiply

    def recorded(out, a, b, add):
        made.append((*a.shape, b.size(1)))
        multiply(out, a, b, add)

    monkeypatch.setattr(wide_products, "_multiply", recorded)
    return made


@pytest.mark.parametrize(
    ("dtype", "add"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]
)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("m", [16, 21])
@pytest.mark.parametrize("k", [24, 27, 5])
@pytest.mark.parametrize("n", [32, 33, 3])
def test_parts_make_the_whole(m, k, n, transposed, add, dtype, sizes):
    a = _padded(k, m).t() if transposed else _padded(m, k)
    a.copy_(torch.randn(m, k))
    b, out = _padded(k, n).copy_(torch.randn(k, n)), _padded(m, n, dtype)
    if add:
        out.copy_(torch.randn(m, n))
    exact = a.double() @ b.double() + (out.double() if add else 0)
    wide_products._multiply_in_parts(out, a, b, add)
    # A sum of at most 28 terms in FP32, rounded once.
    tolerance = max(28 * 2**-24, torch.finfo(dtype).eps) * exact.abs().max().item()
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=tolerance)

    def fits(size):
        return size % 8 == 0 or size < 8

    assert all(fits(k) and fits(n) and (fits(m) or not transposed) for m, k, n in sizes)


@pytest.mark.parametrize("matrix", ["out", "a", "b"])
def test_rows_that_start_anywhere_are_not_cut(matrix, sizes, monkeypatch):
    monkeypatch.setattr(wide_products, "_widens", lambda device: True)
    given = {
        "out": _padded(16, 24, torch.bfloat16),
        "a": _padded(16, 27, torch.bfloat16),
        "b": _padded(27, 24, torch.bfloat16),
    }
    rows, columns = given[matrix].shape
    given[matrix] = torch.zeros(rows, 29, dtype=torch.bfloat16)[:, :columns]
    wide_products.multiply_into(given["out"], given["a"], given["b"])
    assert sizes == [(16, 27, 24)]
