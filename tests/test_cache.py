"""Inductor's caches: a second process runs the rewritten graph, and the key misses nothing."""

import shutil
from pathlib import Path

import pytest
import torch

import lmhead_pass
from lmhead_pass.graph_pass import _hash_of_package, the_pass

from .process import output_of

TRAIN = """
    import torch, torch.nn.functional as F
    import lmhead_pass
    from torch._dynamo.utils import counters
    from torch.profiler import profile

    @torch.compile
    def train(hidden, weight, target):
        return F.cross_entropy(hidden @ weight.t(), target)

    torch.manual_seed(0)
    hidden, weight = torch.randn(8, 16), torch.randn(5000, 16, requires_grad=True)
    with profile() as profiler:
        loss = train(hidden, weight, torch.arange(8))
        loss.backward()
    ran = any("lmhead_pass::" in event.key for event in profiler.key_averages())
    exact = F.cross_entropy(hidden @ weight.t(), torch.arange(8))
    torch.testing.assert_close(loss, exact)
    aot, fx = counters["aot_autograd"], counters["inductor"]
    print(ran, counters["lmhead_pass"]["rewritten"], aot["autograd_cache_hit"],
          fx["fxgraph_cache_bypass"] + aot["autograd_cache_bypass"])
"""


def test_second_process_hits_and_runs_the_rewritten_graph(tmp_path):
    caches = {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "0",
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
    }
    assert output_of(TRAIN, **caches) == "True 1 0 0"
    ran, _, hits, bypassed = output_of(TRAIN, **caches).split()
    assert (ran, hits, bypassed) == ("True", "1", "0")
    # With other settings, and without the pass, it is another graph.
    ran, *_, hits, _ = output_of(TRAIN, LMHEAD_PASS_BATCH_CHUNK_SIZE="3", **caches).split()
    assert (ran, hits) == ("True", "0")
    without = TRAIN.replace("import lmhead_pass", "")
    ran, *_, hits, _ = output_of(without, **caches).split()
    assert (ran, hits) == ("False", "0")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_vocab_size", 5),
        ("batch_chunk_size", 5),
        ("memory_budget", 5),
        ("returned_logits", "keep"),
        ("strict", False),
    ],
)
def test_key_moves_with_every_setting(name, value):
    assert set(lmhead_pass.config.get_config_copy()) == {
        "min_vocab_size",
        "batch_chunk_size",
        "memory_budget",
        "returned_logits",
        "strict",
    }
    before = the_pass().uuid()
    with lmhead_pass.config.patch({name: value}):
        assert the_pass().uuid() != before
    assert the_pass().uuid() == before


def test_key_moves_with_every_file(tmp_path, monkeypatch):
    package = Path(lmhead_pass.__file__).parent
    copy = shutil.copytree(package, tmp_path / "package")
    monkeypatch.setattr("lmhead_pass.graph_pass.__file__", str(copy / "graph_pass.py"))
    original = _hash_of_package.__wrapped__()
    files = sorted(copy.rglob("*.py"))
    assert len(files) > 10
    for file in files:
        text = file.read_text()
        file.write_text(text + "# changed\n")
        assert _hash_of_package.__wrapped__() != original, file
        file.write_text(text)
    assert _hash_of_package.__wrapped__() == original == _hash_of_package()


def test_key_moves_with_a_file_that_is_moved(tmp_path, monkeypatch):
    """Same bytes in another folder: what an older layout has cached is not found again."""
    package = Path(lmhead_pass.__file__).parent
    copy = shutil.copytree(package, tmp_path / "package")
    monkeypatch.setattr("lmhead_pass.graph_pass.__file__", str(copy / "graph_pass.py"))
    monkeypatch.setattr("lmhead_pass.graph_pass._hash_of_package", _hash_of_package.__wrapped__)
    original = the_pass().uuid()
    files = sorted(file for file in copy.rglob("*.py") if file.parent != copy)
    assert len(files) > 10
    for file in files:
        for folder in (copy, copy / "elsewhere"):
            folder.mkdir(exist_ok=True)
            moved = folder / f"moved_{file.name}"
            for target in (moved, folder / file.name):
                if not target.exists():
                    file.rename(target)
                    assert the_pass().uuid() != original, target
                    target.rename(file)
    assert the_pass().uuid() == original


def test_key_is_a_constant_of_the_process():
    assert the_pass().uuid() == the_pass().uuid()
    assert torch._inductor.custom_graph_pass.CustomGraphPass in type(the_pass()).__mro__
