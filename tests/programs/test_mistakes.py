"""Generated programs would find out the pass if it were wrong: mistakes are planted to see that."""

import functools
from collections.abc import Callable

import pytest

from lmhead_pass.graph import mutation

from . import mistakes
from .checking import Trial, Wrong
from .many import COUNT, many_programs
from .program import Program, forget

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread"),
]


def any_kind(*names: str) -> Callable[[Program], bool]:
    """Programs with any of these parts."""
    return lambda program: any(kind.split(".")[-1] in names for kind in program.kinds)


Z_LOSSES = any_kind("z_loss", "z_loss_float", "z_loss_keepdim")
# Of these the first COUNT programs find each; of others, those of many that have such a part.
COMMON = dict.fromkeys(
    (
        "without_ignored_rows",
        "without_bias",
        "without_class_weights",
        "without_label_smoothing",
        "mean_over_all_rows",
        "without_last_partial_chunk",
        "with_one_upstream_gradient_for_all_rows",
        "with_gradients_off_by_a_percent",
        "with_softmax_in_half_precision",
        "without_scale",
        "without_weights_of_rows",
    )
)
IN_THE_OP = COMMON | {
    "without_softcap": any_kind(
        "softcap", "softcap_left", "softcap_sigmoid", "softcap_", "softcap_float"
    ),
    "without_masks": any_kind("masked_where", "masked_index_fill", "setitem_list"),
    "without_gradient_of_logsumexp": any_kind(
        "z_loss", "z_loss_float", "z_loss_keepdim", "logsumexp"
    ),
    "without_z_loss": Z_LOSSES,
    "without_coefficients_of_logsumexps": any_kind("logsumexp", "selective", "one_hot_of_logits"),
    "with_ignored_rows_in_no_term": Z_LOSSES,
}
IN_THE_GRAPH = dict.fromkeys(("without_upstream_gradient", "without_detach")) | {
    "without_what_was_done_to_the_logits": any_kind("div_", "mul_", "neg_", "sigmoid_", "softcap_"),
    "without_mean_in_weights": any_kind("mean", "divided_rows", "by_sequence"),
    "without_divisors_in_weights": any_kind("by_sequence", "by_sequence_masked", "by_first"),
    "without_masks_in_weights": any_kind("masked_fill", "filled_in_place"),
    "without_places_that_are_set": any_kind("set_by_mask", "set_first"),
    "with_places_mixed_up": any_kind("part_of_rows", "expanded", "indexed", "cat"),
    "without_shift": any_kind("added", "subtracted", "subtracted_from", "softcap_sigmoid"),
    "without_factor": any_kind(
        "scaled_log_probabilities", "chosen_log_probability", "negative_entropy"
    ),
    "under_no_grad": any_kind("argmax", "accuracy", "entropy", "logsumexp", "amax", "max_values"),
    "with_any_target": any_kind(
        "other_loss", "chosen_word", "chosen_log_probability", "target_logits"
    ),
    "with_any_values": any_kind("z_loss_scaled", "entropy", "logsumexp", "chosen_word"),
    "with_the_values_of_other_rows": any_kind(
        "first", "from_second", "all_but_last", "second_dim", "pieces_", "unbound_"
    ),
    "with_any_part_of_the_vocabulary": any_kind("vocabulary_prefix"),
    "with_regions_mixed_up": any_kind("checkpoint_model", "checkpoint_head"),
}


def is_wrong(trial: Trial, name: str) -> bool:
    """Whether the program is another with this mistake, and no error tells the user."""
    kind = "op" if name in IN_THE_OP else "graph"
    try:
        trial.check_with(**{kind: getattr(mistakes, name)})
    except Wrong as wrong:
        return not wrong.what.startswith("raised") and not wrong.what.endswith("in the pass")
    except RuntimeError:
        pass  # an error while it ran
    return False


MISTAKES = IN_THE_OP | IN_THE_GRAPH
# Those that take the search by far the longest.
SELDOM_FOUND = {
    "with_any_part_of_the_vocabulary",
    "with_one_upstream_gradient_for_all_rows",
    "with_places_mixed_up",
    "with_the_values_of_other_rows",
    "without_coefficients_of_logsumexps",
    "without_gradient_of_logsumexp",
    "without_places_that_are_set",
}


def search(names: set[str], count: int) -> tuple[set[str], list[str]]:
    """The mistakes that none of ``count`` programs finds, of these, and what was wrong without any.

    Each program is captured once.
    """
    left = set(names)
    wrong: list[str] = []
    for number, program in enumerate(many_programs(count)):
        candidates = [
            name
            for name, is_candidate in MISTAKES.items()
            if name in left and (is_candidate(program) if is_candidate else number < COUNT)
        ]
        if candidates:
            try:
                trial = Trial(program)
            except Wrong as why:
                wrong.append(program.script(str(why)))
            else:
                left.difference_update(name for name in candidates if is_wrong(trial, name))
            forget()
    return left, wrong


@pytest.mark.parametrize(
    ("names", "count"),
    [
        pytest.param({*MISTAKES} - SELDOM_FOUND, 5 * COUNT, id="often"),
        pytest.param(SELDOM_FOUND, 15 * COUNT, id="seldom", marks=pytest.mark.slow),
    ],
)
def test_mistakes_are_found(names, count):
    """All in one test: one search finds them, and workers share nothing."""
    left, wrong = search(names, count)
    assert not wrong, wrong[0]
    assert not left


# What the pass ought to see of a graph before it touches it: then it has to run again.


def without_writers(writers, nodes, of):
    return iter(())


def without_operators_that_write(writers, nodes, of):
    return (node for node in writers(nodes, of) if node.op != "call_function")


def without_writes_to_views(writers, nodes, of):
    of = list(of)
    return (node for node in writers(nodes, of) if node.args and node.args[0] in of)


UNSEEN = {
    without_writers: None,
    without_operators_that_write: any_kind("hidden_setitem_later", "hidden_isub"),
    without_writes_to_views: any_kind(
        "hidden_view_written", "weight_view_written", "bias_view_written"
    ),
}


@pytest.mark.parametrize("unseen", UNSEEN, ids=lambda unseen: unseen.__name__)
def test_a_write_that_is_not_seen_is_found(unseen, monkeypatch):
    monkeypatch.setattr(mutation, "writers", functools.partial(unseen, mutation.writers))
    is_candidate = UNSEEN[unseen]
    programs = filter(is_candidate, many_programs()) if is_candidate else many_programs(COUNT)
    assert any(map(is_wrong_unplanted, programs))


def is_wrong_unplanted(program: Program) -> bool:
    try:
        Trial(program)
    except Wrong as wrong:
        return not wrong.what.startswith("raised") and not wrong.what.endswith("in the pass")
    except RuntimeError:
        pass
    finally:
        forget()
    return False
