"""The promise on memory, counted in bytes of tensor allocations."""

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import lmhead_pass


def peak_bytes(step):
    """The largest number of bytes that live at once in what ``step`` allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def scratch(tokens, hidden_size, vocab, dtype=torch.float32):
    """Peak bytes of a compiled forward and backward beyond inputs and gradients."""
    hidden = torch.randn(tokens, hidden_size).to(dtype).requires_grad_()
    weight = torch.randn(vocab, hidden_size).to(dtype).requires_grad_()
    target = torch.randint(vocab, (tokens,))
    torch._dynamo.reset()
    function = torch.compile(lambda h, w, y: F.cross_entropy(F.linear(h, w), y))
    function(hidden, weight, target).backward()
    hidden.grad = weight.grad = None
    peak = peak_bytes(lambda: function(hidden, weight, target).backward())
    return peak - hidden.grad.nbytes - weight.grad.nbytes


def test_training_step_holds_a_fraction_of_the_logits():
    logits = 4096 * 32000 * 4
    assert scratch(4096, 512, 32000) <= 0.15 * logits
    with lmhead_pass.disabled():
        assert scratch(4096, 512, 32000) >= 0.99 * logits


def test_evaluation_holds_one_chunk():
    hidden, weight = torch.randn(4096, 64), torch.randn(8192, 64)
    target = torch.randint(8192, (4096,))
    function = torch.compile(lambda h, w, y: F.cross_entropy(F.linear(h, w), y))
    with torch.no_grad(), lmhead_pass.config.patch(batch_chunk_size=128):
        function(hidden, weight, target)
        chunk = 128 * 8192 * 4
        assert peak_bytes(lambda: function(hidden, weight, target)) <= 1.25 * chunk


def test_memory_budget_is_kept():
    with lmhead_pass.config.patch(memory_budget=2_000_000):
        rows = 2_000_000 // (8192 * 4)
        assert scratch(2048, 64, 8192) <= rows * 8192 * 4 + 2_000_000  # and what is left of hidden
