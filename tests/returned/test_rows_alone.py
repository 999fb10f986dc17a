"""A few rows of unread logits are computed alone, if nobody can tell."""

import pytest
import torch
from torch import nn

from benchmarks.memory import peak_bytes

from ..backend import rewrite
from .model import is_unread

V, H, LENGTH = 96, 8, 12


def returning(logits):
    """Unread logits and those of the same model uncompiled."""
    head, x = nn.Linear(H, V), torch.randn(3, LENGTH, H)
    with torch.no_grad():
        unread = rewrite(lambda x: logits(head(x)))(x)
        assert is_unread(unread)
        return unread, logits(head(x))


def strides(result):
    return [tensor.stride() for tensor in torch.utils._pytree.tree_leaves(result)]


ROWS = {
    "last": lambda z: z[:, -1],
    "last, kept": lambda z: z[:, -1:],
    "last, any rows": lambda z: z[..., -1, :],
    "several": lambda z: z[:, -3:],
    "cast before": lambda z: z.detach().double()[:, -1].float(),
    "selected": lambda z: z.select(1, -1),
    "narrowed": lambda z: z.narrow(1, 2, 2),
    "split": lambda z: z.split(3, dim=1)[1],
    "chosen": lambda z: z[torch.arange(3), torch.tensor([2, 0, 1])],
    "of a softmax": lambda z: (z[:, -1] / 0.7).softmax(-1),
    "words of rows": lambda z: z[:, -1][:, 5:90],
}
READERS = {
    "clone": torch.clone,
    "topk": lambda z: z.topk(3),
    "sort": lambda z: z.sort(-1, descending=True)[0],
    "times a tensor": lambda z: z * torch.linspace(0, 1, z.size(-1)),
}
ALL = {
    "words": lambda z: z[..., :7].clone(),
    "most rows": lambda z: z[:, 1:].clone(),
    "half and half": lambda z: torch.cat([z[:, :6].clone(), z[:, 6:].clone(), z[:, :6].clone()]),
    "softmax over rows": lambda z: z.softmax(1)[:, -1].clone(),
    "numbers": lambda z: z[:, -1].tolist(),
    "memory": lambda z: z[:, -1].numpy(),
    "its own": lambda z: z[:, -1].as_strided((2,), (1,)),
}


@torch.no_grad()
def test_only_these_rows_are_multiplied():
    head, x = nn.Linear(H, V), torch.randn(3, LENGTH, H)
    compiled, plain = rewrite(lambda x: head(x) * 3), head(x) * 3
    for rows in ROWS.values():
        for reader in READERS.values():
            unread = compiled(x)
            for _ in range(2):
                ours, theirs = reader(rows(unread)), reader(rows(plain))
                torch.testing.assert_close(ours, theirs)
                assert strides(ours) == strides(theirs)
            assert is_unread(unread)
            torch.testing.assert_close(unread + 0, plain)


@pytest.mark.parametrize("read", ALL.values(), ids=ALL)
@torch.no_grad()
def test_what_reads_all(read):
    unread, plain = returning(lambda z: z)
    torch.testing.assert_close(read(unread), read(plain))
    assert not is_unread(unread)


@torch.no_grad()
def test_one_word_of_each_row_is_computed_in_chunks():
    unread, plain = returning(lambda z: z)
    torch.testing.assert_close(unread[..., 3].clone(), plain[..., 3])
    assert is_unread(unread)


@torch.no_grad()
def test_one_row_per_sequence_is_held():
    head, x = nn.Linear(16, 8192), torch.randn(4, 64, 16)
    compiled = rewrite(head)
    assert is_unread(compiled(x))
    logits = 4 * 64 * 8192 * 4
    assert peak_bytes(lambda: compiled(x)[:, -1].softmax(-1).multinomial(1)) <= logits / 4


@torch.no_grad()
def test_a_later_write_shows_in_rows_that_were_read_alone():
    unread, plain = returning(lambda z: z)
    for z in (unread, plain):
        last = z[:, -1]
        last.clone()
        z.add_(1)
        last.mul_(2)
    torch.testing.assert_close(last.clone(), plain[:, -1])
    torch.testing.assert_close(unread + 0, plain)


@torch.no_grad()
def test_rows_of_a_changed_head_are_an_error():
    head, x = nn.Linear(H, V), torch.randn(3, LENGTH, H)
    last = rewrite(head)(x)[:, -1]
    head.weight.data += 1
    with pytest.raises(RuntimeError, match="weight was changed"):
        last.clone()


def test_with_a_gradient_all_are_read():
    head, x = nn.Linear(H, V), torch.randn(3, LENGTH, H)
    results = []
    for function in (rewrite(head), head):
        logits = function(x)
        (logits[:, -1] * torch.linspace(0, 1, V)).sum().backward()
        results.append(head.weight.grad.clone())
        head.weight.grad = None
    torch.testing.assert_close(*results)


@torch.no_grad()
def test_the_same_rows_are_multiplied_once():
    """Another product would differ in the last digits: ``last >= best`` might find no word."""
    unread, _ = returning(lambda z: z)
    first, numbers = unread[:, -1].clone(), unread._cell.numbers_alone
    for _ in range(LENGTH):
        assert torch.equal(unread[:, -1].clone(), first)
    assert unread._cell.numbers_alone == numbers == first.numel()
    assert unread._cell.value is None
