"""Importing registers the pass, beside other people's, and can be undone."""

import threading

import pytest
import torch
import torch._inductor.config as inductor_config
from torch._dynamo.utils import counters

import lmhead_pass
from lmhead_pass import compat
from lmhead_pass.graph_pass import the_pass

from .forms import flat, inputs
from .process import output_of, run_python


def registered():
    return compat.passes_in(inductor_config.pre_grad_custom_pass)


def other_pass(graph):
    """Somebody else's."""


def test_importing_registers_once():
    import importlib

    assert registered().count(the_pass()) == 1
    importlib.reload(lmhead_pass)
    lmhead_pass.register()
    assert registered().count(the_pass()) == 1


def test_unregister_and_register():
    lmhead_pass.unregister()
    try:
        assert the_pass() not in registered()
    finally:
        lmhead_pass.register()
    assert registered() == [the_pass()]


def test_other_passes_stay():
    with inductor_config.patch(pre_grad_custom_pass=compat.pass_setting([other_pass])):
        lmhead_pass.register()
        assert registered() == [other_pass, the_pass()]
        lmhead_pass.unregister()
        assert registered() == [other_pass]
        lmhead_pass.register()
        with lmhead_pass.disabled():
            assert registered() == [other_pass]
        assert registered() == [other_pass, the_pass()]


def test_both_passes_run():
    seen = []
    setting = compat.pass_setting([lambda graph: seen.append(graph), the_pass()])
    hidden, weight, _, target = inputs()
    with inductor_config.patch(pre_grad_custom_pass=setting):
        torch.compile(lambda h, w, y: flat(h @ w.t(), y))(hidden, weight, target)
    assert len(seen) == 1
    assert counters["lmhead_pass"] == {"rewritten": 1}


def test_disabled_suspends_what_is_compiled_inside():
    hidden, weight, _, target = inputs()
    function = torch.compile(lambda h, w, y: flat(h @ w.t(), y), dynamic=False)
    with lmhead_pass.disabled():
        function(hidden, weight, target)
    assert not counters["lmhead_pass"]
    function(hidden[:2], weight, target[:2])  # compiled again, outside
    assert counters["lmhead_pass"] == {"rewritten": 1}


def test_other_threads_have_the_pass_too():
    seen = []
    thread = threading.Thread(target=lambda: seen.extend(registered()))
    thread.start()
    thread.join()
    assert seen == [the_pass()]


@pytest.mark.parametrize(
    "imports",
    [
        "import lmhead_pass, torch",
        "import torch, lmhead_pass",
        "import torch._inductor.config, lmhead_pass",
        "import torch._dynamo, lmhead_pass",
        "import lmhead_pass, torch._dynamo",
        "import lmhead_pass.graph_pass",
        "import lmhead_pass.plan",
    ],
)
def test_in_any_order_of_imports(imports):
    code = f"""
        {imports}
        import torch._inductor.config
        print(torch._inductor.config.pre_grad_custom_pass)
    """
    before_torch = imports == "import lmhead_pass, torch"
    assert "LMHeadPass" in output_of(code, is_fresh=before_torch)


def test_unregister_before_inductor_is_imported():
    assert (
        output_of("""
        import lmhead_pass
        lmhead_pass.unregister()
        import torch._inductor.config
        print(torch._inductor.config.pre_grad_custom_pass)
    """)
        == "None"
    )


def test_import_is_light():
    """Importing costs next to nothing beside torch: no Inductor, no Dynamo, no Triton."""
    heavy = ("torch._inductor", "torch._dynamo", "triton", "sympy", "numpy")
    code = """
        import sys, torch
        before = set(sys.modules)
        import lmhead_pass
        added = set(sys.modules) - before
        print(*(name for name in {heavy} if name in added))
    """
    assert output_of(code.format(heavy=heavy)) == ""
    # The check can fail:
    assert output_of(code.format(heavy=("lmhead_pass",))) == "lmhead_pass"


def test_logs_can_be_asked_for_without_importing():
    """TORCH_LOGS makes torch import the package while torch itself is still importing."""
    done = run_python("import torch; print('done')", is_fresh=True, TORCH_LOGS="+lmhead_pass")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "done"
