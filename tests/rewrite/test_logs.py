"""What users see: log lines, counters and tlparse artifacts."""

import io
import logging
import re

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import lmhead_pass
from lmhead_pass.rewrite.report import log

from ..backend import rewrite
from ..forms import V, flat, inputs
from ..process import run_python

TRAIN = """
    import torch, torch.nn.functional as F
    import lmhead_pass
    from tests.inductor import without_codegen

    def train(hidden, weight, target):
        return F.cross_entropy(hidden @ weight.t(), target)

    def classify(hidden, weight, target):
        logits = hidden @ weight.t()
        return F.cross_entropy(logits, target), logits

    hidden, weight = torch.randn(512, 16), torch.randn(5000, 16, requires_grad=True)
    with without_codegen():
        for function in (train, classify):
            torch.compile(function)(hidden, weight, torch.arange(512))
"""


def log_of(setting):
    done = run_python(
        TRAIN,
        is_fresh=setting is not None,  # torch reads this when it is imported
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
        "hidden [512, 16] float32",
        "weight [5000, 16] float32",
        "128 rows per chunk",
        "7.7 MB of float32 logits avoided",
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


def lines_of(function, *tensors):
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "info", lambda form, *values: lines.append(form % values))
        rewrite(function)(*tensors)
    return lines


def test_a_line_says_what_the_call_is():
    hidden, weight, _, target = inputs()

    def pieces(h, w, y):
        return [flat(F.linear(row, w), t) for row, t in zip(h, y, strict=True)]

    def chosen(h, w, y):
        return -F.linear(h, w).log_softmax(-1).gather(-1, y[..., None]).sum()

    for function, count, how in (
        (lambda *given: sum(pieces(*given)), 3, "reduction mean, in one call with others; "),
        (
            lambda *given: torch.stack(pieces(*given)).amax(),
            3,
            "reduction mean, in one call with others, logits computed again in the backward; ",
        ),
        (chosen, 1, "reduction a weighted sum; "),
    ):
        lines = lines_of(function, hidden, weight, target)
        assert len(lines) == count
        assert all(how in line for line in lines), lines


def test_what_is_avoided_is_all_but_a_chunk():
    weight = torch.randn(V, 16, requires_grad=True)
    for tokens, avoided in ((1000, "0.3 MB of float32 logits avoided"), (100, "no logits avoided")):
        torch._dynamo.reset()  # else the number of tokens is dynamic
        hidden, target = torch.randn(tokens, 16), torch.randint(V, (tokens,))
        (line,) = lines_of(lambda h, w, y: F.cross_entropy(h @ w.t(), y), hidden, weight, target)
        assert avoided in line
