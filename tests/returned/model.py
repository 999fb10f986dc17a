"""A model that returns its logits beside the loss, and what is asked of them."""

import logging

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lmhead_pass.returned.lazy_logits import LazyLogits

from ..backend import rewrite

VOCAB = 96
SETTING = "lmhead_pass.config.returned_logits"


class Model(nn.Module):
    """A body, a head, and what the head's logits go through before they are returned."""

    def __init__(self, returns=lambda logits: logits, hidden=16, vocab=VOCAB, bias=True):
        super().__init__()
        self.body = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, vocab, bias=bias)
        self.returns = returns

    def forward(self, x, y):
        logits = self.head(self.body(x).tanh())
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)).float(), y.view(-1))
        return loss, self.returns(logits)


def batch(rows=(2, 5), hidden=16, vocab=VOCAB):
    return torch.randn(*rows, hidden), torch.randint(vocab, rows)


def is_unread(tensor):
    return isinstance(tensor, LazyLogits) and tensor._cell.value is None


def assert_same(actual, expected):
    if isinstance(expected, torch.Tensor):
        assert actual.requires_grad == expected.requires_grad
        torch.testing.assert_close(actual.detach().clone(), expected.detach())
    elif isinstance(expected, tuple | list) and expected and isinstance(expected[0], torch.Tensor):
        assert len(actual) == len(expected)
        for pair in zip(actual, expected, strict=True):
            assert_same(*pair)
    elif isinstance(expected, np.ndarray | list):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)
    else:
        assert actual == expected


def looks(tensor):
    return [
        *(tensor.shape, tensor.size(), tensor.size(-1), tensor.dim(), tensor.ndim, tensor.numel()),
        *(tensor.dtype, tensor.device, tensor.layout, tensor.is_cuda, tensor.requires_grad),
        *(tensor.is_floating_point(), tensor.stride(), tensor.is_contiguous(), len(tensor)),
        *(isinstance(tensor, torch.Tensor), torch.is_tensor(tensor), tensor.is_leaf),
        *(tensor.element_size(), tensor.nbytes, torch.numel(tensor), {tensor: 1}[tensor]),
    ]


def of_another_dtype(logits):
    return logits.bfloat16() if logits.dtype == torch.float32 else logits.float()


RETURNS = {
    "as they are": lambda logits: logits,
    "float": lambda logits: logits.float(),
    "sliced": lambda logits: logits[:, :-1],
    "last": lambda logits: logits[:, -1, :],
    "flat": lambda logits: logits.view(-1, VOCAB),
    "vocabulary first": lambda logits: logits.transpose(1, 2),
    "detached": lambda logits: logits.detach(),
    "double": lambda logits: logits.bfloat16().float()[:, 1:].contiguous(),
    "several": lambda logits: (logits, of_another_dtype(logits)[:, 0], {"again": logits}),
}


def leaves(value):
    return torch.utils._pytree.tree_leaves(value)


def run_and_read_log(function, caplog, *arguments, backend=rewrite):
    with caplog.at_level(logging.INFO, logger="lmhead_pass"):
        result = backend(function)(*arguments)
    return result, " ".join(record.getMessage() for record in caplog.records)
