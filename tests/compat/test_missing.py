"""Torch without a private name: the log says what is off, and results are those of eager."""

import contextlib
import json
import logging
import types

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import forward_ad

import lmhead_pass
from lmhead_pass.compat import compiling, graphs, kernels, lookup, settings
from lmhead_pass.compat.lookup import NO_LAZY_LOGITS, NO_REWRITE
from lmhead_pass.graph_pass import the_pass
from lmhead_pass.returned.lazy_logits import LazyLogits

from ..backend import rewrite
from ..process import output_of
from .test_private_names import captured


def step(hidden, weight, target):
    logits = hidden @ weight.t()
    return F.cross_entropy(logits, target), logits


def inputs():
    return torch.randn(8, 16), torch.randn(200, 16, requires_grad=True), torch.arange(8)


# Most names are looked up on import: a process of its own imports without each of these.

REWRITES_NOTHING = [
    "torch._C._set_grad_enabled",
    "torch.autograd.grad_mode._enter_inference_mode",
    "torch.autograd.grad_mode._exit_inference_mode",
    "torch.amp.autocast_mode._enter_autocast",
    "torch.amp.autocast_mode._exit_autocast",
    "torch._C._functorch.is_functorch_wrapped_tensor",
    "torch._C._functorch.get_unwrapped",
    "torch.utils._python_dispatch.is_traceable_wrapper_subclass",
    "torch.Tensor._is_view",
    "torch.utils._pytree.tree_leaves",
    "torch._subclasses.fake_tensor.FakeTensor",
    "torch.UntypedStorage._cdata",
    "torch._ops.OpOverload",
    "torch._ops.OpOverloadPacket",
    "torch.ops.aten.add.Tensor._schema.is_mutable",
    "torch._C._AutoDispatchBelowAutograd",
    "_make_dual",  # each that ends so
    "_",  # every private name
]
RETURNS_NO_LAZY_LOGITS = [
    "torch.utils._pytree.tree_map",
    "torch._subclasses.fake_tensor.is_fake",
    "torch._guards.CompileContext.try_get",
    "torch._guards.TracingContext.try_get",
    "torch.Tensor._make_wrapper_subclass",
    "torch._C._set_throw_on_mutable_data_ptr",
    "torch._C.DisableTorchFunctionSubclass",
    "torch._C._disabled_torch_function_impl",
    "torch.Tensor._version",
    "torch._C._swap_tensor_impl",
    "torch.fx.node.map_aggregate",
    "torch._subclasses.fake_tensor.FakeTensorMode",
    "torch._C._autograd._get_current_graph_task_keep_graph",
    "torch._C._functorch.peek_interpreter_stack",
    "torch._C._len_torch_dispatch_stack",
    "torch.utils._python_dispatch._disable_current_modes",
    "torch.multiprocessing.reductions.StorageWeakRef",
    "torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack",
]
STILL_REWRITES = {
    "torch._disable_dynamo": "a compiled function that is given returned logits computes them",
    "torch._C._nn._parse_to": "to() computes logits that are not read yet",
    "torch.utils._config_module.install_config_module": "lmhead_pass.config has no patch()",
    "torch._inductor.custom_graph_pass.CustomGraphPass": "Inductor caches no graph",
    "torch._dynamo.utils.counters": "nothing is counted",
    "torch._logging.trace_structured": "tlparse shows no graphs",
    "torch.ops.higher_order.tag_activation_checkpoint": "another checkpointed region",
}
RUN_WITHOUT = """
    import json, logging, os, pkgutil, sys, traceback
    import torch, torch.nn.functional as F
    import torch._dynamo, torch._inductor.config, torch._inductor.custom_graph_pass

    def step(hidden, weight, target):
        logits = hidden @ weight.t()
        return F.cross_entropy(logits, target), logits

    def run(taken):
        resolve, lines = pkgutil.resolve_name, []

        def resolve_without(name):
            if name.endswith(taken) or (taken == "_" and "_" in name):
                raise AttributeError(name)
            return resolve(name)

        class Handler(logging.Handler):
            def emit(self, record):
                lines.append(record.getMessage())

        logging.getLogger("lmhead_pass").addHandler(Handler(logging.WARNING))
        pkgutil.resolve_name = resolve_without
        import lmhead_pass
        from lmhead_pass.graph_pass import the_pass

        def backend(module, example_inputs):
            the_pass()(module.graph)
            module.recompile()
            codes.append(module.code)
            return module.forward

        codes = []
        lmhead_pass.config.strict = True
        hidden, weight = torch.randn(8, 16), torch.randn(5000, 16, requires_grad=True)
        expected = step(hidden, weight, torch.arange(8))
        found = torch.compile(step, backend=backend)(hidden, weight, torch.arange(8))
        is_lazy = type(found[1]) is not torch.Tensor
        torch.testing.assert_close(found[1].to(torch.float64), expected[1].to(torch.float64))
        torch.testing.assert_close(found[0], expected[0])
        gradients = [torch.autograd.grad(loss, weight)[0] for loss in (found[0], expected[0])]
        torch.testing.assert_close(*gradients)
        return lines, "lmhead_pass" in codes[0], is_lazy

    torch.compile(lambda x: x * 2, backend="eager")(torch.ones(2))  # what each would do first
    for name in sys.stdin.read().split():
        sys.stdout.flush()
        if os.fork():
            os.wait()
            continue
        try:
            result = run(name)
        except BaseException:
            result = [traceback.format_exc()], None, None
        print(json.dumps([name, *result]))
        sys.stdout.flush()
        os._exit(0)
"""


@pytest.fixture(scope="module")
def without():
    """By name: what was logged, and whether a loss was rewritten and its logits returned lazily."""
    names = [*REWRITES_NOTHING, *RETURNS_NO_LAZY_LOGITS, *STILL_REWRITES, "none"]
    code = RUN_WITHOUT.replace("sys.stdin.read()", repr(" ".join(names)))
    lines = output_of(code, OMP_NUM_THREADS="1").splitlines()
    return {name: result for name, *result in map(json.loads, lines)}


def test_with_every_name(without):
    assert without["none"] == [[], True, True]


@pytest.mark.parametrize("name", REWRITES_NOTHING)
def test_nothing_is_rewritten_without(name, without):
    log, is_rewritten, is_lazy = without[name]
    assert any(f"has no {name}" in line or name.startswith("_") for line in log), log
    assert any(f": {NO_REWRITE}. A newer lmhead_pass" in line for line in log), log
    assert not is_rewritten and not is_lazy


@pytest.mark.parametrize("name", RETURNS_NO_LAZY_LOGITS)
def test_logits_are_not_returned_lazily_without(name, without):
    log, is_rewritten, is_lazy = without[name]
    told = f"torch {torch.__version__} has no {name}: {NO_LAZY_LOGITS}"
    assert f"{told}. A newer lmhead_pass may know this torch" in log
    assert is_rewritten is False and is_lazy is False


@pytest.mark.parametrize("name", STILL_REWRITES)
def test_something_less_is_off_without(name, without):
    log, is_rewritten, is_lazy = without[name]
    assert len(log) == 1, log
    assert f"has no {name}: " in log[0] and STILL_REWRITES[name] in log[0]
    assert is_rewritten and is_lazy


# What a torch may lack that has the objects themselves.


@pytest.fixture(autouse=True)
def _forget():
    """Nothing that a test takes away is missing afterwards."""
    missing = {without: list(names) for without, names in lookup._missing.items()}
    yield
    lookup._missing.clear()
    lookup._missing.update(missing)
    lookup.find.cache_clear()
    kernels.has_kernel.cache_clear()


@pytest.fixture
def take(monkeypatch):
    def take_away(name):
        def resolve(asked):
            if asked == name:
                raise AttributeError(asked)
            return found(asked)

        found = lookup.resolve_name
        monkeypatch.setattr(lookup, "resolve_name", resolve)
        lookup.find.cache_clear()

    return take_away


def run_with(change):
    """What ``step`` gives, compiled, if ``change`` is made to a graph before the pass."""

    def backend(module, example_inputs):
        with change(module) or contextlib.nullcontext():
            the_pass()(module.graph)
        module.recompile()
        return module.forward

    arguments = inputs()
    found = torch.compile(step, backend=backend)(*arguments)
    for part, expected in zip(found, step(*arguments), strict=True):
        torch.testing.assert_close(part.clone(), expected)
    return type(found[1]) is LazyLogits


def warnings_in(caplog):
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


def test_without_compile_ids(caplog):
    assert not run_with(lambda module: module.meta.pop("dynamo_compile_id") and None)
    (line,) = warnings_in(caplog)
    assert "has no GraphModule.meta['dynamo_compile_id']: every graph counts as a part" in line


def test_without_example_values(caplog):
    def take_away(module):
        for node in module.graph.nodes:
            node.meta.pop("example_value", None)

    assert not run_with(take_away)
    (line,) = warnings_in(caplog)
    assert f"has no Node.meta['example_value']: {NO_REWRITE}. A newer lmhead_pass" in line


def test_a_graph_of_modes_alone_lacks_nothing(caplog):
    def break_under_autocast(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch._dynamo.graph_break()
        return x * 2

    with torch._inductor.config.patch(pre_grad_custom_pass=the_pass()):
        torch.compile(break_under_autocast)(torch.ones(2))
    assert not warnings_in(caplog)
    assert run_with(lambda module: None)


@pytest.mark.parametrize("returned_logits", ["lazy", "detach"])
def test_without_reasons_of_ends(returned_logits, caplog):
    with lmhead_pass.config.patch(returned_logits=returned_logits):
        is_lazy = run_with(lambda module: delattr(module, "compile_subgraph_reason"))
    assert is_lazy == (returned_logits == "lazy")  # which does not ask
    found = "".join(warnings_in(caplog))
    assert ("has no GraphModule.compile_subgraph_reason" in found) == (not is_lazy)


def test_without_size_hints(monkeypatch, caplog):
    from torch.fx.experimental.sym_node import SymNode

    (module,) = captured(lambda x: x * 2, torch.ones(7, 3), dynamic=True)
    *_, x = [node.meta["example_value"] for node in module.graph.find_nodes(op="placeholder")]
    monkeypatch.delattr(SymNode, "hint")
    assert graphs.size_hint(x.size(0)) is None
    (line,) = warnings_in(caplog)
    assert "has no SymInt.node.hint: heads with a dynamic vocabulary are left alone" in line


def test_without_the_setting_of_dynamic_numbers(monkeypatch, caplog):
    monkeypatch.setattr(torch._dynamo, "config", types.SimpleNamespace())
    assert not graphs.are_all_numbers_dynamic()
    assert "has no torch._dynamo.config.assume_static_by_default" in caplog.text


def test_without_known_conditions(take, caplog):
    (module,) = captured(lambda x: x * 2, torch.ones(7, 3), dynamic=True)
    *_, x = [node.meta["example_value"] for node in module.graph.find_nodes(op="placeholder")]
    take("torch.fx.experimental.symbolic_shapes.statically_known_true")
    assert not graphs.is_known_true(x.size(0) == x.size(0) * 1)
    assert graphs.is_known_true(x.size(0) is not None)
    assert "dynamic sizes count as different" in caplog.text


def test_without_the_mark_of_ddp(caplog):
    def take_away(module):
        context = torch._guards.TracingContext.get()
        del context.fakify_first_call
        stack = contextlib.ExitStack()
        stack.callback(setattr, context, "fakify_first_call", False)
        return stack

    assert not run_with(take_away)
    assert f"has no torch._guards.TracingContext.fakify_first_call: {NO_LAZY_LOGITS}" in "".join(
        warnings_in(caplog)
    )


def test_without_attempts(monkeypatch, caplog):
    context = types.SimpleNamespace()
    monkeypatch.setattr(compiling, "_CompileContext", lambda: context)
    assert compiling.attempt() is None
    assert "CompileContext.attempt: where Dynamo starts a compilation over" in caplog.text


def test_without_counters(take, caplog):
    take("torch._dynamo.utils.counters")
    assert not lmhead_pass.explain(step, *inputs()).advice
    assert "explain does not tell what Dynamo could not trace" in caplog.text


@pytest.mark.parametrize("compile", [torch.compile, lambda function: torch.compile(Model())])
def test_without_a_way_back_to_what_is_compiled(compile, monkeypatch, caplog):
    compiled = compile(step)
    monkeypatch.setattr(compiling, "_UNCOMPILED", ())
    assert compiling.uncompiled(compiled) is compiled
    assert "explain takes a compiled function or module as it is" in caplog.text


class Model(nn.Module):
    def forward(self, *arguments):
        return step(*arguments)


@pytest.mark.parametrize("config", [None, types.SimpleNamespace()])
def test_without_a_limit_of_recompiles(config, monkeypatch, caplog):
    monkeypatch.setattr(compiling, "find", lambda name, without: config)
    with compiling.without_recompile_limit():
        pass
    assert "explain misses the graphs of a function" in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        "torch._dynamo.exc.SkipFrame",
        "torch._dynamo.symbolic_convert.InstructionTranslator.current_tx",
    ],
)
def test_without_a_way_to_eager(name, take, caplog):
    take(name)
    compiled, second = rewrite(lambda *given: step(*given)[1]), rewrite(F.cross_entropy)
    arguments = inputs()
    torch.testing.assert_close(second(compiled(*arguments), arguments[2]), step(*arguments)[0])
    assert "a compiled function that is given returned logits computes them" in caplog.text


def test_without_what_a_reset_forgets(take, caplog):
    take("torch._dynamo.utils.guard_failures")
    assert compiling.forgotten_by_reset() is compiling.forgotten_by_reset()
    assert "is traced once, also after torch.compiler.reset()" in caplog.text


def test_without_autograd_functions(take, caplog):
    take("torch.ops.higher_order.autograd_function_apply")
    assert graphs.autograd_function_call() is None
    assert "explain gives no advice on heads in an autograd.Function" in caplog.text


@pytest.mark.usefixtures("no_regions")
def test_without_legacy_reductions(take, caplog):
    def function(hidden, weight, target):
        return F.cross_entropy(hidden @ weight.t(), target, size_average=False, reduce=True)

    take("torch.nn._reduction.legacy_get_string")
    explanation = lmhead_pass.explain(function, *inputs())
    assert "reduction is None" in explanation.refused[0]
    assert "losses with the arguments size_average or reduce are left alone" in caplog.text


@pytest.mark.parametrize(
    "name", ["torch._C._dispatch_key_for_device", "torch._C._dispatch_has_kernel_for_dispatch_key"]
)
def test_without_a_list_of_kernels(name, take, caplog):
    take(name)
    assert not kernels.has_kernel("aten::add.out", "cpu")
    assert f"has no {name}: products of BF16 and FP16 are made of copies" in caplog.text


def test_without_assertions_on_devices(take, caplog):
    take("torch._assert_async")
    kernels.check_on_device(torch.tensor(False), "a message")
    assert "a target out of bounds gives NaN on a GPU, and no error" in caplog.text


def test_without_levels_of_forward_mode(monkeypatch, caplog):
    hidden, weight, target = inputs()
    compiled = rewrite(step)
    compiled(hidden, weight.detach(), target)
    monkeypatch.delattr(forward_ad, "_current_level")
    loss, _ = compiled(hidden, weight.detach(), target)
    torch.testing.assert_close(loss, step(hidden, weight, target)[0].detach())
    assert "calls of the op that need no gradient go through autograd" in caplog.text


def test_without_defaults_of_settings(caplog):
    class Config(types.ModuleType):
        pre_grad_custom_pass = None

    config = Config("config")
    settings.register_passes(config, [the_pass()], by_default=[the_pass()])
    assert settings.registered_passes(config) == [the_pass()]
    assert "only graphs that the thread compiles which imports lmhead_pass" in caplog.text


def test_without_the_setting_of_passes(caplog):
    config = types.ModuleType("config")
    settings.register_passes(config, [the_pass()], by_default=[the_pass()])
    assert settings.registered_passes(config) == []
    with settings.passes_patched(config, []):
        pass
    assert f"has no torch._inductor.config.pre_grad_custom_pass: {NO_REWRITE}" in caplog.text


def test_explain_says_what_torch_lacks(caplog):
    lookup.report_missing("torch._something", NO_REWRITE)
    explanation = lmhead_pass.explain(step, *inputs())
    assert explanation.refused == [f"this torch has no torch._something: {NO_REWRITE}"]


def test_a_name_is_told_of_once(caplog):
    for _ in range(2):
        lookup.report_missing("torch._something", "something is off")
    assert caplog.text.count("has no torch._something: something is off") == 1
