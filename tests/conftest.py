"""Every test starts with an empty Dynamo, fresh counters, and a pass that raises its failures."""

import pytest
import torch

import lmhead_pass


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    with lmhead_pass.config.patch(strict=True, min_vocab_size=64):
        yield


@pytest.fixture(autouse=True, scope="session")
def _own_caches(tmp_path_factory):
    """Inductor's caches for this session only: on a hit in them the pass would not be called."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        patch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
        yield
