"""Programs in large numbers, the same every time."""

import functools
from collections.abc import Iterator

import hypothesis

from .grammar import programs
from .program import Program
from .uniform import BACKEND

COUNT, SEED = 200, 2


def many_programs(count: int = 25 * COUNT) -> Iterator[Program]:
    """Those of ``test_two_hundred_programs``, and more of them: the first so many."""
    for start in range(0, count, COUNT):
        yield from _programs(SEED + start // COUNT)[: count - start]


@functools.cache
def _programs(seed: int) -> list[Program]:
    """``COUNT`` of them."""
    found: list[Program] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=COUNT,
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
