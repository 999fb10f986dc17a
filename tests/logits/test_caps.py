"""Softcaps by a root, ``c z / sqrt(z * z + c * c)``, in any spelling."""

import pytest
import torch
import torch.nn.functional as F

from .. import forms
from ..checks import assert_left_alone, check

V = forms.V

CAPS = {
    "rsqrt": lambda z: 3 * z * (z * z + 9).rsqrt(),
    "rsqrt_function": lambda z: 3 * (z * torch.rsqrt(z.square() + 3**2)),
    "rsqrt_first": lambda z: torch.rsqrt(9 + z**2) * z * 3,
    "rsqrt_scaled": lambda z: z * (3 * torch.rsqrt(z.pow(2) + 9)),
    "sqrt": lambda z: z / (1 + (z / 3) ** 2).sqrt(),
    "sqrt_of_multiples": lambda z: 2 * z / torch.sqrt(0.5 * (z * z) + 2),
    "power": lambda z: z * (z.square() / 9 + 1) ** -0.5,
    "inverse": lambda z: z * (1 / (z * z + 4).sqrt()),
    "reciprocal": lambda z: -z * (z * z + 4).sqrt().reciprocal(),
    "of_moved_logits": lambda z: (z - 0.5) * torch.rsqrt((z - 0.5).square() + 4) + 0.5,
    "of_float": lambda z: 15 * z.float() * torch.rsqrt(z.float().square() + 225),
    "of_rows": lambda z: z.view(-1, V)[1:] * (z.view(-1, V)[1:].square() + 4).rsqrt(),
    "then_masked": lambda z: (z * (z * z + 4).rsqrt()).masked_fill(torch.arange(V) > 90, -2),
}


@pytest.mark.parametrize("name", CAPS)
def test_algebraic_softcap(name):
    cap = CAPS[name]

    def function(h, w, b, y):
        z = cap(F.linear(h, w, b))
        return forms.flat(z, y.flatten()[-z.numel() // V :])

    check(function, forms.inputs())


REFUSED = {
    "of_others": (lambda z: z * ((z + 1).square() + 4).rsqrt(), "a root of other squares"),
    "of_other_rows": (lambda z: z * (z[:, :1].square() + 4).rsqrt(), "a root of other squares"),
    "without_an_offset": (lambda z: z * (z * z).rsqrt(), "a root of other squares"),
    "of_detached": (lambda z: z * (z.detach() ** 2 + 4).rsqrt(), "a root of other squares"),
    "of_masked": (
        lambda z: (
            z.masked_fill(z.new_ones(V, dtype=torch.bool), -2.0).tanh() * (z.square() + 4).rsqrt()
        ),
        "a root of other squares",
    ),
    "multiplied_by_the_root": (lambda z: z * (z * z + 4).sqrt(), "logits are multiplied by logits"),
    "divided_by_the_inverse": (lambda z: z / (z * z + 4).rsqrt(), "div puts logits together"),
    "root_by_logits": (lambda z: (z * z + 4).sqrt() / z, "div puts logits together"),
    "squared": (lambda z: z * z, "not of logits"),
    "cubed": (lambda z: z**3, "pow"),
    "twice": (lambda z: torch.tanh(z * (z * z + 4).rsqrt()), "second softcap"),
    "capped_before": (
        lambda z: torch.tanh(z) * (torch.tanh(z) ** 2 + 4).rsqrt(),
        "a root of other squares",
    ),
}


@pytest.mark.usefixtures("no_regions")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_softcap(name, caplog):
    chain, reason = REFUSED[name]

    def function(h, w, b, y):
        return forms.flat(chain(F.linear(h, w, b)), y)

    assert_left_alone(function, forms.inputs(), reason, caplog)
