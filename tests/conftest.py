"""Every test starts with an empty Dynamo, fresh counters, and a pass that raises its failures."""

import copy
import os
from contextlib import nullcontext

# Read by torch when it is imported, here and in the processes that tests start.
os.environ.update(
    # No graph comes from a cache: on a hit the pass would not be called. Compiled kernels may.
    TORCHINDUCTOR_FX_GRAPH_CACHE="0",
    TORCHINDUCTOR_AUTOGRAD_CACHE="0",
    TORCH_DYNAMO_AUTOMATIC_DYNAMIC_LOCAL_PGO="0",
    # Each core has a process of pytest's already.
    TORCHINDUCTOR_COMPILE_THREADS="1",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")

from . import device  # isort: skip  # noqa: F401  before what imports Triton

import pytest
import torch
import torch._inductor.config as inductor_config

import lmhead_pass
from lmhead_pass.compat import lookup
from lmhead_pass.graph import Refused
from lmhead_pass.op.kernels import aten_loop as aten
from lmhead_pass.rewrite import rewriter

from .inductor import without_codegen


def pytest_addoption(parser):
    parser.addoption(
        "--codegen", action="store_true", help="have Inductor generate code in every test"
    )


@pytest.fixture(autouse=True)
def _codegen(request):
    if request.config.getoption("codegen") or torch.cuda.is_available():
        context = nullcontext()
    elif request.node.get_closest_marker("codegen"):
        # Loops without vectors: their compilation takes half the time.
        context = inductor_config.patch({"cpp.simdlen": 1})
    else:
        context = without_codegen()
    with context:
        yield


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    missing = copy.deepcopy(lookup._missing)
    with lmhead_pass.config.patch(strict=True, min_vocab_size=64):
        yield
    assert missing == lookup._missing  # or the pass may be off for all tests after this one


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def _own_cache_folder(tmp_path_factory):
    """Compiled kernels of this session stay apart from the user's; workers share them."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
        yield


@pytest.fixture
def no_regions(monkeypatch):
    """Nothing is run in chunks that has no fused form: it is left alone, and the reason told."""

    def carve(head, heads):
        raise Refused("")

    monkeypatch.setattr(rewriter, "carve", carve)


@pytest.fixture
def passes(monkeypatch):
    """Which functions of the chunk loop run, one after the other."""
    names = []

    def recorded(name):
        function = getattr(aten, name)

        def run(*arguments):
            names.append(name)
            return function(*arguments)

        return run

    for name in ("forward", "forward_and_gradients", "backward"):
        monkeypatch.setattr(aten, name, recorded(name))
    return names
