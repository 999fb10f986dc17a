"""``python -m lmhead_pass estimate``: it says what a step takes, by the plan that the op has."""

import pytest
import torch

import lmhead_pass
from benchmarks.memory import peak_bytes
from lmhead_pass.__main__ import main
from lmhead_pass.command_line import estimate, tables
from lmhead_pass.command_line.estimate import fused_bytes
from lmhead_pass.op import plan_chunks

from ..op.cases import op

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ISSUE = (32768, 8192, 128000, torch.bfloat16)


def rows_of(shown):
    return {name: text for table in shown.values() for name, text in table}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_held_is_what_a_step_allocates(dtype):
    tokens, size, vocab = 600, 64, 16384
    hidden = torch.randn(tokens, size).to(dtype).requires_grad_()
    weight = torch.randn(vocab, size).to(dtype).requires_grad_()
    target = torch.randint(vocab, (tokens,))
    chunks = plan_chunks(size, vocab, dtype, CPU, tokens=tokens, gradient_dtype=dtype)
    rows = chunks.rows
    options = (None, None, None, None, None, "mean", -100, 0.0, 1.0, None, "tanh", dtype, rows)
    counted = peak_bytes(lambda: op(hidden, weight, None, target, *options).backward())
    told = fused_bytes(tokens, size, vocab, dtype, CPU, chunks)
    assert told <= counted <= 1.1 * told
    shown = rows_of(estimate(tokens, size, vocab, dtype, CPU))
    assert shown["rows per chunk"].startswith(f"{rows}, in 4 chunks: planned")


def test_the_sizes_of_the_issue():
    """As measured on an H200 without the pass: 11.0 GB, with ``docs/gpu.md``."""
    shown = rows_of(estimate(*ISSUE, CUDA))
    assert shown["torch.compile"].startswith("11 GB: 8.39 GB of logits, once, and 2.63 GB for ")
    assert shown["one product"].startswith("68.7 TFLOP")
    assert shown["training step"].startswith("3 products, as without the pass")
    if not torch.cuda.is_available():
        assert shown["with lmhead_pass"].startswith("8.27 GB: 1.44 GB for a chunk of logits, 4.19 ")
        assert shown["saved"] == "2.75 GB, about 25%"
        assert shown["device"].startswith("none here: planned as for a cuda device")


@pytest.mark.parametrize(
    ("settings", "name", "text"),
    [
        ({"batch_chunk_size": 77}, "rows per chunk", "77, in 54 chunks: lmhead_pass.config.batch_"),
        ({"memory_budget": 12800000}, "rows per chunk", "100, in 41 chunks: what lmhead_pass.conf"),
        ({"min_vocab_size": 40000}, "left alone", "32000 words are fewer than lmhead_pass.config."),
    ],
)
def test_settings_are_those_of_config(settings, name, text):
    with lmhead_pass.config.patch(settings):
        shown = rows_of(estimate(4096, 512, 32000, torch.float32, CPU))
    assert shown[name].startswith(text)


def test_few_tokens():
    shown = rows_of(estimate(64, 512, 32000, torch.float32, CPU))
    assert shown["rows per chunk"].startswith("64, in 1 chunk: all rows fit")
    assert shown["saved"] == "nothing: there are too few tokens"


def test_a_budget_below_the_sum():
    with lmhead_pass.config.patch(memory_budget=2_000_000_000):
        shown = rows_of(estimate(*ISSUE, CUDA))
    assert shown["training step"].startswith("4 products: logits twice, the second time for ")


def test_a_budget_that_is_too_small():
    arguments = "estimate --tokens 4096 --hidden 512 --vocab 32000 --dtype bf16"
    with (
        lmhead_pass.config.patch(memory_budget=1000),
        pytest.raises(SystemExit, match=r"lmhead_pass.config.memory_budget is 1,000 bytes; .* at "),
    ):
        main(arguments.split())


@pytest.mark.parametrize("has_rich", [False, True])
def test_the_command(has_rich, capsys, monkeypatch):
    if not has_rich:
        monkeypatch.setattr(tables.importlib.util, "find_spec", lambda name: None)
    main(["estimate", "--tokens", "4096", "--hidden", "512", "--vocab", "32000", "--dtype", "fp32"])
    printed = capsys.readouterr().out
    assert "598 MB: 524 MB of logits, once, and 73.9 MB" in printed
    assert "[4096, 512] x [32000, 512], float32, on cpu" in printed
    assert max(map(len, printed.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("estimate --tokens 0 --hidden 1 --vocab 1 --dtype fp32", "argument --tokens: invalid"),
        ("estimate --tokens 1 --hidden 1 --vocab 1 --dtype int8", "argument --dtype: invalid"),
        ("estimate --tokens 1", "the following arguments are required: --hidden, --vocab, --dtype"),
        ("", "the following arguments are required: command"),
    ],
)
def test_bad_arguments_are_named(arguments, why, capsys):
    with pytest.raises(SystemExit):
        main(arguments.split())
    assert why in capsys.readouterr().err
