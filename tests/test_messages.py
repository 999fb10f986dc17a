"""Each warning and error of the package names a setting, an argument, a page or what to do.

What is refused is told in the log instead, by reason: tests/plan/test_refusals.py and others.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lmhead_pass
from lmhead_pass.log import REPORT_TO

PACKAGE = Path(lmhead_pass.__file__).parent
TESTS = Path(__file__).parent

# Where a text comes from, its beginning, what in it helps, and the test that meets it. A brace
# stands for what is filled in; "eager's": the text is that of PyTorch, for the same mistake.
TABLE = [
    ("__main__", "{}", "argument", "command_line/test_estimate.py::test_bad_arguments_are_named"),
    ("compat/lookup", "torch %s has no %s", "A newer lmhead_pass", "compat/test_missing.py::"
     "test_logits_are_not_returned_lazily_without"),
    ("compat/versions", "lmhead_pass was tested with torch", "A newer lmhead_pass",
     "compat/test_versions.py::test_a_newer_version_is_warned_of_and_used"),
    ("config", "lmhead_pass.config.{} takes", "lmhead_pass.config.{}",
     "test_config.py::test_bad_values"),
    ("config", "lmhead_pass.config: there is no {}", "There are {}",
     "test_config.py::test_an_unknown_setting_is_an_error_that_lists_the_right_ones"),
    ("op/memory_budget", "lmhead_pass.config.memory_budget is {} bytes", "takes at least {}",
     "op/test_memory_budget.py::test_the_sum_counts"),
    ("op/memory_budget", "lmhead_pass.config.memory_budget = %d leaves", "set it to %d",
     "op/test_memory_budget.py::test_a_budget_of_one_row_per_chunk_is_warned_of_once"),
    ("op/kernels/aten_loop", "Target {} is out of bounds.", "eager's",
     "op/test_op.py::test_out_of_range_target_is_an_error"),
    ("op/kernels/measures", "lmhead_pass: linear_cross_entropy {}. It has {}.", "It has {}",
     "op/test_measures.py::test_names_that_are_none"),
    ("op/kernels/measures", "takes each measure once", "{}",
     "op/test_op.py::test_nonsense_is_refused_by_name"),
    ("op/kernels/measures", "has no measure", "{}",
     "op/test_op.py::test_nonsense_is_refused_by_name"),
    ("op/kernels/measures", "takes at least 1 word", "{}",
     "op/test_op.py::test_nonsense_is_refused_by_name"),
    ("op/kernels/measures", "takes {} of {} words", "{}",
     "op/test_op.py::test_nonsense_is_refused_by_name"),
    ("op/problem", "lmhead_pass: linear_cross_entropy {}", "{}",
     "op/test_op.py::test_nonsense_is_refused_by_name"),
    ("op/problem", "takes a {} for each row with reduction 'sum'", "reduction 'sum' only",
     "op/test_op.py::test_nonsense_is_refused_by_name"),
    ("op/problem", "takes {} as {}, not {}", "as {}",
     "op/test_op.py::test_nonsense_is_refused_by_name"),
    ("op/problem", "takes a matrix as {}", "as {}",
     "op/test_op.py::test_nonsense_is_refused_by_name"),
    ("op/problem", "takes a weight of {} columns", "weight",
     "op/test_op.py::test_nonsense_is_refused_by_name"),
    ("op/problem", "takes a target of torch.int64", "target of torch.int64",
     "op/test_op.py::test_nonsense_is_refused_by_name"),
    ("op/problem", "takes one number for each {}", "as {}",
     "op/test_op.py::test_nonsense_is_refused_by_name"),
    ("op/kernels/compiled_blocks", "lmhead_pass: what is done to each row is run by ATen",
     "python -m lmhead_pass env", "rowwise/test_compiled.py::test_without_a_compiler"),
    ("compat/inductor", "torch lacks what it takes", "torch lacks",
     "rowwise/test_compiled.py::test_without_a_compiler"),
    ("op/row_ops", "lmhead_pass: what is computed chunk by chunk has no second derivative",
     "with lmhead_pass.disabled()", "rowwise/test_losses.py::test_second_derivative_is_an_error"),
    ("op/torch_ops", "lmhead_pass: linear_cross_entropy has no second derivative",
     "with lmhead_pass.disabled()", "op/test_op.py::test_double_backward_is_refused"),
    ("returned/cells", "lmhead_pass: one of the variables needed", "or set {}",
     "outside/test_writes.py::test_a_write_by_a_name_that_is_not_known"),
    ("returned/history", "lmhead_pass: a gradient would flow into logits", "or set {}",
     "returned/test_gradients.py::"
     "test_a_custom_function_of_what_was_returned_refuses_a_gradient"),
    ("returned/history", "lmhead_pass: the head of logits", "or set {}",
     "returned/test_gradients.py::test_a_head_that_has_changed_has_no_gradient_for_old_logits"),
    ("returned/history", "lmhead_pass: one of the variables needed", "or set {}",
     "returned/test_gradients.py::test_a_head_that_has_changed_has_no_gradient_for_old_logits"),
    ("returned/history", "Trying to backward through the graph a second time", "eager's",
     "returned/test_gradients.py::test_no_gradient_twice_without_retain_graph"),
    ("returned/history", "{}", "eager's",
     "returned/test_gradients.py::test_a_write_to_logits_of_which_a_piece_is_held"),
    ("returned/writes", "{} Variable that requires grad", "eager's",
     "returned/test_sequences.py::test_values_views_and_gradients"),
    ("returned/writes", "lmhead_pass: logits that a compiled model", "or set {}",
     "outside/test_writes.py::test_another_form_in_place"),
    ("returned/recipe", "lmhead_pass: these logits were returned without", "or set {}",
     "returned/test_changes.py::test_reading_after_a_change_raises"),
    ("rewrite/report", "lmhead_pass failed on a graph, which", "lmhead_pass.config.strict",
     "rewrite/test_rewriter.py::test_failure_inside_the_pass_leaves_the_graph_alone"),
    ("rewrite/report", "lmhead_pass failed on a graph and left it", "Please report this at %s",
     "rewrite/test_rewriter.py::test_failure_inside_the_pass_leaves_the_graph_alone"),
]  # fmt: skip
# These raise or build what the table has, or what is caught in the package.
NO_TEXT_OF_THEIRS = {
    "Refused",
    "Mixes",
    "IsWide",
    "NeedsHead",
    "AssertionError",
    "_too_late",
    "_unknown",
    "TypeError",
}


def texts() -> Iterator[tuple[str, str]]:
    """Each warning and error of the package: its module, and its text."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = str(path.relative_to(PACKAGE).with_suffix(""))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise):
                call = node.exc
            elif isinstance(node, ast.Return) and isinstance(node.value, ast.Call):
                call = node.value if ast.unparse(node.value.func).endswith("Error") else None
                if module == "config" and isinstance(node.value, ast.JoinedStr):
                    call = None
            elif isinstance(node, ast.Call):
                is_told = ast.unparse(node.func) in ("warnings.warn", "log.warning", "log.error")
                call = node if is_told else None
            else:
                continue
            if isinstance(call, ast.Call) and call.args:
                kind = ast.unparse(call.func)
                is_made_elsewhere = isinstance(call.args[0], ast.Call)
                if kind not in NO_TEXT_OF_THEIRS and "find(" not in kind and not is_made_elsewhere:
                    yield module, literal(call.args[0])
    unknown = (PACKAGE / "config.py").read_text()
    (text,) = re.findall(r'return f"(lmhead_pass.config: there is no .*)"', unknown)
    yield "config", re.sub(r"{[^{}]*}", "{}", text)


def literal(node: ast.AST) -> str:
    """A text as it stands in the code, with ``{}`` for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(literal, node.values))
    return "{}"


def test_each_text_is_in_the_table_and_helps():
    rows = list(TABLE)
    for module, text in texts():
        found = [row for row in rows if row[0] == module and text.startswith(row[1])]
        assert found, (module, text)
        row = max(found, key=lambda row: len(row[1]))
        helps = row[2] == "eager's" or row[2] == "argument" or row[2] in text
        assert helps, (module, text, row[2])
        rows.remove(row)
    assert rows == []


@pytest.mark.parametrize("test", sorted({row[3] for row in TABLE}))
def test_each_text_has_a_test(test):
    file, _, name = test.partition("::")
    assert f"def {name}" in (TESTS / file).read_text()


# Why a sum is not fused is told to nobody: its losses are, row by row.
SAID_TO_NOBODY = PACKAGE / "sums"


def nodes() -> Iterator[tuple[Path, ast.AST]]:
    """The syntax of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            yield path, node


def reasons() -> Iterator[str]:
    """The texts of what is refused, where they are not of another refusal."""
    for path, node in nodes():
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Refused":
            text = node.args[0]
            if path.parent != SAID_TO_NOBODY:
                yield literal(text.values[-1] if isinstance(text, ast.BoolOp) else text)


def test_each_reason_is_in_a_section_of_troubleshooting():
    page = " ".join((TESTS.parent / "docs/troubleshooting.md").read_text().split())
    section = page.split("## Left alone ")[1].split(" ## Deferred")[0]
    words = re.findall(r'"([^"]+)"', section)
    texts = set(reasons()) - {""}
    assert len(texts) > 80
    assert [text for text in texts if not any(part in text for part in words)] == []
    texts |= {literal(n) for _, n in nodes() if isinstance(n, ast.Constant | ast.JoinedStr)}
    assert [part for part in words if not any(part in text for text in texts)] == []


def test_failures_are_reported_to_the_repository():
    project = (TESTS.parent / "pyproject.toml").read_text()
    assert f'Issues = "{REPORT_TO}"' in project
