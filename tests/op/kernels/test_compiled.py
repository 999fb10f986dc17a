"""What Triton's compiler makes of the kernels for Hopper: what their speed rests on."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PRODUCTS = [
    *("exponentials", "exponentials_bias", "exponentials_transposed", "exponentials_loss_alone"),
    *("weight", "weight_and_sum", "weight_and_sum_in_fp32", "exponentials_fill"),
]
ROWS = ["gradients", "gradients_fill", "logits", "logits_fill", "logits_softcap"]
SHARED_OF_A_MULTIPROCESSOR = 227 << 10


@pytest.fixture(scope="module")
def code():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = [sys.executable, "-m", "tests.op.kernels.compiled"]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", PRODUCTS + ROWS)
def test_nothing_is_spilled(code, name):
    """Triton 3.9, not 3.6, spills 32 of the 128 numbers that a thread holds with a bias, and 44
    with masked words."""
    most = {"exponentials_bias": 128, "exponentials_fill": 176}
    assert code[name]["stack"] <= most.get(name, 0)


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_use_the_tensor_cores_and_fit(code, name):
    instructions = code[name]["instructions"]
    assert any(i.startswith("HGMMA") for i in instructions)
    assert any(i.startswith("UTMALDG") for i in instructions)  # bulk copies to shared memory
    assert code[name]["shared"] <= SHARED_OF_A_MULTIPROCESSOR


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_read_and_written_16_bytes_at_a_time(code, name):
    """For a vocabulary of any size. Narrow accesses are those of the last, masked block."""
    instructions = code[name]["instructions"]
    assert instructions["LDG.E.128"] >= 2
    assert instructions["STG.E.128"] >= 2
    if name == "gradients":
        narrow = [i for i in instructions if i.startswith("STG") and not i.endswith(".128")]
        assert not narrow


@pytest.mark.parametrize("name", ROWS)
def test_several_programs_share_a_multiprocessor(code, name):
    """Of 65,536 registers a program of 256 threads takes at most half."""
    assert code[name]["registers"] <= 128


def test_a_barrier_stands_between_loads_and_stores(code):
    """In place, the gradients of some threads lie where others still have to read logits."""
    for name in ("logits", "logits_softcap"):
        assert any(i.startswith("BAR.SYNC") for i in code[name]["instructions"])


def test_the_softcap_takes_one_reciprocal_for_each_logit(code):
    instructions = code["logits_softcap"]["instructions"]
    each = sum(count for i, count in instructions.items() if i.startswith("MUFU.EX2"))
    without = code["logits"]["instructions"]
    own = sum(count for i, count in without.items() if i.startswith("MUFU.EX2"))
    tanhs = each - own
    assert instructions["MUFU.RCP"] - without["MUFU.RCP"] <= tanhs
