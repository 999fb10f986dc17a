"""Reading returned logits gives what the model returns."""

import copy
import io
import itertools
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .model import (
    VOCAB,
    assert_same,
    looks,
)


def saved_and_loaded(tensor):
    file = io.BytesIO()
    torch.save({"logits": tensor}, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)["logits"]


def set_item(tensor):
    plain = torch.zeros(4, 5, VOCAB)
    plain[1:3] = tensor
    return plain


def in_place(tensor):
    assert tensor.mul_(2).add_(1) is tensor
    tensor[0, 0] = 7
    tensor -= 1
    return tensor


READS = {
    "add": lambda x: x + 1,
    "radd": lambda x: 1 + x,
    "multiply": lambda x: x * x,
    "argmax": lambda x: x.argmax(-1),
    "max": lambda x: x.max(-1),
    "softmax": lambda x: x.softmax(-1),
    "torch.softmax": lambda x: torch.softmax(x, dim=-1),
    "F.log_softmax": lambda x: F.log_softmax(x, -1),
    "mask": lambda x: x[torch.tensor([True, False])],
    "gather": lambda x: x.gather(-1, torch.zeros(2, 5, 1, dtype=torch.int64)),
    "compare": lambda x: x > 0,
    "sum": lambda x: x.sum(),
    "item": lambda x: round(x[0, 0, 0].item(), 4),
    "where": lambda x: torch.where(x > 0, x, torch.zeros(())),
    "matmul": lambda x: x @ torch.ones(VOCAB, 3),
    "einsum": lambda x: torch.einsum("abv,v->ab", x, torch.ones(VOCAB)),
    "clone": lambda x: x.clone(),
    "cat": lambda x: torch.cat([x, torch.ones(1, 5, VOCAB)]),
    "stack": lambda x: torch.stack([torch.zeros(2, 5, VOCAB), x, x]),
    "topk": lambda x: x.topk(3),
    "iterate": lambda x: [row.sum() for row in x],
    "split": lambda x: x.split(1),
    "eager function": lambda x: F.layer_norm(x, (VOCAB,)),
    "module": lambda x: nn.ReLU()(x),
    "in place": in_place,
    "cross entropy": lambda x: F.cross_entropy(x.view(-1, VOCAB), torch.arange(10)),
    "new_zeros": lambda x: x.new_zeros(3),
    "zeros_like": lambda x: torch.zeros_like(x),
    "bool": lambda x: bool((x == x).all()),
    "as argument": lambda x: torch.ones(2, 5, VOCAB).add(x),
    "data in place": lambda x: x.data.zero_(),
}
VALUES = {
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "np.asarray": lambda x: np.asarray(x),
    "tolist": lambda x: x.tolist(),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "save and load": saved_and_loaded,
    "equal": lambda x: torch.equal(x, x.clone()),
    "allclose": lambda x: torch.allclose(x, x + 0),
    "out": lambda x: torch.add(torch.ones(2, 5, VOCAB), 1, out=x),
    "copied from": lambda x: torch.empty(2, 5, VOCAB).copy_(x),
    "set item of a plain tensor": set_item,
    "dlpack": lambda x: torch.from_dlpack(x),
    "torch.tensor": lambda x: torch.asarray(x, copy=True),
    "buffer": lambda x: nn.ParameterList([nn.Parameter(x)])[0].detach(),
    "contains": lambda x: 7.0 in x,
    "vmap": lambda x: torch.vmap(lambda row: row.sum())(torch.asarray(x, copy=True)),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_reading_gives_what_the_model_returns(returned, read, mode):
    with mode():
        logits, plain = returned()
        assert_same(read(logits), read(plain))


@pytest.mark.parametrize("read", VALUES.values(), ids=VALUES)
def test_reading_values_without_a_gradient(returned, read):
    with torch.no_grad():
        assert_same(*map(read, returned()))
    logits, plain = returned()
    assert_same(read(logits.detach()), read(plain.detach()))


def test_what_eager_refuses_is_refused(returned):
    logits, plain = returned()
    for refused in (copy.deepcopy, lambda x: x.numpy(), lambda x: x.view(7), lambda x: x.to("?")):
        errors = []
        for tensor in (plain, logits):
            with pytest.raises((RuntimeError, ValueError)) as error:
                refused(tensor)
            errors.append(str(error.value))
        assert errors[0] == errors[1]


def test_printing_reads(returned):
    with torch.no_grad():
        logits, plain = returned()
        assert repr(logits) == str(logits) == f"{logits}" == repr(logits.clone())
        assert f"{logits[0, 0, 0]:.3f}" == f"{plain[0, 0, 0]:.3f}"


def test_read_in_another_mode_than_made(returned):
    with torch.inference_mode():
        logits, plain = returned()
    assert_same(logits + 0, plain + 0)
    logits, plain = returned()
    with torch.inference_mode():
        assert_same(logits.argmax(-1), plain.argmax(-1))
    assert (logits * 2).requires_grad
    logits, plain = returned()
    for made, read in itertools.permutations((torch.enable_grad, torch.no_grad)):
        with made():
            derived, expected = logits.double(), plain.double()
        with read():
            assert_same(derived.argmax(-1), expected.argmax(-1))
        assert_same(derived + 0, expected + 0)
        logits, plain = returned()
    with FakeTensorMode(allow_non_fake_inputs=True):
        logits.argmax(-1)
    assert_same(logits + 0, plain + 0)
    logits, plain = returned()
    with torch.inference_mode(), torch.enable_grad():
        logits, plain = logits.double(), plain.double()
    assert looks(logits) == looks(plain)
    assert_same(logits + 0, plain + 0)
    logits, plain = returned()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits.argmax(-1), plain.argmax(-1))
    assert_same(logits + 0, plain + 0)


def test_code_that_takes_the_address_of_the_values_gets_an_error(returned):
    """Of unread logits, in C++, past what a tensor subclass sees."""
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        torch.utils.dlpack.to_dlpack(returned()[0].detach())


TRANSFORMS = {
    "grad": lambda x: torch.func.grad(lambda scale: (scale * x).sum())(torch.ones(VOCAB)),
    "vmap": lambda x: torch.vmap(lambda row: row * x)(torch.ones(3, VOCAB)),
    "jvp": lambda x: torch.func.jvp(torch.sin, (x,), (torch.ones(2, 5, VOCAB),))[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_read_in_a_transform(returned, transform):
    logits, plain = returned()
    torch.testing.assert_close(transform(logits.detach()), transform(plain.detach()))
    assert_same(logits + 0, plain + 0)
    logits, plain = returned()
    torch.testing.assert_close(transform(logits), transform(plain))
    assert_same(logits + 0, plain + 0)
