"""Triton's fingerprint is the number that ATen's is, for every shape and dtype."""

import pytest
import torch

from ...device import DEVICE, SUITE

pytest.importorskip("triton")

from lmhead_pass.op import fingerprint, fingerprints  # isort: skip
from lmhead_pass.op.kernels.triton_fingerprint import fingerprint_of  # isort: skip

# The interpreter computes with numpy, which warns of what the device does in silence.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), *SUITE]

SHAPES = [(1, 1), (5, 8), (7, 3), (8, 256), (9, 513), (3, 2050), (40, 12), (4, 3, 2), (6,), ()]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e5m2], ids=str
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_atens(shape, dtype):
    tensor = torch.randn(shape).to(dtype)
    bits = fingerprints.as_integers(tensor)
    assert fingerprint_of(bits.to(DEVICE)).item() == fingerprint([tensor]).item()


def test_of_nothing():
    bits = torch.empty(0, 4, dtype=torch.int64)
    assert fingerprint_of(bits.to(DEVICE)).item() == fingerprint([bits]).item() == 0


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
def test_a_gpu_runs_it_and_holds_little():
    weight = torch.randn(32000, 512, dtype=torch.bfloat16, device=DEVICE)
    expected = fingerprint([weight.cpu()]).item()
    torch.accelerator.reset_peak_memory_stats()
    before = torch.accelerator.memory_allocated()
    assert fingerprint([weight]).item() == expected
    assert torch.accelerator.max_memory_allocated() - before < weight.nbytes / 100
