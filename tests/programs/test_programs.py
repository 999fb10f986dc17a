"""Generated programs: with the pass and without, all that the caller sees is the same."""

import hypothesis
import pytest

from lmhead_pass.plan import returned_plan

from .checking import Wrong, check
from .fuzz import Statistics
from .grammar import KINDS, programs
from .many import COUNT, SEED, many_programs
from .program import forget
from .row_wise import row_wise_programs
from .uniform import BACKEND


@pytest.fixture(autouse=True)
def _on_one_thread(one_thread):
    yield
    forget()


def check_programs(count, strategy):
    """With the pass and without, all that the caller sees is the same but for rounding."""
    statistics = Statistics()

    @hypothesis.seed(SEED)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        backend=BACKEND,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck),
        report_multiple_bugs=False,
    )
    @hypothesis.given(strategy)
    def right(program):
        statistics.add(program, check(program))

    right()
    assert statistics.programs >= count
    return statistics


@pytest.mark.filterwarnings("ignore")
def test_two_hundred_programs():
    statistics = check_programs(COUNT, programs())
    assert statistics.rewritten > 0.3 * COUNT
    assert sum(statistics.raised.values()) < 0.15 * COUNT
    assert statistics.blunt < 0.05 * COUNT


@pytest.mark.filterwarnings("ignore")
def test_programs_whose_losses_are_outside(monkeypatch):
    monkeypatch.setattr(returned_plan, "_WIDER", 1)  # sizes are small
    assert check_programs(15, programs(border=True)).rewritten >= 3


@pytest.mark.filterwarnings("ignore")
def test_programs_that_treat_rows_apart():
    assert check_programs(25, row_wise_programs()).rewritten >= 5


def test_every_part_of_the_grammar_occurs():
    """Often enough to be met now and then."""
    counts = dict.fromkeys(KINDS, 0)
    for program in many_programs():
        counts.update({kind: counts[kind] + 1 for kind in program.kinds & KINDS})
        if min(counts.values()) == 3:
            break
    assert {kind: count for kind, count in counts.items() if count < 3} == {}


def test_a_failure_is_shown_as_a_script_that_runs():
    program = next(many_programs())
    names: dict[str, object] = {}
    exec(program.script("why"), names)
    assert names["SOURCE"] == program.source


def test_a_failure_of_the_pass_is_no_failure_of_the_program(monkeypatch):
    """The program would raise it in both runs, since it is compiled once."""

    def fail(*_, **__):
        raise ArithmeticError("on purpose")

    monkeypatch.setattr("lmhead_pass.rewrite.rewrite_graph", fail)
    with pytest.raises(Wrong, match="ArithmeticError in the pass: on purpose"):
        for program in many_programs(COUNT):
            check(program)
