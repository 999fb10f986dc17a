"""A number for each tensor that shows every change of its contents."""

import itertools

import pytest
import torch

from lmhead_pass.op import fingerprint, fingerprints


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7,), (5, 8), (5, 3), (4, 3, 2), ()])
def test_a_fingerprint_shows_the_change_of_any_one_element(dtype, shape):
    tensor = torch.randn(shape).to(dtype)
    before = fingerprint([tensor])
    assert torch.equal(fingerprint([tensor.clone()]), before)
    for index in itertools.product(*map(range, shape)):
        for change in (0.0, float("nan"), 1.01 * tensor[index], -tensor[index]):
            changed = tensor.clone()
            changed[index] = change
            if not torch.equal(changed, tensor):
                assert not torch.equal(fingerprint([changed]), before), (index, change)


def test_a_fingerprint_sees_values_not_their_layout():
    matrix = torch.randn(6, 8)
    assert torch.equal(fingerprint([matrix.t()]), fingerprint([matrix.clone().t()]))
    assert not torch.equal(fingerprint([matrix]), fingerprint([matrix.flip(0)]))
    assert not torch.equal(fingerprint([matrix]), fingerprint([matrix.flip(1)]))
    in_rows = matrix[:, [2, 3, 0, 1, 4, 5, 6, 7]]  # two by two, as they are summed
    assert not torch.equal(fingerprint([matrix]), fingerprint([in_rows]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_fingerprint_sees_signs_that_change_in_pairs(dtype):
    matrix = torch.randn(6, 8).to(dtype)
    before = fingerprint([matrix])
    for pair in itertools.combinations(range(8), 2):
        changed = matrix.clone()
        changed[2, list(pair)] *= -1
        assert not torch.equal(fingerprint([changed]), before), pair
    assert not torch.equal(fingerprint([-matrix]), before)


@pytest.mark.codegen
@pytest.mark.parametrize("columns", [16, 17])
@pytest.mark.parametrize("compiled", [False, True])
def test_it_is_the_same_number_in_blocks(compiled, columns, monkeypatch):
    matrix = torch.randn(300, columns)
    whole = fingerprint([matrix])
    monkeypatch.setattr(fingerprints, "_BLOCK", 100)
    monkeypatch.setattr(fingerprints, "_COMPILED_BLOCK", 600)
    monkeypatch.setattr(fingerprints, "_WORTH_COMPILING", 1 if compiled else 1 << 40)
    made = []
    run = fingerprints.run_compiled
    monkeypatch.setattr(fingerprints, "run_compiled", lambda *what: made.append(1) or run(*what))
    assert torch.equal(fingerprint([matrix]), whole)
    assert bool(made) == compiled
