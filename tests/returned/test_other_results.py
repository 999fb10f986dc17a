"""What a compiled function returns beside its logits: any names of any memory."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import aot_module_simplified

from ..backend import rewrite


def compiled(function):
    """Through AOTAutograd, which decides how names of one memory leave the graph."""

    def run(module, inputs):
        return aot_module_simplified(
            module,
            inputs,
            fw_compiler=lambda module, _: module.forward,
            bw_compiler=lambda module, _: module.forward,
        )

    return rewrite(function, then=run)


def step(beside, cut=slice(0, None)):
    """Loss, logits, and what ``beside`` makes of the hidden states and of another tensor."""

    def function(x, w, y):
        hidden, other = (x * 2)[:, cut], x * 3
        logits = F.linear(hidden, w)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten()), logits, beside(hidden, other, x)

    return function


SERVED = {
    "hidden": lambda h, k, x: h,
    "view_of_hidden": lambda h, k, x: h[:, :-1],
    "view_of_another": lambda h, k, x: k[:, 1:],
    "another_and_its_view": lambda h, k, x: (k, k[:, 1:]),
    "views_of_an_input": lambda h, k, x: (x[:, 1:], x.view(-1)),
    "detached": lambda h, k, x: h.detach(),
}
LEFT_ALONE = {
    "two_views_of_another": lambda h, k, x: (k[:, 1:], k[:, :1]),
    "hidden_and_detached": lambda h, k, x: (h, h.detach()),
}


@pytest.mark.parametrize("name", SERVED | LEFT_ALONE)
def test_other_results(name):
    function = step((SERVED | LEFT_ALONE)[name])
    x, w = torch.randn(2, 3, 8), torch.randn(97, 8)
    y = torch.randint(97, (2, 3))
    leaves = [[t.clone().requires_grad_() for t in (x, w)] for _ in range(2)]
    ours, expected = compiled(function)(*leaves[0], y), function(*leaves[1], y)
    assert counters["lmhead_pass"] == {"rewritten" if name in SERVED else "refused": 1}
    torch.testing.assert_close(ours, expected)
    for result in (ours, expected):
        result[0].backward()
    torch.testing.assert_close([t.grad for t in leaves[0]], [t.grad for t in leaves[1]])
