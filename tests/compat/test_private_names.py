"""Private names of torch: each still does what ``compat`` takes it for.

A test fails with the name of what torch has changed. test_missing.py takes them away.
"""

import contextlib
import inspect
import logging
import re
import threading
import types
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import lmhead_pass
from lmhead_pass.compat import (
    aten_trace,
    compiling,
    graphs,
    inductor,
    kernels,
    lazy_tensors,
    settings,
    symbols,
)
from lmhead_pass.compat.versions import TRANSPOSING_ATTRIBUTES
from lmhead_pass.graph_pass import the_pass
from lmhead_pass.returned.lazy_logits import LazyLogits

PACKAGE = Path(lmhead_pass.__file__).parent


def step(hidden, weight, target):
    logits = hidden @ weight.t()
    return F.cross_entropy(logits, target), logits


def inputs():
    return torch.randn(8, 16), torch.randn(200, 16, requires_grad=True), torch.arange(8)


def captured(function, *arguments, **options):
    """The modules that Dynamo makes of ``function``; each is looked at, then run as it is."""
    modules = []

    def backend(module, example_inputs):
        modules.append(module)
        return module.forward

    torch.compile(function, backend=backend, **options)(*arguments)
    return modules


def nodes_of(function, *arguments, **options):
    (module,) = captured(function, *arguments, **options)
    return list(module.graph.nodes)


def targets_of(function, *arguments):
    return [node.target for node in nodes_of(function, *arguments)]


# Canaries: what each name is taken for.


def set_grad_enabled():
    def function(x):
        with torch.no_grad():
            return x * 2

    assert graphs.SET_GRAD_ENABLED in targets_of(function, torch.ones(2, requires_grad=True))


def inference_mode():
    def function(x):
        with torch.inference_mode():
            y = x * 2
        return y + 1

    assert {graphs.ENTER_INFERENCE, graphs.EXIT_INFERENCE} <= set(
        targets_of(function, torch.ones(2))
    )


def autocast():
    def function(x):
        with torch.autocast("cpu"):
            return x @ x

    assert {graphs.ENTER_AUTOCAST, graphs.EXIT_AUTOCAST} <= set(
        targets_of(function, torch.ones(2, 2))
    )


def make_dual():
    def function(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(forward_ad.make_dual(x, x) * 2).tangent

    assert not set(graphs.MAKE_DUAL).isdisjoint(targets_of(function, torch.ones(2)))


def transposing_attributes():
    found = nodes_of(lambda x: (x.T, x.mT), torch.ones(2, 2))
    for node in found[1:3]:
        is_read = node.target is getattr and node.args[1] in ("T", "mT")
        assert is_read or node.target in TRANSPOSING_ATTRIBUTES


def transforms():
    def function(x):
        assert graphs.is_transformed(x)
        assert not graphs.is_transformed(graphs.untransformed(x))
        return x.sum()

    assert not graphs.is_transformed(torch.ones(2))
    torch.func.grad(function)(torch.ones(2))


def wrappers():
    from torch.testing._internal.two_tensor import TwoTensor

    assert graphs.is_wrapper(TwoTensor(torch.ones(2), torch.ones(2)))
    assert not graphs.is_wrapper(torch.ones(2))
    assert not graphs.is_wrapper(nn.Parameter(torch.ones(2)))


def leaves_of_trees():
    for tree_leaves in (graphs.tree_leaves, lazy_tensors.tree_leaves):
        assert tree_leaves((1, [2, {"a": None}], torch.Size([3]))) == [1, 2, None, 3]
    mapped = lazy_tensors.tree_map(lambda leaf: leaf * 2, ((1, [2]), {"a": 3}))
    assert mapped == ((2, [4]), {"a": 6})


def arguments_of_calls():
    args, kwargs = (1, [2, slice(None, 3)]), {"a": (4,)}
    assert lazy_tensors.leaves_of((args, kwargs)) == [1, 2, None, 3, None, 4]
    mapped = lazy_tensors.map_arguments(args, kwargs, lambda leaf: leaf and 10 * leaf)
    assert mapped == ((10, [20, slice(None, 30)]), {"a": (40,)})
    assert type(mapped[1]) is dict


def fake_tensors():
    (placeholder, *_) = nodes_of(lambda x: x * 2, torch.ones(2))
    value = placeholder.meta["example_value"]
    with graphs.fake_mode_of([(1, value)]):
        assert type(torch.ones(3)) is type(value)
    assert lazy_tensors.is_fake(value)
    assert not lazy_tensors.is_fake(torch.ones(2))
    mode = lazy_tensors.new_fake_mode()
    with mode:
        assert lazy_tensors.is_fake(torch.ones(2))
    assert mode.from_tensor(torch.ones(3)).shape == (3,)


def symbols_of_sizes():
    found, x = symbols.Symbols(), torch.ones(3, 5)[1:]
    fake, number = found.tensor(x, (False, True)), found.number(2.5)
    with found.block():
        assert (fake * number).shape[0] == 2
    found.take_as_equal([found.tensor(torch.ones(5), (True,)), fake])
    holds = found.condition()
    assert holds([torch.ones(2, 7), 0.5, torch.ones(7)])
    assert not holds([torch.ones(2, 7), 0.5, torch.ones(8)])
    assert not holds([torch.ones(3, 7), 0.5, torch.ones(7)])


def example_values():
    for node in nodes_of(lambda x: (x * 2).sum(), torch.ones(2)):
        assert node.op == "output" or isinstance(node.meta[graphs.EXAMPLE_VALUE], torch.Tensor)


def unbacked_bindings():
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        nodes = nodes_of(lambda x: x.nonzero() * 2, torch.ones(2))
    assert [node.target for node in nodes if node.meta.get(graphs.UNBACKED_BINDINGS)] == ["nonzero"]


def traces():
    (module,) = captured(lambda x: x @ x.t(), torch.ones(7, 3), dynamic=True)
    *_, x = [node.meta["example_value"] for node in module.graph.find_nodes(op="placeholder")]
    with torch.autocast("cpu"):
        graph = aten_trace.trace(lambda x: [(x @ x.t()) * x.size(0)], [x])
    assert torch.ops.aten.mul.Tensor in [node.target for node in graph.nodes]
    (product,) = graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    assert product.meta["val"].dtype == torch.float64  # autocast would have made it BF16


def unbacked_sizes():
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        x, nonzero, *_ = nodes_of(lambda x: x.nonzero() * 2, torch.ones(2))
    fake, value = x.meta["example_value"], nonzero.meta["example_value"]
    with fake.fake_mode:
        again = fake.clone().nonzero()
    aten_trace.bind_unbacked(fake, nonzero, again)
    assert graphs.is_known_true(again.size(0) == value.size(0))


def memory():
    nodes = nodes_of(lambda x: (x.view(-1)[1:], x * 2), torch.ones(2, 2))
    x, view, part, double = [node.meta["example_value"] for node in nodes[:4]]
    assert graphs.memory_of(x) == graphs.memory_of(view) == graphs.memory_of(part)
    assert graphs.memory_of(x) != graphs.memory_of(double)


def schemas():
    add = torch.ops.aten.add
    assert graphs.namespace_of(add.Tensor) == "aten"
    assert graphs.namespace_of(torch.add) is graphs.namespace_of(add) is None
    assert graphs.is_torch_op(add) and graphs.is_torch_op(add.Tensor)
    assert not graphs.is_torch_op(torch.add)
    assert graphs.writes_by_schema(add) and graphs.writes_by_schema(add.out)
    assert not graphs.writes_by_schema(add.Tensor)


def compile_ids():
    def part(x):
        return x.cos()

    (module,) = captured(lambda x: checkpoint(part, x, use_reentrant=False), torch.ones(2))
    whole = [graphs.is_whole(m.graph) for m in module.modules() if hasattr(m, "graph")]
    assert whole == [True, False]


def ends_of_graphs():
    def function(x):
        x = x * 2
        torch._dynamo.graph_break()
        return x + 1

    first, second = map(graphs.end_of, captured(function, torch.ones(2)))
    assert first.is_break
    assert "graph_break()" in first.stack_trace and __file__ in first.stack_trace
    assert "Explanation:" in first.text
    assert not second.is_break


def size_hints():
    (module,) = captured(lambda x: x * 2, torch.ones(7, 3), dynamic=True)
    sizes = [node.meta["example_value"] for node in module.graph.find_nodes(op="placeholder")]
    dynamic = [size for size in sizes if isinstance(size, torch.SymInt)]
    assert sorted(map(graphs.size_hint, dynamic)) == [3, 7]


def dynamic_numbers():
    seen = []

    def backend(module, example_inputs):
        seen.append(graphs.are_all_numbers_dynamic())
        return module

    for dynamic in (None, False, True):
        torch._dynamo.reset()
        torch.compile(lambda x: x * 2, backend=backend, dynamic=dynamic)(torch.ones(3))
    assert seen == [False, False, True]


def known_conditions():
    (module,) = captured(lambda x: x * 2, torch.ones(7, 3), dynamic=True)
    *_, x = [node.meta["example_value"] for node in module.graph.find_nodes(op="placeholder")]
    assert graphs.is_known_true(x.size(0) == x.size(0))
    assert graphs.is_known_true(x.size(0) + 1 == 1 + x.size(0))
    assert not graphs.is_known_true(x.size(0) == 7)  # and no guard comes of it
    assert graphs.is_known_true(1 == 1)


def checkpointed():
    found = targets_of(lambda x: checkpoint(torch.cos, x, use_reentrant=False), torch.ones(2))
    assert graphs.checkpointed_call() in found


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def autograd_functions():
    x = torch.ones(2, requires_grad=True)
    assert graphs.autograd_function_call() in targets_of(lambda x: Doubled.apply(x), x)


def legacy_reductions():
    assert graphs.reduction_of(True, True) == graphs.reduction_of(None, None) == "mean"
    assert graphs.reduction_of(False, None) == "sum"
    assert graphs.reduction_of(None, False) == "none"


def compilation():
    found = []

    def backend(module, example_inputs):
        found.append((compiling.is_compiling(), compiling.attempt(), compiling.is_part_of_ddp()))
        return module.forward

    torch.compile(lambda x: x * 2, backend=backend)(torch.ones(2))
    ((is_compiling, (context, attempt), is_part_of_ddp),) = found
    assert compiling.compile_id(context) == "0/0"
    assert is_compiling and attempt == 0 and not is_part_of_ddp
    assert not compiling.is_compiling() and compiling.attempt() is None


def ddp():
    from torch._dynamo.backends import distributed

    assert "fakify_first_call = True" in inspect.getsource(distributed)
    assert torch._guards.TracingContext(None).fakify_first_call is False


def counts():
    with compiling.counted_apart(["graph_break"]) as counters:
        captured(lambda x: (torch._dynamo.graph_break(), x * 2), torch.ones(2))
        assert any("graph_break()" in text for text in counters["graph_break"])
    assert not torch._dynamo.utils.counters["graph_break"]


def artifacts():
    found = []

    class Handler(logging.Handler):
        def emit(self, record):
            found.append((record.metadata.get("artifact"), record.payload))

    log, handler = logging.getLogger("torch.__trace"), Handler()
    log.addHandler(handler)
    try:
        compiling.keep_artifact("a name", "a text")
    finally:
        log.removeHandler(handler)
    assert found[-1:] == [({"name": "a name", "encoding": "string"}, "a text")]


def compiled_callables():
    model = nn.Linear(2, 2)
    assert compiling.uncompiled(torch.compile(model)) is model
    assert compiling.uncompiled(torch.compile(step)) is step
    assert compiling.uncompiled(step) is step


def recompile_limit():
    before = torch._dynamo.config.recompile_limit
    with compiling.without_recompile_limit():
        assert torch._dynamo.config.recompile_limit > 1000
    assert torch._dynamo.config.recompile_limit == before


def gradients_in_kernels():
    x = torch.ones(2)
    with kernels.below_autograd(), kernels.recording_gradients():
        leaf = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad((leaf * leaf).sum(), leaf)
    assert gradient.tolist() == [2, 2]


def compiled_backwards():
    """Compiled autograd sees nothing of what a kernel differentiates."""
    calls = []

    def compiler(module):
        calls.append(module)
        return module

    with torch._dynamo.compiled_autograd._enable(compiler), kernels.recording_gradients():
        leaf = torch.ones(2, requires_grad=True)
        torch.autograd.grad((leaf * leaf).sum(), leaf)
    assert not calls


def compiled_functions():
    def double(x):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            return [*torch.autograd.grad((x * x).sum(), x), None]

    compiled = inductor.compile_as_it_is(double, [((2, 3), torch.float32, "cpu")])
    gradient, nothing = compiled(torch.ones(2, 3))
    assert nothing is None
    torch.testing.assert_close(gradient, torch.full((2, 3), 2.0))


def dispatched_operations():
    names = []

    class Mode(aten_trace.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.ones(2).add(1)
    assert "aten.add.Tensor" in names


def kernels_of_devices():
    assert kernels.has_kernel("aten::addmm.out", "cpu")
    assert not kernels.has_kernel("aten::addmm.dtype_out", "cpu")


def assertions():
    kernels.check_on_device(torch.tensor(True), "a message")
    with pytest.raises(RuntimeError, match="a message"):
        kernels.check_on_device(torch.tensor(False), "a message")


def forward_mode():
    assert not kernels.is_forward_mode()
    with forward_ad.dual_level():
        assert kernels.is_forward_mode()


def below_autograd():
    x = torch.ones(2, requires_grad=True)
    with kernels.below_autograd():
        assert not (x * 2).requires_grad
    assert (x * 2).requires_grad


def reads_of_to():
    device, dtype, _, memory_format = lazy_tensors.read_to("cpu", torch.float64)
    assert (device, dtype, memory_format) == (torch.device("cpu"), torch.float64, None)
    assert lazy_tensors.read_to(torch.ones(2))[1] is torch.float32
    assert lazy_tensors.read_to(memory_format=torch.channels_last)[3] is torch.channels_last


def modes():
    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    def function(x):
        with lazy_tensors.outside_of_modes():
            assert not graphs.is_transformed(torch.ones(2) * 2)
            assert not lazy_tensors.is_inside_of_modes()
        assert lazy_tensors.is_inside_of_modes()
        return x.sum()

    with Mode() as mode, lazy_tensors.outside_of_modes():
        torch.ones(2) * 2
    assert mode.calls == 0
    assert not lazy_tensors.is_inside_of_modes()
    with Mode():
        assert lazy_tensors.is_inside_of_modes()
    torch.func.grad(function)(torch.ones(2))


class Wrapper(torch.Tensor):
    @staticmethod
    def __new__(cls):
        made = lazy_tensors.make_wrapper(cls, (2, 3), dtype=torch.float16, device="cpu")
        lazy_tensors.forbid_address(made)
        return made

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return "in __torch_function__"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(func)


class Plain(Wrapper):
    __torch_function__ = lazy_tensors.no_torch_function


def wrappers_without_memory():
    wrapper = Wrapper()
    assert wrapper.sum() == "in __torch_function__"
    with lazy_tensors.without_torch_function():
        assert wrapper.shape == (2, 3) and wrapper.dtype == torch.float16
        with pytest.raises(RuntimeError):
            wrapper.data_ptr()
    assert Plain().shape == (2, 3)


def memory_that_is_gone():
    x = torch.ones(2)
    memory = lazy_tensors.weak_memory(x.untyped_storage())
    view = x[1:].detach()
    assert memory.cdata == lazy_tensors.memory_of(x) == lazy_tensors.memory_of(view)
    del x
    assert not memory.expired()
    del view
    assert memory.expired()


def swapped_tensors():
    x, y = torch.ones(2), torch.zeros(3, requires_grad=True) * 2
    held = x
    lazy_tensors.give_history(x, y)
    assert held.shape == (3,) and held.grad_fn is not None and y.shape == (2,)


def hooks_of_saved_tensors():
    assert not compiling.are_saved_tensors_hooked()
    with torch.autograd.graph.save_on_cpu():
        assert compiling.are_saved_tensors_hooked()
        assert not compiling.is_inside_of_checkpoint()
        with torch.autograd.graph.save_on_cpu(), compiling.without_saved_tensors_hooks():
            assert not compiling.are_saved_tensors_hooked()
            torch.func.grad(torch.sin)(torch.ones(()))  # refuses hooks
        assert compiling.are_saved_tensors_hooked()
    assert not compiling.are_saved_tensors_hooked()

    def region(x):
        seen.append(compiling.is_inside_of_checkpoint())
        return x.sin()

    seen = [compiling.is_inside_of_checkpoint()]
    x = torch.ones(2, requires_grad=True)
    checkpoint(region, x, use_reentrant=False).sum().backward()
    assert seen == [False, True, True]


def seen_in_a_backward(look, go_backward):
    seen = []

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            seen.append(look(gradient))
            return gradient

    x = torch.ones((), requires_grad=True)
    go_backward(x, Function.apply(x))
    return seen


def batched_gradients():
    def several_at_once(x, y):
        torch.autograd.grad(y, x, torch.ones(2), is_grads_batched=True)

    is_batched = torch._C._functorch.is_legacy_batchedtensor
    assert seen_in_a_backward(is_batched, several_at_once) == [True]
    assert seen_in_a_backward(compiling.is_saved_for_once, several_at_once) == [False]
    assert seen_in_a_backward(compiling.is_saved_for_once, lambda x, y: y.backward()) == [True]


def kept_graphs():
    def go_backward(x, y):
        y.backward(retain_graph=True)
        y.backward()

    kept = seen_in_a_backward(lambda gradient: lazy_tensors.keeps_graph(), go_backward)
    assert kept == [True, False]


def views():
    x = torch.ones(2)
    assert graphs.is_view(x[1:]) and not graphs.is_view(x)


def versions():
    x = torch.ones(2)
    before = lazy_tensors.version_of(x)
    x.add_(1)
    assert lazy_tensors.version_of(x) == before + 1


def defaults_of_settings():
    import torch._inductor.config as config

    before = config.pre_grad_custom_pass
    found = []
    assert "pre_grad_custom_pass" in config._config
    thread = threading.Thread(target=lambda: found.append(settings.registered_passes(config)))
    try:
        settings.register_passes(config, [the_pass()], by_default=[the_pass()])
        thread.start()
        thread.join()
    finally:
        config.pre_grad_custom_pass = before
    assert found == [[the_pass()]]


def custom_passes():
    from torch._inductor import codecache

    assert issubclass(type(the_pass()), settings.cached_pass_type())
    details = codecache.FxGraphHashDetails
    assert "uuid" in inspect.getsource(details)


def caches_before_passes():
    from torch._functorch import aot_autograd

    if torch.__version__ < "2.13":
        pytest.skip("torch 2.11 asks its caches after the passes")
    source = inspect.getsource(aot_autograd.aot_module_simplified)
    early, load, late = (
        source.index(part)
        for part in ('timing == "early"', "AOTAutogradCache.try_load", 'timing == "late"')
    )
    assert early < load < late
    for kind in ("local", "remote"):
        assert f"{kind} = should_use_{kind}_autograd_cache()" in source
    assert not settings.caches_come_first()  # conftest.py turns these caches off


def folders_of_caches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp/somewhere")
        assert settings.cache_folder() == "/tmp/somewhere"


def config_modules():
    module = types.ModuleType("tests.settings")
    module.__dict__.update(number=3, __annotations__={"number": int}, __file__=__file__)
    settings.make_config_module(module)
    with module.patch(number=4):
        assert settings.settings_of(module) == {"number": 4}
    assert settings.settings_of(module) == {"number": 3}


def stable_hashes():
    from torch._functorch._aot_autograd import autograd_cache

    if torch.__version__ < "2.13":
        pytest.skip("not asked for by torch 2.11")
    assert LazyLogits._stable_hash_for_caching.__name__ in inspect.getsource(autograd_cache)


def forgotten_by_reset():
    compiling.forgotten_by_reset()["something"] = []
    assert "something" in compiling.forgotten_by_reset()
    torch._dynamo.reset()
    assert "something" not in compiling.forgotten_by_reset()


def functions_never_compiled():
    graphs = []

    @compiling.never_compiled
    def doubled(x):
        return x * 2

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(lambda x: doubled(x), backend=backend)
    assert compiled(torch.ones(2)).sum() == 4
    assert not graphs


def functions_left_to_eager():
    def backend(module, inputs):
        may_be.append(compiling.may_be_left_to_eager())
        compiling.leave_to_eager("why")

    may_be = []
    assert torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2)).sum() == 4
    with contextlib.suppress(Exception):  # older torch raises nothing
        torch.compile(lambda x: x + 1, backend=backend, fullgraph=True)(torch.ones(2))
    assert may_be == [True, False]


_CACHE = "torch._functorch._aot_autograd.autograd_cache"
CANARIES = {
    "torch._C._set_grad_enabled": set_grad_enabled,
    "torch.autograd.grad_mode._enter_inference_mode": inference_mode,
    "torch.autograd.grad_mode._exit_inference_mode": inference_mode,
    "torch.amp.autocast_mode._enter_autocast": autocast,
    "torch.amp.autocast_mode._exit_autocast": autocast,
    "torch._functorch.predispatch._make_dual": make_dual,
    "torch.ops.aten.numpy_T": transposing_attributes,
    "torch.ops.aten.mT": transposing_attributes,
    "torch._C._functorch.is_functorch_wrapped_tensor": transforms,
    "torch._C._functorch.get_unwrapped": transforms,
    "torch.utils._python_dispatch.is_traceable_wrapper_subclass": wrappers,
    "torch.utils._pytree.tree_leaves": leaves_of_trees,
    "torch.utils._pytree.tree_map": leaves_of_trees,
    "torch._subclasses.fake_tensor.FakeTensor": fake_tensors,
    "torch._subclasses.fake_tensor.is_fake": fake_tensors,
    "torch.UntypedStorage._cdata": memory,
    "torch.fx.experimental.proxy_tensor.make_fx": traces,
    "torch._dispatch.python.enable_python_dispatcher": traces,
    "torch._C._DisableAutocast": traces,
    "Node.meta['val']": traces,
    "torch.fx.experimental.symbolic_shapes.rebind_unbacked": unbacked_sizes,
    "torch._ops.OpOverload": schemas,
    "torch._ops.OpOverloadPacket": schemas,
    "torch.ops.aten.add.Tensor._schema.is_mutable": schemas,
    "Node.meta['example_value']": example_values,
    "Node.meta['unbacked_bindings']": unbacked_bindings,
    "GraphModule.meta['dynamo_compile_id']": compile_ids,
    "GraphModule.compile_subgraph_reason": ends_of_graphs,
    "SymInt.node.hint": size_hints,
    "torch._dynamo.config.assume_static_by_default": dynamic_numbers,
    "torch.fx.experimental.symbolic_shapes.statically_known_true": known_conditions,
    "torch.ops.higher_order.tag_activation_checkpoint": checkpointed,
    "torch.ops.higher_order.autograd_function_apply": autograd_functions,
    "torch.nn._reduction.legacy_get_string": legacy_reductions,
    "torch._guards.CompileContext.try_get": compilation,
    "torch._guards.CompileContext.attempt": compilation,
    "torch._guards.TracingContext.try_get": ddp,
    "torch._guards.TracingContext.fakify_first_call": ddp,
    "torch._dynamo.utils.counters": counts,
    "torch._logging.trace_structured": artifacts,
    "torch._dynamo.eval_frame.OptimizedModule": compiled_callables,
    "_orig_mod or _torchdynamo_orig_callable": compiled_callables,
    "torch._dynamo.config": recompile_limit,
    "torch._dynamo.config.recompile_limit": recompile_limit,
    "torch.Tensor._make_wrapper_subclass": wrappers_without_memory,
    "torch._C._set_throw_on_mutable_data_ptr": wrappers_without_memory,
    "torch._C.DisableTorchFunctionSubclass": wrappers_without_memory,
    "torch._C._disabled_torch_function_impl": wrappers_without_memory,
    "torch.multiprocessing.reductions.StorageWeakRef": memory_that_is_gone,
    "torch.Tensor._is_view": views,
    "torch.Tensor._version": versions,
    "torch._disable_dynamo": functions_never_compiled,
    "torch._dynamo.utils.guard_failures": forgotten_by_reset,
    "torch._dynamo.exc.SkipFrame": functions_left_to_eager,
    "torch._dynamo.symbolic_convert.InstructionTranslator.current_tx": functions_left_to_eager,
    "torch._C._swap_tensor_impl": swapped_tensors,
    "torch.fx.node.map_aggregate": arguments_of_calls,
    "torch._subclasses.fake_tensor.FakeTensorMode": fake_tensors,
    "torch.fx.experimental.symbolic_shapes.ShapeEnv": symbols_of_sizes,
    "torch.fx.experimental.symbolic_shapes.StatelessSymbolicContext": symbols_of_sizes,
    "torch.fx.experimental.symbolic_shapes.DimDynamic": symbols_of_sizes,
    "torch._dynamo.source.ConstantSource": symbols_of_sizes,
    "torch._C._autograd._get_current_graph_task_keep_graph": kept_graphs,
    "torch._C._functorch.is_legacy_batchedtensor": batched_gradients,
    "torch._C._autograd._top_saved_tensors_default_hooks": hooks_of_saved_tensors,
    "torch._C._autograd._push_saved_tensors_default_hooks": hooks_of_saved_tensors,
    "torch._C._autograd._pop_saved_tensors_default_hooks": hooks_of_saved_tensors,
    "torch._C._functorch.peek_interpreter_stack": modes,
    "torch._C._len_torch_dispatch_stack": modes,
    "torch._C._nn._parse_to": reads_of_to,
    "torch.utils._python_dispatch._disable_current_modes": modes,
    "torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack": modes,
    "torch._C._AutoDispatchBelowAutograd": below_autograd,
    "torch._C._SetExcludeDispatchKeyGuard": gradients_in_kernels,
    "torch._dynamo.compiled_autograd._disable": compiled_backwards,
    "torch._C.DispatchKey": gradients_in_kernels,
    "torch.utils._python_dispatch.TorchDispatchMode": dispatched_operations,
    "torch._inductor.compile": compiled_functions,
    "torch.autograd.forward_ad._current_level": forward_mode,
    "torch._C._dispatch_key_for_device": kernels_of_devices,
    "torch._C._dispatch_has_kernel_for_dispatch_key": kernels_of_devices,
    "torch._assert_async": assertions,
    "torch._inductor.config.pre_grad_custom_pass": defaults_of_settings,
    "torch._inductor.config._config[...].default": defaults_of_settings,
    "torch._inductor.config": defaults_of_settings,
    f"{_CACHE}.should_use_local_autograd_cache": caches_before_passes,
    f"{_CACHE}.should_use_remote_autograd_cache": caches_before_passes,
    "torch._inductor.runtime.cache_dir_utils.cache_dir": folders_of_caches,
    "torch._inductor.custom_graph_pass": custom_passes,
    "torch._inductor.custom_graph_pass.CustomGraphPass": custom_passes,
    "torch.utils._config_module.install_config_module": config_modules,
    "_stable_hash_for_caching": stable_hashes,
}


@pytest.mark.parametrize("name", CANARIES)
def test_torch_still_has(name):
    CANARIES[name]()


def test_every_private_name_has_a_canary():
    text = "".join(path.read_text() for path in (PACKAGE / "compat").glob("*.py"))
    names = set(re.findall(r'"(torch(?:\.\w+)*\._?\w[\w.]*)"', text))
    names -= {"torch._make_dual"}  # in older torch
    assert names - set(CANARIES) == set()


def test_private_names_are_in_compat_alone():
    private = re.compile(r"torch\._(?!_)|torch\.\w+\._(?!_)|_C\.|from torch\S* import _|\bmeta\[\"")
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "compat":
            continue
        code = re.sub(r'"""[\s\S]*?"""|#.*|f?"[^"\n]*"', "", path.read_text())
        assert not private.search(code), path
