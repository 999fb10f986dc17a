"""Generated programs: the pass is right about them, and would be found out if it were not."""

import dataclasses
import functools
from collections import Counter

import hypothesis
import pytest
import torch

from lmhead_pass import mutation, ops, rows
from lmhead_pass.kernels import aten

from .programs.checking import Wrong, check
from .programs.fuzz import Statistics
from .programs.grammar import KINDS, programs
from .programs.program import Program, forget
from .programs.uniform import BACKEND

COUNT, SEED = 200, 1


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    forget()


@functools.cache
def many_programs() -> list[Program]:
    """Those of ``test_two_hundred_programs``, and many more."""
    found: list[Program] = []

    @hypothesis.seed(SEED)
    @hypothesis.settings(
        max_examples=15 * COUNT,
        database=None,
        deadline=None,
        backend=BACKEND,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(programs())
    def gather(program):
        found.append(program)

    gather()
    return found


@pytest.mark.filterwarnings("ignore")
def test_two_hundred_programs():
    """With the pass and without, all that the caller sees is the same but for rounding."""
    statistics = Statistics()

    @hypothesis.seed(SEED)
    @hypothesis.settings(
        max_examples=COUNT,
        database=None,
        deadline=None,
        backend=BACKEND,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck),
        report_multiple_bugs=False,
    )
    @hypothesis.given(programs())
    def right(program):
        statistics.add(program, check(program))

    right()
    assert statistics.programs >= COUNT
    assert statistics.rewritten > 0.3 * COUNT
    assert sum(statistics.raised.values()) < 0.1 * COUNT
    assert statistics.blunt < 0.05 * COUNT


def test_every_part_of_the_grammar_occurs():
    """Often enough to be met now and then."""
    counts = Counter(kind for program in many_programs() for kind in program.kinds)
    assert {kind: counts[kind] for kind in KINDS if counts[kind] < 3} == {}


def test_a_failure_is_shown_as_a_script_that_runs():
    program = many_programs()[-1]
    names: dict[str, object] = {}
    exec(program.script("why"), names)
    assert names["SOURCE"] == program.source


def test_a_failure_of_the_pass_is_no_failure_of_the_program(monkeypatch):
    """The program would raise it in both runs, since it is compiled once."""

    def fail(*_):
        raise ArithmeticError("on purpose")

    monkeypatch.setattr("lmhead_pass.rewriter.emit_call", fail)
    with pytest.raises(Wrong, match="ArithmeticError in the pass: on purpose"):
        for program in many_programs()[:COUNT]:
            check(program)


# Mistakes that the pass might make, planted to see that they are found.


def without_writers(patch):
    patch.setattr(mutation, "writers", lambda nodes, of: iter(()))


def _with_problem(patch, change):
    """Let the op compute another problem than it is asked."""
    for name in ("forward", "forward_and_gradients", "backward"):
        original = getattr(aten, name)
        patch.setattr(
            aten,
            name,
            lambda problem, *more, original=original: original(change(problem), *more),
        )


def without_ignored_rows(patch):
    def change(problem):
        counted = problem.target != problem.ignore_index
        return dataclasses.replace(problem, target=torch.where(counted, problem.target, 0))

    _with_problem(patch, change)


def without_bias(patch):
    _with_problem(patch, lambda problem: dataclasses.replace(problem, bias=None))


def without_class_weights(patch):
    _with_problem(patch, lambda problem: dataclasses.replace(problem, class_weight=None))


def without_label_smoothing(patch):
    _with_problem(patch, lambda problem: dataclasses.replace(problem, label_smoothing=0.0))


def mean_over_all_rows(patch):
    class Rows(aten._Rows):
        def __init__(self, problem):
            super().__init__(problem)
            if problem.reduction == "mean":
                self.denominator = torch.full_like(self.denominator, len(problem.target))

    patch.setattr(aten, "_Rows", Rows)


def without_last_partial_chunk(patch):
    original = aten._chunks

    def chunks(problem, rows):
        size = 0
        for chunk, hidden, logits in original(problem, rows):
            if hidden.size(0) < size:
                logits = torch.zeros_like(logits)
            size = hidden.size(0)
            yield chunk, hidden, logits

    patch.setattr(aten, "_chunks", chunks)


def without_upstream_gradient(patch):
    patch.setattr(ops, "_scale", lambda gradient, factor: gradient)


def with_one_upstream_gradient_for_all_rows(patch):
    original = aten.backward

    def backward(problem, needed, row_max, log_sum, grad_losses):
        mean = grad_losses.mean().expand_as(grad_losses)
        return original(problem, needed, row_max, log_sum, mean)

    patch.setattr(aten, "backward", backward)


def with_gradients_off_by_a_percent(patch):
    original = aten._GradientSums.finish

    def finish(self):
        hidden, weight, bias = original(self)
        return aten.Gradients(hidden, weight * 1.01, bias)

    patch.setattr(aten._GradientSums, "finish", finish)


def with_softmax_in_half_precision(patch):
    original = aten._exponentiate_

    def exponentiate_(block, rows, part):
        loss, nll, log_sum = original(block, rows, part)
        return loss.bfloat16().to(loss.dtype), nll, log_sum

    patch.setattr(aten, "_exponentiate_", exponentiate_)


MISTAKES = [
    without_writers,
    without_ignored_rows,
    without_bias,
    without_class_weights,
    without_label_smoothing,
    mean_over_all_rows,
    without_last_partial_chunk,
    without_upstream_gradient,
    with_one_upstream_gradient_for_all_rows,
    with_gradients_off_by_a_percent,
    with_softmax_in_half_precision,
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("plant", MISTAKES)
def test_a_mistake_is_found(plant, monkeypatch):
    """By the very programs that all pass without it."""
    plant(monkeypatch)
    assert_found(many_programs()[:COUNT])


def without_operators_that_write(patch):
    patch.setattr(mutation, "_WRITING_OPERATORS", set())


def without_writes_to_views(patch):
    patch.setattr(mutation, "memory_of", lambda node: {id(node)})


def with_any_part_of_the_vocabulary(patch):
    patch.setattr(rows, "_takes_all", lambda part, size: isinstance(part, slice))


RARE_MISTAKES = {
    without_operators_that_write: {"hidden_setitem_later", "hidden_isub"},
    without_writes_to_views: {"hidden_view_written", "weight_view_written", "bias_view_written"},
    with_any_part_of_the_vocabulary: {"vocabulary_prefix"},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("plant", RARE_MISTAKES)
def test_a_mistake_about_rare_parts_is_found(plant, monkeypatch):
    """By those of many programs that have such a part."""
    plant(monkeypatch)
    parts = RARE_MISTAKES[plant]
    assert_found(
        program
        for program in many_programs()
        if any(kind.split(".")[-1] in parts for kind in program.kinds)
    )


def assert_found(candidates):
    """That the pass is wrong about one of these programs, and no error tells the user."""
    for program in candidates:
        try:
            check(program)
        except Wrong as wrong:
            if not wrong.what.startswith("raised"):
                return
        except RuntimeError:
            pass  # an error while the pass ran
    pytest.fail("not found")
