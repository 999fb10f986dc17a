"""What Triton's compiler makes of the kernels, for Hopper and CDNA3: what their speed rests on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

PRODUCTS = [
    *("exponentials", "exponentials_bias", "exponentials_transposed", "exponentials_loss_alone"),
    *("weight", "weight_and_sum", "weight_and_sum_in_fp32", "exponentials_fill"),
]
OF_EXPONENTIALS = ["gradients", "gradients_fill"]
SMALL = ["exponential_losses", "target_logits"]
PLAIN = ["logits", "logits_fill", "logits_softcap", "logits_algebraic"]
ROWS = [*PLAIN, "logits_all", "logits_losses", "logits_losses_all"]
EVERY = [
    *(("sm_90", name) for name in (*PRODUCTS, *OF_EXPONENTIALS, *SMALL, "fingerprint", *ROWS)),
    *(("gfx942", name) for name in ("fingerprint", *ROWS)),
]
SHARED_OF_A_MULTIPROCESSOR = 227 << 10
# What reads or writes memory, a barrier, and of these what moves 16 bytes in each thread.
LOADS = {"sm_90": "LDG", "gfx942": "global_load"}
STORES = {"sm_90": "STG", "gfx942": "global_store"}
BARRIER = {"sm_90": "BAR.SYNC", "gfx942": "s_barrier"}
WIDE = {"sm_90": ".128", "gfx942": "dwordx4"}
RECORDED = json.loads(Path(__file__).with_name("compiled.json").read_text())


@pytest.fixture(scope="module")
def code():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = [sys.executable, "-m", "tests.op.kernels.compiled"]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_every_variant_is_looked_at(code):
    assert [(chip, name) for chip in code for name in code[chip]] == sorted(
        EVERY, key=lambda one: ([*code].index(one[0]), [*code[one[0]]].index(one[1]))
    )


@pytest.mark.parametrize(("chip", "name"), EVERY)
def test_nothing_is_spilled(code, chip, name):
    """Triton 3.9, not 3.6, spills 32 of the 128 numbers that a thread holds with a bias, and 44
    with masked words; 3.6, not 3.9, spills 2 of the rows' with a cap."""
    if triton.__version__ < "3.7":
        most = {"logits_softcap": 8, "logits_algebraic": 8}
    else:
        most = {"exponentials_bias": 128, "exponentials_fill": 176}
    assert code[chip][name]["spilled"] <= most.get(name, 0)


@pytest.mark.skipif(triton.__version__ not in RECORDED, reason="not recorded for this Triton")
@pytest.mark.parametrize(("chip", "name"), EVERY)
def test_registers_and_instructions_are_those_recorded(code, chip, name):
    """If a change is meant: ``python -m tests.op.kernels.compiled --record``."""
    found, expected = code[chip][name], RECORDED[triton.__version__][chip][name]
    assert found["registers"] == expected["registers"]
    lengths = [len(loop) for loop in found["loops"]] or [sum(found["instructions"].values())]
    assert lengths == [pytest.approx(length, rel=0.2, abs=2) for length in expected["loops"]]


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_use_the_tensor_cores_and_fit(code, name):
    instructions = code["sm_90"][name]["instructions"]
    assert any(i.startswith("HGMMA") for i in instructions)
    assert any(i.startswith("UTMALDG") for i in instructions)  # bulk copies to shared memory
    assert code["sm_90"][name]["shared"] <= SHARED_OF_A_MULTIPROCESSOR


@pytest.mark.parametrize("name", OF_EXPONENTIALS)
def test_exponentials_are_read_and_written_16_bytes_at_a_time(code, name):
    instructions = code["sm_90"][name]["instructions"]
    assert instructions["LDG.E.128"] >= 2
    assert instructions["STG.E.128"] >= 2
    assert not [i for i in instructions if i.startswith("STG") and not i.endswith(".128")]


def _moving(code, chip, name):
    """The loops of a kernel that read or write memory."""
    kinds = (LOADS[chip], STORES[chip])
    loops = code[chip][name]["loops"]
    return [loop for loop in loops if any(i.startswith(kinds) for i in loop)]


@pytest.mark.parametrize(("chip", "name"), [(c, n) for c in LOADS for n in (*PLAIN, ROWS[5])])
def test_rows_are_read_and_written_16_bytes_at_a_time(code, chip, name):
    """For a vocabulary of any size, 50257 say. Narrow is what is done to the last, masked block."""
    if chip == "gfx942" and triton.__version__ < "3.7":
        pytest.skip("Triton 3.6 writes 2 bytes at a time there")
    loops = _moving(code, chip, name)
    assert len(loops) >= 1
    for loop in loops:
        moved = [i for i in loop if i.startswith((LOADS[chip], STORES[chip]))]
        assert all(WIDE[chip] in i for i in moved), moved


@pytest.mark.parametrize(("chip", "name"), [(c, n) for c in LOADS for n in PLAIN])
def test_a_barrier_stands_between_loads_and_stores(code, chip, name):
    """In place, the gradients of some threads lie where others still have to read logits."""

    def places(loop, kind):
        return [place for place, i in enumerate(loop) if i.startswith(kind[chip])]

    loops = [
        loop for loop in _moving(code, chip, name) if places(loop, LOADS) and places(loop, STORES)
    ]
    assert loops
    for loop in loops:
        wide = [place for place in places(loop, LOADS) if WIDE[chip] in loop[place]]
        first_store = places(loop, STORES)[0]
        assert any(wide[-1] < barrier < first_store for barrier in places(loop, BARRIER))


@pytest.mark.parametrize("chip", LOADS)
def test_a_fingerprint_reads_16_bytes_at_a_time_and_waits_for_no_thread(code, chip):
    """Hopper could start three times as many instructions in the time that its memory takes."""
    (loop,) = _moving(code, chip, "fingerprint")
    loads = [i for i in loop if i.startswith(LOADS[chip])]
    assert all(WIDE[chip] in i for i in loads)
    assert not [i for i in loop if i.startswith((BARRIER[chip], STORES[chip]))]
    if chip == "sm_90":
        threads_per_second, bytes_per_second = 132 * 128 * 1.8e9, 4.3e12
        per_byte = len(loop) / (16 * len(loads))
        assert per_byte * bytes_per_second < threads_per_second / 3


@pytest.mark.parametrize("name", [*OF_EXPONENTIALS, *ROWS])
def test_several_programs_share_a_multiprocessor(code, name):
    """Of 65,536 registers a program of 256 threads takes at most half."""
    assert code["sm_90"][name]["registers"] <= 128


def test_the_softcap_takes_one_reciprocal_for_each_logit(code):
    instructions = code["sm_90"]["logits_softcap"]["instructions"]
    each = sum(count for i, count in instructions.items() if i.startswith("MUFU.EX2"))
    without = code["sm_90"]["logits"]["instructions"]
    own = sum(count for i, count in without.items() if i.startswith("MUFU.EX2"))
    tanhs = each - own
    assert instructions["MUFU.RCP"] - without["MUFU.RCP"] <= tanhs
