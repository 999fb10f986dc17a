"""Runs generated programs until told to stop: ``python -m tests.programs.fuzz --help``.

Each failure is shrunk and printed as a script that runs again. The search then goes on, and counts
what looks like the same failure without reporting it again.
"""

import argparse
import contextlib
import io
import os
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import torch
from hypothesis.strategies import SearchStrategy

from lmhead_pass.plan import returned_plan

from ..inductor import without_codegen
from .checking import Verdict, Wrong, check
from .grammar import KINDS, programs
from .program import Program, forget
from .row_wise import row_wise_programs
from .uniform import BACKEND

_BATCH = 200
_SHRINKING_SECONDS = 20


@dataclass
class Statistics:
    """What became of the programs that were run."""

    programs: int = 0
    rewritten: int = 0
    blunt: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    raised: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    rewritten_kinds: Counter[str] = field(default_factory=Counter)

    def add(self, program: Program, verdict: Verdict) -> None:
        """Count one more program."""
        self.programs += 1
        self.kinds.update(program.kinds)
        self.refusals.update(set(verdict.refusals))
        if verdict.rewritten:
            self.rewritten += 1
            self.rewritten_kinds.update(program.kinds)
        if verdict.raised:
            self.raised[verdict.raised] += 1
        self.blunt += verdict.blunt

    def print(self, seconds: float) -> None:
        """Say it to the user."""
        count = max(1, self.programs)
        print(
            f"\n{self.programs} programs in {seconds:.0f} s ({self.programs / seconds:.1f}/s); "
            f"{self.rewritten} ({self.rewritten / count:.0%}) with a rewrite, "
            f"{sum(self.raised.values())} raise an error by themselves, "
            f"{self.blunt} so ill-conditioned that little is said by their values"
        )
        _print_counts("left alone, programs by reason", self.refusals)
        _print_counts("errors of the programs themselves", self.raised)
        _print_counts("FAILURES", self.failures)
        never = sorted(KINDS - set(self.rewritten_kinds))
        print(f"\nparts that no rewritten program had ({len(never)}): {', '.join(never)}")


def _print_counts(title: str, counts: Counter[str]) -> None:
    if counts:
        print(f"\n{title}:")
        for text, count in counts.most_common(60):
            print(f"{count:8} {text}")


@dataclass(frozen=True)
class _Failure:
    """A failure that was reported, to know others of the same kind by."""

    what: str
    kinds: frozenset[str]

    def explains(self, program: Program, wrong: Wrong) -> bool:
        """Whether ``wrong`` is probably the same again."""
        return wrong.what == self.what and self.kinds <= program.kinds


class Search:
    """Batches of programs, and what they found."""

    def __init__(self, strategy: SearchStrategy[Program]) -> None:
        self.statistics = Statistics()
        self._strategy = strategy
        self._known: list[_Failure] = []

    def batch(self, seed: int, size: int, go_on: Callable[[], bool]) -> None:
        """Run ``size`` programs, fewer once ``go_on`` says no; report failures not seen before."""
        found: list[tuple[Program, Wrong]] = []  # all one failure, smaller and smaller
        shrink_until = float("inf")

        def try_one(program: Program) -> None:
            nonlocal shrink_until
            if time.monotonic() > shrink_until or not (found or go_on()):
                return
            try:
                verdict = _check(program)
            except Wrong as wrong:
                if any(failure.explains(program, wrong) for failure in self._known):
                    self.statistics.failures[f"{wrong.what} (again)"] += 1
                    return
                if found and found[0][1].what != wrong.what:
                    return  # another one: let this be shrunk first
                if not found:
                    shrink_until = time.monotonic() + _SHRINKING_SECONDS
                found.append((program, wrong))
                raise
            if not found:
                self.statistics.add(program, verdict)

        test = hypothesis.given(self._strategy)(try_one)
        test = hypothesis.settings(
            max_examples=size,
            database=None,
            deadline=None,
            backend=BACKEND,
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
            suppress_health_check=list(hypothesis.HealthCheck),
            report_multiple_bugs=False,
            verbosity=hypothesis.Verbosity.quiet,
        )(hypothesis.seed(seed)(test))
        try:
            test()
        except (Wrong, hypothesis.errors.HypothesisException):
            if not found:
                raise
            self._report(*min(found, key=lambda item: len(item[0].source)))

    def _report(self, program: Program, wrong: Wrong) -> None:
        self._known.append(_Failure(wrong.what, program.kinds))
        self.statistics.failures[wrong.what] += 1
        print("=" * 100)
        print(program.script(str(wrong)), flush=True)


def _check(program: Program) -> Verdict:
    """``check``, but whatever the pass raises of its own is a failure, too."""
    try:
        # FX prints what a program raises.
        with contextlib.redirect_stderr(io.StringIO()):
            return check(program)
    except Wrong:
        raise
    except Exception as error:
        raise Wrong(f"raised {type(error).__name__} while checking", str(error)) from error


def main() -> int:
    """Search as the command line says; 1 if something was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, help="stop after this many")
    parser.add_argument("--seconds", type=float, help="stop after this time")
    parser.add_argument("--seed", type=int, help="where to start; by default somewhere new")
    parser.add_argument("--border", action="store_true", help="compile no more than the head")
    parser.add_argument("--row-wise", action="store_true", help="losses without a fused form")
    parser.add_argument("--codegen", action="store_true", help="compile these with generated code")
    options = parser.parse_args()
    strategy = (row_wise_programs if options.row_wise else programs)(border=options.border)
    if options.border:
        returned_plan._WIDER = 1  # sizes are small
    seed = options.seed if options.seed is not None else int(time.time()) * 1000
    print(f"seed {seed}; stop with Ctrl-C", flush=True)
    warnings.simplefilter("ignore")
    # A summary for whoever stops it in another way, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    torch.set_num_threads(1)
    # It flushes the processor's caches, which takes a quarter of the time of a program.
    torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0  # type: ignore[assignment]
    search, start = Search(strategy), time.monotonic()

    def go_on() -> bool:
        done = search.statistics.programs
        late = options.seconds and time.monotonic() - start > options.seconds
        return not late and not (options.programs and done >= options.programs)

    try:
        with nullcontext() if options.codegen else without_codegen():
            while go_on():
                search.batch(seed, _BATCH, go_on)
                forget()
                seed += 1
                if seed % 2 == 0:
                    count = search.statistics
                    print(
                        f"{count.programs} programs, {count.rewritten} with a rewrite, "
                        f"{sum(count.failures.values())} failures, "
                        f"{time.monotonic() - start:.0f} s",
                        flush=True,
                    )
    except KeyboardInterrupt:
        pass
    search.statistics.print(time.monotonic() - start)
    return bool(search.statistics.failures)


if __name__ == "__main__":
    sys.exit(main())
