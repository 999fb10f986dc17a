"""A backend for hypothesis that draws every choice evenly and afresh.

Hypothesis's own favours small numbers and makes most examples from parts of the ones before. In a
grammar that is the same few statements again and again. Failures are shrunk as ever.
"""

from hypothesis.internal.conjecture.providers import AVAILABLE_PROVIDERS, HypothesisProvider

BACKEND = "uniform"


class _UniformProvider(HypothesisProvider):
    def draw_integer(self, min_value=None, max_value=None, **options):
        if min_value is None or max_value is None:
            return super().draw_integer(min_value, max_value, **options)
        return self._random.randint(min_value, max_value)


AVAILABLE_PROVIDERS[BACKEND] = _UniformProvider
