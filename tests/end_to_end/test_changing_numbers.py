"""Numbers that change from call to call: no graph more than without the pass."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import lmhead_pass

V = 96
CALLS = 5


def _returning(h, w, y, t):
    z = F.linear(h, w) / t
    return F.cross_entropy(z, y), z


STEPS = {
    "temperature": lambda h, w, y, t: F.cross_entropy(F.linear(h, w) / t, y),
    "scale_in_fp32": lambda h, w, y, t: F.cross_entropy(F.linear(h, w).float() * t, y),
    "and_a_bias": lambda h, w, y, t: F.cross_entropy(F.linear(h, w) * t + w[:, 0], y),
    "after_a_bias": lambda h, w, y, t: F.cross_entropy((F.linear(h, w) + w[:, 0]) * t, y),
    "softcap": lambda h, w, y, t: F.cross_entropy(t * torch.tanh(F.linear(h, w) / t), y),
    "shift": lambda h, w, y, t: F.cross_entropy(F.linear(h, w) - t, y),
    "coefficient": lambda h, w, y, t: t * F.cross_entropy(F.linear(h, w), y),
    "smoothing": lambda h, w, y, t: F.cross_entropy(F.linear(h, w), y, label_smoothing=t / 10),
    "temperature_of_each_row": lambda h, w, y, t: F.cross_entropy(
        F.linear(h, w) / t, y, reduction="none"
    ).mean(),
    "filled_in_chunks": lambda h, w, y, t: (
        torch.where(torch.arange(V) % 3 == 0, -7.0 * t, F.linear(h, w)).std(-1).mean()
    ),
    "returned": _returning,
}


def _run(step, numbers):
    torch.manual_seed(0)
    leaves = [torch.randn(size, 8).requires_grad_() for size in (6, V)]
    y = torch.randint(V, (6,))
    results = []
    for number in numbers:
        result = step(*leaves, y, number)
        loss, *logits = result if isinstance(result, tuple) else (result,)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves), *logits])
    return [[tensor.detach() * 1 for tensor in result] for result in results]


def _graphs(step, numbers, **options):
    """How many graphs, and the results."""
    torch._dynamo.reset()
    counters.clear()
    results = _run(torch.compile(step, **options), numbers)
    return counters["stats"]["unique_graphs"], results


FLOATS, INTEGERS = [1 + n / 8 for n in range(CALLS)], [*range(1, CALLS + 1)]
CASES = [
    *((step, FLOATS) for step in STEPS),
    *((step, INTEGERS) for step in ("temperature", "coefficient", "smoothing")),
]


@pytest.mark.parametrize(("step", "numbers"), CASES)
def test_no_more_graphs_than_without_the_pass(step, numbers):
    if step == "smoothing" and isinstance(numbers[0], int):
        numbers = [0, 1, 2, 3]
    step = STEPS[step]
    graphs, results = _graphs(step, numbers)
    assert counters["lmhead_pass"]["rewritten"] >= 1
    with lmhead_pass.disabled():
        without, expected = _graphs(step, numbers)
    assert graphs <= without
    for ours, right in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-6)


def test_a_number_known_at_run_time_only():
    def step(h, w, y, t):
        return F.cross_entropy(F.linear(h, w) / t.item(), y)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        temperatures = [torch.tensor(0.7), torch.tensor(1.3)]
        _, results = _graphs(step, temperatures, fullgraph=True)
        assert counters["lmhead_pass"]["rewritten"] == 1
    torch.testing.assert_close(results, _run(step, temperatures))
