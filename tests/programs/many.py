"""Programs in large numbers, the same every time."""

import functools

import hypothesis

from .grammar import programs
from .program import Program
from .uniform import BACKEND

COUNT, SEED = 200, 1


@functools.cache
def many_programs(count: int = 15 * COUNT) -> list[Program]:
    """Those of ``test_two_hundred_programs``, and more of them: the first so many."""
    found: list[Program] = []

    @hypothesis.seed(SEED)
    @hypothesis.settings(
        max_examples=count,
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
