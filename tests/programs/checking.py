"""Whether the pass was wrong about a program: everything a caller sees, with it and without.

What the pass left alone has to be the same to the bit. What it rewrote has to be as near to the
exact values as the program itself, but for rounding. How much that is differs from program to
program: it is measured, by running the program with a little noise after each of its steps.
"""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.utils import counters

import lmhead_pass
from lmhead_pass.op.kernels import compiled_blocks, row_loop

from .border import has_border
from .mistakes import Rewritten
from .program import Inputs, Program
from .running import Captured, Outcome, noise, run

# As many as are needed: most programs do not stray further than without noise.
_NOISE_RUNS = (0, 3, 24)
_FACTOR = 3
# Errors about the logits themselves, which are not there any more, or are compiled by Inductor.
_LOST = (
    "expected scalar type",
    "modified by an inplace operation",
    "has been modified inplace",
    "Inplace update to inference tensor outside",
    "Inference tensors cannot be saved for backward",
)
# Nothing announces writes to a head outside of what is compiled: a late reading raises, and so does
# the backward of a loss that is computed again in it.
_WATCHED = "the head's"
_WRITTEN = "modified by an inplace operation"


class Wrong(AssertionError):
    """The pass changed what a program does."""

    def __init__(self, what: str, detail: str):
        super().__init__(f"{what}: {detail}")
        self.what = what
        """What differs, without numbers: the same for all failures of one kind."""


@dataclass
class Verdict:
    """What became of a program in which the pass was not wrong."""

    rewritten: int = 0
    refusals: list[str] = field(default_factory=list)
    """The reasons, without what differs from program to program."""
    raised: str | None = None
    """What the program itself raised."""
    blunt: bool = False
    """Whether rounding alone may change the loss by more than it is allowed to be unseen: a part in
    a thousand, or a tenth with dtypes of 16 bits."""


def check(program: Program) -> Verdict:
    """Run ``program`` with the pass and without; ``Wrong`` if they differ."""
    return Trial(program).verdict


class Trial:
    """A program in which the pass was not wrong; a mistake may be planted, and run at once."""

    def __init__(self, program: Program):
        self.verdict = Verdict()
        torch._dynamo.reset()
        counters.clear()
        self._captured = Captured(program.function(), dynamic=program.more_inputs is not None)
        self._program = program
        self._calls: list[_Call] = []
        with self._settings(), _refusals(self.verdict.refusals):
            for inputs in (program.inputs, program.more_inputs):
                if inputs is not None:
                    call = _Call(self._captured, program, inputs)
                    call.check(self.verdict)
                    self._calls.append(call)

    @contextmanager
    def _settings(self) -> Iterator[None]:
        settings = lmhead_pass.config.patch(
            strict=True,
            min_vocab_size=2,
            returned_logits=self._program.returned_logits,
            batch_chunk_size=self._program.batch_chunk_size,
        )
        dynamo = torch._dynamo.config.patch(
            capture_dynamic_output_shape_ops=self._program.captures_unknown_numbers,
            capture_scalar_outputs=self._program.captures_unknown_numbers,
        )
        with settings, dynamo, self._blocks():
            yield

    def _blocks(self) -> Any:
        """What is done to each row is run by ATen, or as Inductor compiles it."""
        how = (
            compiled_blocks.run_compiled
            if self._program.compiles_rows
            else lambda work, tensors: work(*tensors)
        )
        return mock.patch.object(row_loop, "run_compiled", how)

    def check_with(
        self,
        op: Callable[[], Any] = nullcontext,
        graph: Callable[[Rewritten], None] | None = None,
    ) -> None:
        """``Wrong`` if a mistake in the op or in the rewritten graph changes what is to be seen."""
        if not self.verdict.rewritten or (graph and not self._captured.changes(graph)):
            return
        self._captured.edit = graph
        verdict = replace(self.verdict)
        try:
            with self._settings():
                for call in self._calls:
                    call.check(verdict, op)
        finally:
            self._captured.edit = None


@contextmanager
def _refusals(reasons: list[str]) -> Iterator[None]:
    """Gather why losses are left alone from the log."""
    log = logging.getLogger("lmhead_pass")
    handler = logging.Handler()

    def emit(record: logging.LogRecord) -> None:
        if text := re.match(
            r"left alone: .*? at .*?: (.*?)(?: \[docs/\S+\])?$", record.getMessage()
        ):
            reasons.append(_general(text[1]))

    handler.emit = emit  # type: ignore[method-assign]
    level = log.level, log.propagate
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level[0])
        log.propagate = level[1]


def _general(reason: str) -> str:
    reason = re.sub(r" at <program.*?>:\d+ `[^`]*`", "", reason)
    return re.sub(r"\[[^]]*\]|\d+|'\w+'", "_", reason)


class _Call:
    """One call of a program: what it gives without the pass, and how far rounding moves that."""

    def __init__(self, captured: Captured, program: Program, inputs: Inputs):
        self._captured, self._program, self._inputs = captured, program, inputs
        captured.rewritten = False
        self._without = run(captured, program, inputs, inputs.dtype)
        self._measures: dict[tuple[int, ...], _Measure] = {}

    def check(self, verdict: Verdict, around: Callable[[], Any] = nullcontext) -> None:
        """``Wrong`` if the rewritten program, run ``around`` something, gives something else."""
        captured, program, inputs = self._captured, self._program, self._inputs
        without = replace(self._without, values=dict(self._without.values))
        captured.rewritten = True
        # Results of returned logits are computed at once from when they have been asked for twice.
        for _ in range(3 if has_border(program.source) else 1):
            with_pass = run(captured, program, inputs, inputs.dtype, around)
        counts = counters["lmhead_pass"]
        verdict.rewritten = counts["rewritten"] + counts["deferred"]
        verdict.raised = verdict.raised or without.error
        if captured.failure is not None:
            kind = type(captured.failure).__name__
            raise Wrong(f"{kind} in the pass", str(captured.failure)) from captured.failure
        if _WATCHED in with_pass.message and has_border(program.source):
            return  # logits that are read too late
        if with_pass.error != without.error:
            if with_pass.error and _WRITTEN in with_pass.message and has_border(program.source):
                return
            # A head that is not there any more does not mind that its input is written to.
            if with_pass.error is not None or not any(text in without.message for text in _LOST):
                raise Wrong(
                    f"raised {with_pass.error} instead of {without.error}",
                    with_pass.message or without.message,
                )
            if without.error.endswith("forward"):
                return
            _forget_gradients(with_pass, without)
            program = replace(program, gradient_of=())
        elif with_pass.error is not None and verdict.rewritten:
            return  # how far it got before that is not the same
        if _saves_what_it_writes(program, inputs):
            _forget_gradients(with_pass, without)
        _check_form(with_pass, without, program)
        if not verdict.rewritten:
            _check_same(with_pass, without)
            return
        if program.gradient_of not in self._measures:
            self._measures[program.gradient_of] = _Measure(program, inputs, self._without)
        measure = self._measures[program.gradient_of]
        for name in without.values:
            _check_value(name, with_pass.values[name], measure)
        verdict.blunt |= measure.is_blunt("output 0")


def _saves_what_it_writes(program: Program, inputs: Inputs) -> bool:
    """Whether eager gradients may be wrong: a checkpoint hides writes to what is saved."""
    if "checkpoint(" not in program.source:
        return False
    plain = program.function(checkpoint=_called)
    return any(text in run(plain, program, inputs, inputs.dtype).message for text in _LOST)


def _called(region: Callable[..., Any], *arguments: Any, use_reentrant: bool) -> Any:
    return region(*arguments)


def _forget_gradients(*outcomes: Outcome) -> None:
    for outcome in outcomes:
        outcome.values = {
            name: value for name, value in outcome.values.items() if "gradient" not in name
        }
    _keep_common(outcomes[0].values, outcomes[1].values)


def _keep_common(a: dict[str, Any], b: dict[str, Any]) -> None:
    for values, others in ((a, b), (b, a)):
        for name in [name for name in values if name not in others]:
            del values[name]


def _check_form(with_pass: Outcome, without: Outcome, program: Program) -> None:
    """Everything but values."""
    if with_pass.structure != without.structure:
        raise Wrong("structure", f"{with_pass.structure}, not {without.structure}")
    if with_pass.values.keys() != without.values.keys():
        raise Wrong("outputs", f"{list(with_pass.values)}, not {list(without.values)}")
    for name, expected in without.requires_grad.items():
        got = with_pass.requires_grad[name]
        may_be_detached = (
            program.returned_logits == "detach"
            and int(name.split()[1]) not in program.gradient_of
            and not got
        )
        # As returned-logits.md says of views.
        is_under_no_grad = "@torch.no_grad()" in program.source and expected and not got
        if got != expected and not may_be_detached and not is_under_no_grad:
            raise Wrong(f"{name} requires_grad", f"{got}, not {expected}")
    for name, expected in without.values.items():
        if _form(with_pass.values[name]) != _form(expected):
            raise Wrong(
                f"form of {name}", f"{_form(with_pass.values[name])}, not {_form(expected)}"
            )


def _form(value: Any) -> Any:
    return (value.dtype, value.shape) if isinstance(value, Tensor) else type(value)


def _check_same(with_pass: Outcome, without: Outcome) -> None:
    for name, expected in without.values.items():
        got = with_pass.values[name]
        same = _is_same(got, expected) if isinstance(expected, Tensor) else got == expected
        if not same:
            raise Wrong(f"{name}, though nothing was rewritten", f"{got}, not {expected}")


def _is_same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


class _Measure:
    """Exact values of a program, and how far from them rounding alone may lead."""

    def __init__(self, program: Program, inputs: Inputs, without: Outcome):
        self._program, self._inputs, self.without = program, inputs, without
        self.exact = run(program.function(exact=True), program, inputs, torch.float64)
        if self.exact.error:
            self.exact = without
        self._noisy: list[Outcome] = []

    @property
    def may_multiply_0_by_infinity(self) -> bool:
        """Whether the program may have NaN where the limit of a softmax is no such: 0 log 0."""
        return bool(
            re.search(r"log\(\)|torch\.log\(|one_hot|softmax\([^)]*\)+ \*", self._program.source)
        )

    def add_noise(self, runs: int) -> None:
        """Run the program some more times, with other noise."""
        for seed in range(len(self._noisy), runs):
            noisy = run(
                self._program.function(),
                self._program,
                self._inputs,
                self._inputs.dtype,
                lambda seed=seed: noise(seed),
            )
            if noisy.error is None:
                self._noisy.append(noisy)

    def others(self, name: str) -> list[Tensor]:
        """Values of ``name`` that are as good as any: without the pass."""
        outcomes = [self.without, *self._noisy]
        return [outcome.values[name] for outcome in outcomes if name in outcome.values]

    def error(self, value: Tensor, name: str) -> float:
        """The largest error of ``value``, where that can be said at all."""
        exact, without = self.exact.values[name].double(), self.without.values[name]
        known = exact.isfinite() & without.isfinite()
        difference = (value.double() - exact).abs()[known]
        return torch.nan_to_num(difference, nan=torch.inf).amax().item() if known.any() else 0.0

    def scale(self, name: str) -> float:
        """The largest exact value."""
        exact = self.exact.values[name].double()
        exact = exact[exact.isfinite()].abs()
        return exact.amax().item() if exact.numel() else 0.0

    def allowed(self, name: str) -> float:
        """The largest error that rounding explains."""
        strayed = [self.error(value, name) for value in self.others(name)]
        strayed = [error for error in strayed if error < torch.inf]
        dtype = self.without.values[name].dtype
        if self.exact is self.without:  # nothing was measured
            dtype = min(dtype, *self._computed_in, key=lambda dtype: dtype.itemsize)
        sums = torch.promote_types(dtype, torch.float32)
        eps = 2 * torch.finfo(dtype).eps + 8 * torch.finfo(sums).eps
        smallest = torch.finfo(dtype).smallest_normal
        return _FACTOR * max(strayed, default=0.0) + eps * self.scale(name) + smallest

    @property
    def _computed_in(self) -> list[torch.dtype]:
        """The dtypes that the program names, and its inputs'."""
        is_narrow = "bfloat16" in self._program.source
        return [self._inputs.dtype, torch.bfloat16] if is_narrow else [self._inputs.dtype]

    def is_blunt(self, name: str) -> bool:
        """Whether a wrong ``name`` would pass as rounded."""
        value = self.without.values.get(name)
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
            return False
        tolerable = 1e-3 if self._inputs.dtype.itemsize > 2 else 0.1
        return self.allowed(name) > tolerable * self.scale(name)


def _check_value(name: str, got: Any, measure: _Measure) -> None:
    expected = measure.without.values[name]
    if not isinstance(expected, Tensor):
        if got != expected:
            raise Wrong(name, f"{got}, not {expected}")
        return
    if not expected.numel() or _is_same(got, expected):
        return
    if not expected.is_floating_point():
        _check_whole(name, got, measure)
        return
    if not isinstance(measure.exact.values.get(name), Tensor):
        raise Wrong(f"no exact {name}", "the program does not run in FP64 as it does otherwise")
    for runs in _NOISE_RUNS:
        measure.add_noise(runs)
        if measure.error(got, name) <= measure.allowed(name):
            break
    else:
        ours, theirs = measure.error(got, name), measure.error(expected, name)
        raise Wrong(
            f"value of {name}",
            f"error {ours:.2e}, without the pass {theirs:.2e}, allowed "
            f"{measure.allowed(name):.2e}, largest value {measure.scale(name):.2e}",
        )
    exact = measure.exact.values[name]
    both = ~exact.isfinite() & ~expected.isfinite()
    if measure.may_multiply_0_by_infinity:
        both &= ~expected.isnan()
    if not _is_same(got[both], expected[both]):
        raise Wrong(f"infinities of {name}", f"{got}, not {expected}")


def _check_whole(name: str, got: Tensor, measure: _Measure) -> None:
    """Counts and the like may only differ where rounding alone changes them."""
    measure.add_noise(_NOISE_RUNS[-1])
    others = torch.stack(measure.others(name))
    steady = (others == others[0]).all(0)
    if not torch.equal(got[steady], others[0][steady]):
        raise Wrong(f"value of {name}", f"{got}, not {others[0]}")
