"""Two logits of a row are compared in the graph: the same word is as large as itself."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from ..backend import rewrite

N, H, V = 300, 16, 200


@pytest.fixture
def tensors():
    return torch.randn(N, H), torch.randn(V, H, requires_grad=True)


def of_words(z, words):
    return z.gather(-1, words[:, None]).squeeze(-1)


def loss_of(z):
    return F.cross_entropy(z, torch.arange(N) % V)


# Two numbers of the same logit of each row.
SAME = {
    "logits": lambda z: (of_words(z, z.argmax(-1)), z.amax(-1)),
    "log-probabilities": lambda z: (lambda p: (of_words(p, z.argmax(-1)), p.amax(-1)))(
        z.log_softmax(-1)
    ),
    "probabilities": lambda z: (lambda p: (of_words(p, z.argmax(-1)), p.max(-1).values))(
        z.softmax(-1)
    ),
    "with topk": lambda z: (of_words(z, z.argmax(-1)), z.topk(3).values[:, 0]),
    "words apart": lambda z: (of_words(z, z.argmax(-1)), of_words(z, z.topk(2).indices[:, 0])),
    "losses": lambda z: (
        -F.cross_entropy(z, z.argmax(-1), reduction="none"),
        z.log_softmax(-1).amax(-1),
    ),
}


@pytest.mark.parametrize("compare", [torch.eq, torch.ge, lambda a, b: (a - b).detach() == 0])
@pytest.mark.parametrize("take", SAME.values(), ids=SAME)
def test_a_logit_is_itself(tensors, take, compare):
    def function(hidden, weight):
        z = hidden @ weight.t()
        return loss_of(z), compare(*take(z)).sum()

    loss, count = rewrite(function)(*tensors)
    expected, of_all = function(*tensors)
    assert of_all == N  # by eager
    assert count == N
    torch.testing.assert_close(loss, expected)
    assert counters["lmhead_pass"]["rewritten"] and not counters["lmhead_pass"]["refused"]


def test_pairs_of_rows_stay_fused(tensors, caplog):
    """DPO: which of two sequences is the likelier asks for no more digits than there are."""

    def function(hidden, weight):
        z = hidden @ weight.t()
        log_p = z.log_softmax(-1)
        chosen, rejected = (of_words(part, torch.arange(N // 2)) for part in log_p.chunk(2))
        return -(chosen - rejected).sum(), (chosen > rejected).sum()

    with caplog.at_level("INFO", logger="lmhead_pass"):
        result = rewrite(function)(*tensors)
    torch.testing.assert_close(result, function(*tensors))
    assert "rewritten" in caplog.text and "chunked" not in caplog.text
