"""A torch that is newer than those tested with is warned of once, and used."""

import warnings

import pytest
import torch

from lmhead_pass import compat

from ..process import run_python

TRAIN = """
    import torch, torch.nn.functional as F
    torch.__version__ = torch.torch_version.TorchVersion("2.16.0.dev20270101+cpu")
    import lmhead_pass
    import lmhead_pass.config
    from tests.inductor import without_codegen
    from torch._dynamo.utils import counters

    def function(hidden, weight):
        return F.cross_entropy(hidden @ weight.t(), torch.arange(8))

    inputs = torch.randn(8, 16), torch.randn(5000, 16, requires_grad=True)
    with without_codegen():
        gradient, = torch.autograd.grad(torch.compile(function)(*inputs), inputs[1])
    expected, = torch.autograd.grad(function(*inputs), inputs[1])
    torch.testing.assert_close(gradient, expected)
    print(counters["lmhead_pass"]["rewritten"])
"""


def test_a_newer_version_is_warned_of_and_used():
    done = run_python(TRAIN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1"
    assert done.stderr.count("lmhead_pass was tested with torch 2.11 to 2.15") == 1
    assert "this is 2.16.0.dev20270101+cpu" in done.stderr
    assert "script.py:4: UserWarning" in done.stderr  # the line that imports


@pytest.mark.parametrize("version", ["2.16.0", "2.16.0a0+git1234567", "2.100.1", "3.0.0"])
def test_newer(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.warns(UserWarning, match="this is"):
        compat.warn_of_unknown_version()


@pytest.mark.parametrize("version", ["2.11.0", "2.13.1+cpu", "2.15.9", torch.__version__])
def test_known(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.warn_of_unknown_version()
