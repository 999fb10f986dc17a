"""Generated programs: the pass is right about them, and would be found out if it were not."""

import dataclasses
import functools
from collections import Counter

import hypothesis
import pytest
import torch

from lmhead_pass.graph import Emitter, canonical_op, mutation
from lmhead_pass.logits import dataflow, rows
from lmhead_pass.logits.types import AliasRegion, Logits, with_values
from lmhead_pass.op import ops
from lmhead_pass.op.kernels import aten
from lmhead_pass.plan import call_planning
from lmhead_pass.rewrite import emit_calls
from lmhead_pass.rewrite.checkpoint_regions import LiftedRegion
from lmhead_pass.sums import linear_ops

from ..programs.checking import Wrong, check
from ..programs.fuzz import Statistics
from ..programs.grammar import KINDS, programs
from ..programs.program import Program, forget
from ..programs.uniform import BACKEND

COUNT, SEED = 200, 1


@pytest.fixture(autouse=True)
def _on_one_thread(one_thread):
    yield
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
    assert sum(statistics.raised.values()) < 0.15 * COUNT
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

    monkeypatch.setattr("lmhead_pass.rewrite.rewriter.emit_call", fail)
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
        def __init__(self, problem, every):
            super().__init__(problem, every)
            if problem.reduction == "mean":
                self._denominator = torch.full_like(self._denominator, len(problem.target))

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
    def one_for_all(grad_losses, grad_logsumexp):
        if grad_losses is not None:
            grad_losses = grad_losses.mean().expand_as(grad_losses)
        return grad_losses, grad_logsumexp

    _with_upstream(patch, one_for_all)


def without_gradient_of_logsumexp(patch):
    _with_upstream(patch, lambda grad_losses, grad_logsumexp: (grad_losses, None))


def _with_upstream(patch, change):
    """Let the backward of per-row losses start from other gradients than it is given."""
    original = aten.backward

    def backward(problem, needed, row_max, log_sum, *upstream):
        return original(problem, needed, row_max, log_sum, *change(*upstream))

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


def without_scale(patch):
    _with_problem(patch, lambda problem: dataclasses.replace(problem, logit_scale=1.0))


def without_softcap(patch):
    _with_problem(patch, lambda problem: dataclasses.replace(problem, softcap=None))


def without_weights_of_rows(patch):
    _with_problem(patch, lambda problem: dataclasses.replace(problem, coefficient=None))


def without_z_loss(patch):
    _with_problem(patch, lambda problem: dataclasses.replace(problem, z_loss=None))


def without_coefficients_of_logsumexps(patch):
    _with_problem(patch, lambda problem: dataclasses.replace(problem, logsumexp_coefficient=None))


def with_ignored_rows_in_no_term(patch):
    """As if a z-loss left out the rows that the cross entropy ignores."""

    def change(problem):
        if problem.z_loss is None:
            return problem
        ignored = problem.target == problem.ignore_index
        return dataclasses.replace(problem, z_loss=problem.z_loss.masked_fill(ignored, 0))

    _with_problem(patch, change)


def without_mean_in_weights(patch):
    """As if each mean of per-row losses were a sum."""
    names = {"mean": "sum"}
    patch.setattr(
        linear_ops, "canonical_op", lambda node: names.get(canonical_op(node), canonical_op(node))
    )


def _without_step(patch, name):
    """As if all gradients passed through an operation as they are."""
    original = linear_ops.STEPS[name]

    def step(node, source):
        found = original(node, source)
        return found and {**found, "back": linear_ops.unchanged}

    patch.setitem(linear_ops.STEPS, name, step)


def without_divisors_in_weights(patch):
    _without_step(patch, "div")


def without_masks_in_weights(patch):
    _without_step(patch, "masked_fill")


def without_places_that_are_set(patch):
    _without_step(patch, "setitem")


def with_places_mixed_up(patch):
    """As if what is taken out of the losses came from their end."""
    original = linear_ops.emit_again

    def again(emit, node, values):
        places = original(emit, node, values)
        return emit("flip", places, list(range(places.meta["example_value"].dim())))

    patch.setattr(linear_ops, "emit_again", again)


def without_shift(patch):
    original = emit_calls._value

    def value(emit, match, consumer, rows, results):
        first, *others = match.consumers
        first = dataclasses.replace(first, logits=with_values(first.logits, shift=0.0))
        match = dataclasses.replace(match, consumers=(first, *others))
        return original(emit, match, consumer, rows, results)

    patch.setattr(emit_calls, "_value", value)


def without_factor(patch):
    """As if what a log-probability is multiplied by before a word is picked counted for nothing."""
    original = emit_calls._value

    def value(emit, match, consumer, rows, results):
        consumer = dataclasses.replace(consumer, factor=1.0)
        return original(emit, match, consumer, rows, results)

    patch.setattr(emit_calls, "_value", value)


def without_detach(patch):
    original = Emitter.__call__

    def call(self, target, *args, **kwargs):
        return args[0] if target == "detach" else original(self, target, *args, **kwargs)

    patch.setattr(Emitter, "__call__", call)


def without_writes_to_logits(patch):
    original = dataflow._Walk._write

    def write(self, node):
        before = dict(self.holds)
        original(self, node)
        self.holds |= before
        if node in self.holds:
            self.holds[node] = dataclasses.replace(before[node.args[0]], node=node)

    patch.setattr(dataflow._Walk, "_write", write)


def with_any_alias_region(patch):
    """As if all that shares memory shared all of it."""
    patch.setattr(AliasRegion, "is_within", lambda self, other: True)


def at_the_first_reader(patch):
    """Even if that is under no_grad."""
    original = call_planning._place

    def place(consumers, order):
        place = original(consumers, order)
        nodes = [consumer.node for consumer in consumers if consumer.kind != "returned"]
        return place and min(nodes, key=order.__getitem__, default=place)

    patch.setattr(call_planning, "_place", place)


def with_any_target(patch):
    """As if all losses of the same logits had the same target."""
    patch.setattr(call_planning._Call, "asked", _AnyTarget(), raising=False)


class _AnyTarget(tuple):
    def __eq__(self, other):
        return True

    def __get__(self, *_):
        return self

    def __set__(self, *_):
        pass


def with_any_values(patch):
    """As if what was done to the logits did not matter to who shares a call."""
    patch.setattr(
        Logits,
        "_made_alike",
        lambda self, other: (
            (self.head.node, self.vocab_slice) == (other.head.node, other.vocab_slice)
        ),
    )


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
    without_scale,
    without_weights_of_rows,
    without_detach,
    without_writes_to_logits,
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


def with_regions_mixed_up(patch):
    """As if a checkpointed region returned tensors of one shape in another order."""
    original = LiftedRegion.keep

    def keep(self):
        original(self)
        output = self.body.graph.output_node()
        results = list(output.args[0])
        shapes = [result.meta["example_value"].shape for result in results]
        for number, shape in enumerate(shapes):
            if (other := shapes.index(shape)) < number:
                results[number], results[other] = results[other], results[number]
        output.args = (tuple(results),)
        self.body.recompile()

    patch.setattr(LiftedRegion, "keep", keep)


RARE_MISTAKES = {
    without_softcap: {"softcap", "softcap_left", "softcap_sigmoid", "softcap_", "softcap_float"},
    without_gradient_of_logsumexp: {"z_loss", "z_loss_float", "z_loss_keepdim", "logsumexp"},
    without_z_loss: {"z_loss", "z_loss_float", "z_loss_keepdim"},
    without_coefficients_of_logsumexps: {"logsumexp", "selective", "one_hot_of_logits"},
    with_ignored_rows_in_no_term: {"z_loss", "z_loss_float", "z_loss_keepdim"},
    without_mean_in_weights: {"mean", "divided_rows", "by_sequence"},
    without_divisors_in_weights: {"by_sequence", "by_sequence_masked", "by_first"},
    without_masks_in_weights: {"masked_fill", "filled_in_place"},
    without_places_that_are_set: {"set_by_mask", "set_first"},
    with_places_mixed_up: {"part_of_rows", "expanded", "indexed", "cat"},
    without_shift: {"added", "subtracted", "subtracted_from", "softcap_sigmoid"},
    without_factor: {"scaled_log_probabilities", "chosen_log_probability", "negative_entropy"},
    with_any_alias_region: {
        "first",
        "from_second",
        "all_but_last",
        "second_dim",
        "pieces_",
        "unbound_",
    },
    at_the_first_reader: {"argmax", "accuracy", "entropy", "logsumexp", "amax", "max_values"},
    with_any_target: {"other_loss", "chosen_word", "chosen_log_probability", "target_logits"},
    with_any_values: {"z_loss_scaled", "entropy", "logsumexp", "chosen_word"},
    with_regions_mixed_up: {"checkpoint_model", "checkpoint_head"},
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
            if not wrong.what.startswith("raised") and not wrong.what.endswith("in the pass"):
                return
        except RuntimeError:
            pass  # an error while the pass ran
    pytest.fail("not found")
