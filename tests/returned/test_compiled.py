"""Returned logits and torch.compile: other compiled functions, graph breaks, caches."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn

import lmhead_pass

from ..process import output_of
from .model import SETTING, VOCAB, Model, assert_same, batch, is_unread, run_and_read_log


def test_another_compiled_function_takes_them_and_compiles_once(model):
    inputs = batch()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    @torch.compile(backend=counter, fullgraph=True)
    def metric(logits, y):
        return (logits.argmax(-1) == y).float().mean(), (logits * 2).softmax(-1)

    compiled = torch.compile(model)
    for step in range(4):
        logits = compiled(*inputs)[1]
        if step % 2:
            logits.sum()
        actual, expected = metric(logits, inputs[1]), metric._torchdynamo_orig_callable
        assert_same(actual, expected(model(*inputs)[1], inputs[1]))
    assert counter.frame_count == 1
    logits = compiled(*inputs)[1]
    with torch.no_grad():
        model.head.weight.add_(1)
    with pytest.raises(RuntimeError, match=SETTING):
        metric(logits, inputs[1])


@pytest.mark.parametrize("extra", [1.0, nn.Parameter(torch.ones(VOCAB))], ids=["alone", "more"])
def test_a_gradient_out_of_another_compiled_function(model, extra):
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    def second(logits, y):
        return F.cross_entropy((logits * extra).flatten(0, 1), y.flatten())

    compiled, compiled_second = torch.compile(model), torch.compile(second, backend=counter)
    for _ in range(3):
        inputs = batch()
        loss, logits = compiled(*inputs)
        (loss + compiled_second(logits, inputs[1])).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()
        loss, logits = model(*inputs)
        (loss + second(logits, inputs[1])).backward()
        for gradient, parameter in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad)
        model.zero_grad()
    assert counter.frame_count == 1


def test_a_graph_break_between_making_and_reading():
    def broken(model, x, y):
        loss, logits = model(x, y)
        torch._dynamo.graph_break()
        return loss, logits.argmax(-1), logits

    model, inputs = Model(), batch()
    loss, best, _ = torch.compile(broken)(model, *inputs)
    assert torch.equal(best, model(*inputs)[1].argmax(-1))
    loss.backward()


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_detach_before_a_graph_break(grad_enabled, caplog):
    """Code after the break may want a gradient that nobody asked to be without."""

    def broken(x, y):
        loss, logits = model(x, y)
        torch._dynamo.graph_break()
        return loss + 1e-2 * logits.logsumexp(-1).square().mean()

    model, inputs = Model(), batch()
    with (
        lmhead_pass.config.patch(returned_logits="detach"),
        torch.set_grad_enabled(grad_enabled),
    ):
        loss, log = run_and_read_log(broken, caplog, *inputs)
        plain = broken(*inputs)
    torch.testing.assert_close(loss, plain)
    assert ("a graph break follows" in log) == grad_enabled
    if grad_enabled:
        loss.backward()
        gradient, model.head.weight.grad = model.head.weight.grad, None
        plain.backward()
        torch.testing.assert_close(gradient, model.head.weight.grad)


def test_rows_may_vary_without_a_recompile(model):
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, dynamic=True)
    for rows in ((2, 5), (3, 7), (4, 6)):
        inputs = batch(rows)
        _, logits = compiled(*inputs)
        assert is_unread(logits) and logits.shape == (*rows, VOCAB)
        torch.testing.assert_close(logits.detach() + 0, model(*inputs)[1].detach())
    assert counter.frame_count == 1


def test_both_caches_hit_in_a_second_process(tmp_path):
    code = """
        import torch, lmhead_pass
        from torch._dynamo.utils import counters
        from lmhead_pass.returned.lazy_logits import LazyLogits
        torch.manual_seed(0)
        head = torch.nn.Linear(16, 5000)
        @torch.compile
        def model(x, y):
            logits = head(x)
            return torch.nn.functional.cross_entropy(logits, y), logits.float()[1:]
        x, y = torch.randn(8, 16), torch.arange(8)
        loss, logits = model(x, y)
        loss.backward()
        assert isinstance(logits, LazyLogits)
        torch.testing.assert_close(logits.detach() + 0, head(x)[1:].detach())
        aot, fx = counters["aot_autograd"], counters["inductor"]
        print(aot["autograd_cache_hit"], fx["fxgraph_cache_miss"], aot["autograd_cache_bypass"])
    """
    caches = {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "0",
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
    }
    assert output_of(code, **caches).split()[::2] == ["0", "0"]
    assert output_of(code, **caches) == "1 0 0"
