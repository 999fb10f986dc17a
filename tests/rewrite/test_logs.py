"""What users see: log lines, counters and tlparse artifacts."""

import io
import logging
import re

import torch
from torch._dynamo.utils import counters

import lmhead_pass

from ..backend import rewrite
from ..forms import V, flat, inputs
from ..process import run_python

TRAIN = """
    import torch, torch.nn.functional as F
    import lmhead_pass

    def train(hidden, weight, target):
        return F.cross_entropy(hidden @ weight.t(), target)

    def classify(hidden, weight, target):
        logits = hidden @ weight.t()
        return F.cross_entropy(logits, target), logits

    hidden, weight = torch.randn(8, 16), torch.randn(5000, 16, requires_grad=True)
    for function in (train, classify):
        torch.compile(function)(hidden, weight, torch.arange(8))
"""


def log_of(setting):
    done = run_python(
        TRAIN,
        is_fresh=True,  # torch reads this when it is imported
        TORCH_LOGS=setting,
        LMHEAD_PASS_RETURNED_LOGITS="keep",
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_info():
    log = log_of("lmhead_pass")
    assert re.search(
        r"rewritten: cross_entropy at \S+script.py:\d+ `return F.cross.*`: hidden", log
    ), log
    for part in (
        "hidden [8, 16] float32",
        "weight [5000, 16] float32",
        "rows per chunk",
        "0.2 MB of float32 logits avoided",
    ):
        assert part in log
    assert re.search(
        r"left alone: cross_entropy at \S+script.py:\d+ `.*`: the compiled function", log
    ), log
    assert "returns the logits" in log
    assert "before:" not in log


def test_debug_adds_the_graph():
    log = log_of("+lmhead_pass")
    assert "before:" in log
    assert "after:" in log
    assert "torch.ops.lmhead_pass.linear_cross_entropy.default" in log


def test_silent_by_default():
    assert "lmhead_pass" not in log_of(None)


def test_source_line_is_the_users(caplog):
    model = torch.nn.Linear(16, V)
    hidden, _, _, target = inputs()
    with caplog.at_level(logging.INFO, logger="lmhead_pass"):
        rewrite(lambda h, y: flat(model(h), y))(hidden, target)
    (line,) = (r.getMessage() for r in caplog.records if r.name == "lmhead_pass")
    assert "forms.py" in line
    assert (
        "`return loss(logits.reshape(-1, logits.size(-1)), target.reshape(-1), **options)`" in line
    )


def test_artifacts(monkeypatch):
    artifacts = {}

    monkeypatch.setattr("lmhead_pass.rewrite.report.keep_artifact", artifacts.__setitem__)
    hidden, weight, _, target = inputs()
    rewrite(lambda h, w, y: flat(h @ w.t(), y))(hidden, weight, target)
    assert "cross_entropy" in artifacts["lmhead_pass_before"]
    assert "linear_cross_entropy" in artifacts["lmhead_pass_after"]


def test_counters():
    hidden, weight, _, target = inputs()

    def function(h, w, y):
        kept = h @ w.t()
        return flat(h @ w.t(), y) + flat(h @ w.t(), y) + flat(kept, y), kept

    with lmhead_pass.config.patch(returned_logits="keep"):
        rewrite(function)(hidden, weight, target)
    assert counters["lmhead_pass"] == {"rewritten": 2, "refused": 1}


ONCE = """
    import logging, torch, torch.nn.functional as F
    import lmhead_pass
    logging.basicConfig(level=logging.WARNING)
    torch.compile(lambda h, w, y: F.cross_entropy(h @ w.t(), y), fullgraph=True)(
        torch.randn(8, 16), torch.randn(5000, 16), torch.arange(8)
    )
"""


def test_each_line_appears_once_beside_basic_config():
    """Torch's handler for TORCH_LOGS and that of the root logger write to the same stream."""
    done = run_python(ONCE, is_fresh=True, TORCH_LOGS="lmhead_pass")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("rewritten: cross_entropy") == 1


def test_handlers_of_other_streams_have_each_line_too(caplog):
    hidden, weight, _, target = inputs()
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    log = logging.getLogger("lmhead_pass")
    log.addHandler(handler)
    try:
        with caplog.at_level(logging.INFO, logger="lmhead_pass"):
            rewrite(lambda h, w, y: flat(h @ w.t(), y))(hidden, weight, target)
    finally:
        log.removeHandler(handler)
    assert stream.getvalue().count("rewritten: cross_entropy") == 1
    assert caplog.text.count("rewritten: cross_entropy") == 1
