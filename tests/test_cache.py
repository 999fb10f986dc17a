"""Inductor's caches: a second process runs the rewritten graph, and the key misses nothing."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

import lmhead_pass
from lmhead_pass import log
from lmhead_pass.graph_pass import _hash_of_package, the_pass

from .process import output_of

TRAIN = """
    import json, logging
    import torch, torch.nn.functional as F
    import lmhead_pass
    import torch._inductor.config as inductor_config
    from torch._dynamo.utils import counters
    from torch.profiler import profile

    inductor_config.cpp.simdlen = 1  # quick to compile
    lines = []
    log = logging.getLogger("lmhead_pass")
    log.addFilter(lambda record: lines.append(record.getMessage()))
    log.setLevel(logging.INFO)

    @torch.compile
    def train(hidden, weight, target):
        kept = hidden @ weight.t()
        return F.cross_entropy(hidden @ weight.t(), target) + F.cross_entropy(kept, target).cos(
        ) * kept.std(), kept.sum()

    @torch.compile(dynamic=True)
    def head(hidden, weight):
        return torch.tanh(hidden) @ weight.t()

    torch.manual_seed(0)
    weight = torch.randn(5000, 16, requires_grad=True)
    with profile() as profiler:
        for function, *inputs in ((train, torch.arange(8)), (head,)):
            for _ in range(2):
                result = function(torch.ones(8, 16), weight, *inputs)
        loss, _ = train(torch.ones(8, 16), weight, torch.arange(8))
        loss.backward()
    kept = torch.ones(8, 16) @ weight.t()
    exact = F.cross_entropy(kept, torch.arange(8))
    torch.testing.assert_close(loss, exact + exact.cos() * kept.std())
    aot, fx = counters["aot_autograd"], counters["inductor"]
    print(json.dumps({
        "ran": any("lmhead_pass::" in event.key for event in profiler.key_averages()),
        "counted": counters["lmhead_pass"],
        "hits": aot["autograd_cache_hit"],
        "bypassed": fx["fxgraph_cache_bypass"] + aot["autograd_cache_bypass"],
        "lines": lines,
    }))
"""
COUNTED = {"rewritten": 1, "refused": 1, "deferred": 1}
FROM_CACHE = "" if torch.__version__ < "2.13" else " (from a cache)"


def test_second_process_hits_and_runs_the_rewritten_graph(tmp_path):
    """And its log and counters say what those of the first one said."""

    def run(code=TRAIN, **environment):
        environment |= {
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "0",
            "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
            "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
        }
        return json.loads(output_of(code, **environment))

    first = run()
    assert {**first, "lines": len(first["lines"])} == {
        **{"ran": True, "counted": COUNTED, "hits": 0, "bypassed": 0},
        "lines": 3,
    }
    second = run()
    from_cache = [line for line in second["lines"] if line.startswith("from a cache: graph ")]
    second["lines"] = [line for line in second["lines"] if line not in from_cache]
    assert [line[:23] for line in from_cache] == [
        f"from a cache: graph {number}/0" for number in range(2 * bool(FROM_CACHE))
    ]
    assert {**second, "lines": len(second["lines"])} == {
        **{"ran": True, "counted": COUNTED, "hits": 2, "bypassed": 0},
        "lines": 3,
    }
    told = [re.sub(r"\S+script.py", "script.py", line) for line in first["lines"]]
    again = [re.sub(r"\S+script.py", "script.py", line) for line in second["lines"]]
    assert again == [f"{line}{FROM_CACHE}" for line in told]
    # With other settings, and without the pass, it is another graph.
    other = run(LMHEAD_PASS_BATCH_CHUNK_SIZE="3")
    # To torch 2.11, whose keys are made of the rewritten graph, deferred logits are the same one.
    assert (other["ran"], other["hits"]) == (True, 0 if FROM_CACHE else 1)
    without = run(TRAIN.replace("import lmhead_pass", ""))
    assert (without["ran"], without["hits"], without["counted"]) == (False, 0, {})


def test_what_is_noted_is_told_once_and_as_it_was(caplog):
    line = """rewritten: f at C:\\train.py:3 `f(x, "sum", 'ü')`: 50 %"""
    with caplog.at_level(logging.INFO, logger="lmhead_pass"):
        note = log.note_of([line, "left alone: why"])
        log.tell_from_cache(note)  # this process has told it when it compiled
        assert caplog.messages == []
        log._told.remove(note)
        for _ in range(2):
            log.tell_from_cache(note)
    assert caplog.messages == [f"{line} (from a cache)", "left alone: why (from a cache)"]
    assert counters["lmhead_pass"] == {"rewritten": 1, "refused": 1}
    # As it is in code that Inductor generates, in Python or C++.
    assert re.fullmatch(r"[ -~]*", note) and not re.search(r"""["'\\]""", note)


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
