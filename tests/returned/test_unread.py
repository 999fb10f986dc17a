"""What is known of returned logits, and derived from them, without reading them."""

from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

from .model import VOCAB, assert_same, is_unread, looks


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_what_is_known_beforehand_is_known_unread(returned, mode):
    with mode():
        logits, plain = returned()
        assert looks(logits) == looks(plain)
    assert is_unread(logits)


def test_whether_they_are_views_is_asked_without_reading(returned):
    """FSDP2 asks it of all that a model returns."""
    logits, _ = returned()
    assert logits._base is None
    assert not logits._is_view()
    assert is_unread(logits)


DERIVED = {
    "view": lambda x: x.view(-1, VOCAB),
    "reshape": lambda x: torch.reshape(x, (-1, VOCAB)),
    "slice": lambda x: x[:, -1],
    "ellipsis": lambda x: x[..., :-1, :],
    "squeeze": lambda x: x[:1].squeeze(0),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "transpose": lambda x: x.transpose(0, 1),
    "T": lambda x: x[0].T,
    "permute": lambda x: torch.permute(x, (2, 0, 1)),
    "flatten": lambda x: x.flatten(0, 1),
    "expand": lambda x: x[:, None].expand(-1, 3, -1, -1),
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "float": lambda x: x.float(),
    "to float64": lambda x: x.to(torch.float64),
    "to with names": lambda x: x.to(device="cpu", dtype=torch.float64, copy=True),
    "bfloat16 and back": lambda x: x.bfloat16().float(),
    "contiguous": lambda x: x.transpose(0, 1).contiguous(),
    "chain": lambda x: x[:, 1:].double().transpose(0, 1)[0].detach(),
    "cpu": lambda x: x.to("cpu"),
}


BY_FORM = {
    "new_zeros": lambda x: x.new_zeros(3),
    "new_full": lambda x: x.new_full((2,), -100.0),
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0]),
    "zeros_like": lambda x: torch.zeros_like(x[0]),
    "full_like": lambda x: torch.full_like(x.double().mT, 0.5),
    "to": lambda x: torch.arange(3).to(x.double()),
    "type_as": lambda x: torch.arange(3).type_as(x),
    "expand_as": lambda x: torch.ones(VOCAB).expand_as(x),
    "view_as": lambda x: torch.ones(x[:1].numel()).view_as(x[:1]),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_what_takes_their_form_alone_leaves_them_unread(returned, mode):
    """Found by generated programs: ``.to(logits)`` of another tensor raised a TypeError."""
    with mode():
        logits, plain = returned()
        for function in BY_FORM.values():
            assert_same(function(logits), function(plain))
    assert is_unread(logits)


def test_a_cast_to_the_form_of_others_stays_unread(returned):
    logits, plain = returned()
    other = torch.ones(1, dtype=torch.float64)
    cast, same = logits.to(other), logits.to(logits)
    assert is_unread(cast) and is_unread(same)
    assert_same(cast + 0, plain.to(other) + 0)


@pytest.mark.parametrize("derive", DERIVED.values(), ids=DERIVED)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_views_and_casts_stay_unread(returned, derive, mode):
    with mode():
        logits, plain = returned()
        logits, plain = derive(logits), derive(plain)
        assert looks(logits) == looks(plain)
        assert is_unread(logits)
        assert_same(logits + 0, plain + 0)


def test_a_view_shares_the_values_of_its_base_and_a_cast_does_not(returned):
    with torch.no_grad():
        logits, _ = returned()
        view, cast, late = logits[0], logits.double(), logits.view(-1)
        cast_of_view = logits[1:].double()
        before = logits.clone()
        view.zero_()
        assert (logits[0] == 0).all() and (late[: view.numel()] == 0).all()
        logits.zero_()
        assert torch.equal(cast, before.double())
        assert torch.equal(cast_of_view, before[1:].double())


def test_what_failed_in_a_reading_is_made_up_for_before_a_write(returned, monkeypatch):
    with torch.no_grad():
        logits, plain = returned()
        cast = logits.double()
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr("lmhead_pass.returned.cells.Call.run", Mock(side_effect=MemoryError))
            logits.argmax()
        logits.zero_()
        torch.testing.assert_close(cast + 0, plain.double())


def test_moving_to_another_device_reads(returned):
    for move in (lambda x: x.to("meta"), lambda x: x.to(torch.zeros(1, device="meta"))):
        logits, plain = returned()
        assert looks(move(logits)) == looks(move(plain))


def test_reading_is_done_once(returned, monkeypatch):
    logits, _ = returned()
    products = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *a: products.append(1) or linear(*a))
    view = logits.view(-1, VOCAB)
    assert torch.equal(view[0], logits[0, 0]) and torch.equal(logits.float(), logits)
    assert len(products) == 1
