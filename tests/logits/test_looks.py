"""What looks at shape, dtype or device of logits, and reads none of them."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from .. import forms, reference
from ..backend import rewrite

V = forms.V

LOOKS = {
    "new_zeros": lambda z: z.new_zeros(()),
    "new_ones": lambda z: z.new_ones(3, dtype=torch.float64),
    "new_full": lambda z: z.new_full((2, 3), 1.5),
    "new_tensor": lambda z: z.new_tensor([1.0, 2.0]),
    "new_empty": lambda z: z.new_empty(3).fill_(2),
    "zeros_like": lambda z: torch.zeros_like(z).sum(-1),
    "ones_like_of_rows": lambda z: torch.ones_like(z[:, 1:].reshape(-1, V)),
    "full_like_keyword": lambda z: torch.full_like(input=z[0], fill_value=2),
    "of_a_word": lambda z: torch.zeros_like(z[..., 0]) + 1,
    "of_an_element": lambda z: z[0, 0, 0].new_zeros(2),
    "of_a_sum": lambda z: torch.ones(3).to(z.sum()),
    "of_what_is_clamped": lambda z: torch.ones_like(z.clamp(max=3)),
    "to": lambda z: torch.arange(3).to(z),
    "type_as": lambda z: torch.arange(3).type_as(z),
    "view_as": lambda z: torch.arange(21 * V).view_as(z),
    "expand_as": lambda z: torch.arange(V).expand_as(z),
    "size": lambda z: torch.ones(z.size(1)) * z.size(-1),
    "of_masked_logits": lambda z: torch.ones_like(z.masked_fill(torch.arange(V) > 90, -1)),
}


# Shapes of what is not understood have to be known.
CASES = [(name, dynamic) for name in LOOKS for dynamic in (False, True)]
CASES = [case for case in CASES if case not in (("of_a_word", True), ("of_what_is_clamped", True))]


@pytest.mark.parametrize(("name", "dynamic"), CASES)
def test_a_look_reads_nothing(name, dynamic):
    look, dtype = LOOKS[name], torch.bfloat16

    def function(h, w, b, y):
        z = F.linear(h, w, b)
        seen = look(z)
        return forms.flat(z, y), seen

    *leaves, target = forms.inputs(dtype)
    expected = function(*map(reference.leaf, leaves), target)
    torch._dynamo.mark_static(leaves[1])
    graphs = []
    results = rewrite(function, graphs, dynamic=dynamic)(*leaves, target)
    assert counters["lmhead_pass"] == {"rewritten": 1}
    torch.testing.assert_close(results, expected)
    assert results[1].stride() == expected[1].stride()
    results[0].backward()


READS = {
    "a_word": lambda z: z[..., 0] + z[..., 0].new_zeros(()),
    "a_deviation": lambda z: z.std().new_zeros(()) + z.std(),
    "zeros_like_of_other_strides": lambda z: torch.zeros_like(z.mT),
}


@pytest.mark.usefixtures("no_regions")
@pytest.mark.parametrize("name", READS)
def test_what_is_read_as_well_is_needed(name):
    def function(h, w, b, y):
        z = F.linear(h, w, b)
        return forms.flat(z, y), READS[name](z)

    tensors = forms.inputs()
    results = rewrite(function)(*tensors)
    assert counters["lmhead_pass"] == {"refused": 1}
    torch.testing.assert_close(results, function(*tensors))
