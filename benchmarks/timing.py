"""Times that can be compared although the speed of a machine drifts."""

import statistics
import time
from collections.abc import Callable, Mapping

Step = Callable[[], None]


def alternate(
    steps: Mapping[str, Step], rounds: int, measure: Callable[[Step], float]
) -> dict[str, list[float]]:
    """What ``measure`` says of each step in each round.

    A round runs each step once, forwards and backwards in turn (A B B A), so that no step is
    favoured by its place. The first round is dropped.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(rounds + 1):
        for name in reversed(names) if number % 2 else names:
            elapsed = measure(steps[name])
            if number:
                times[name].append(elapsed)
    return times


def seconds(step: Step) -> float:
    """By the clock on the wall."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def ratio(times: Mapping[str, list[float]], name: str, base: str) -> float:
    """The median over rounds of ``name``'s time in units of ``base``'s in the same round."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))
