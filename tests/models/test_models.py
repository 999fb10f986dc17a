"""Real models: as many losses are rewritten as the table says, and none of them is changed."""

import pytest
import torch

from lmhead_pass.rewrite import rewrite_graph

from . import coverage, table

transformers = pytest.importorskip("transformers")

RECORDED = table.load()
# What no small test has like that; all others run with `-m models`.
BY_DEFAULT = {
    "LlamaForCausalLM": "the plain case",
    "GPT2LMHeadModel": "a graph break between head and loss",
    "Gemma2ForCausalLM": "softcap",
    "XLMWithLMHeadModel": "a head that computes its own loss",
    "BartForConditionalGeneration": "encoder and decoder, with a bias of its own",
    "Qwen2AudioForConditionalGeneration": "rows chosen by a mask",
}


PARAMETERS = [
    pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.models)
    for name in RECORDED["models"]
]


@pytest.fixture
def _recorded_release():
    if transformers.__version__ != RECORDED["transformers"]:
        pytest.skip(f"the table was recorded with transformers {RECORDED['transformers']}")


def _aspects():
    """What has to be as recorded; another torch, or Inductor, may break graphs elsewhere."""
    release = torch.__version__.split("+")[0]
    return table.ASPECTS[: None if release == RECORDED["torch"] and not table.WITH_INDUCTOR else 1]


@pytest.mark.parametrize("class_name", PARAMETERS)
def test_model(class_name, _recorded_release):
    from .isolated import run_isolated

    expected = RECORDED["models"][class_name]
    found = run_isolated(class_name, expected["kind"])
    assert not table.differences(found)
    changes = table.changes(expected, found, _aspects())
    assert not changes, f"if that is right, `{table.COMMAND} {class_name}` records it"


@pytest.mark.models
def test_t5gemma2_holds_nothing_of_the_logits_size(_recorded_release):
    """But lazy logits, which have no memory."""
    from .configurations import VOCAB
    from .running import build

    built, left = build("T5Gemma2ForConditionalGeneration", "seq2seq"), []

    def backend(module, _):
        assert rewrite_graph(module.graph)
        values = [(n, n.meta.get("example_value")) for n in module.graph.nodes]
        wide = [n for n, v in values if isinstance(v, torch.Tensor) and v.shape == (2, 12, VOCAB)]
        left.extend(node.name for node in wide)
        module.recompile()
        return module

    torch.compile(built.model, backend=backend)(**built.inputs)
    assert left == ["return_lazily_default"]


def test_table_names_every_language_model(_recorded_release):
    from .architectures import architectures

    named = {n: (entry["architecture"], entry["kind"]) for n, entry in RECORDED["models"].items()}
    assert named == architectures(), f"`{table.COMMAND}` records the table again"


def test_another_count_is_a_change():
    expected = RECORDED["models"]["LlamaForCausalLM"]
    found = {way: expected[way] | {"rewrites": 0} for way in table.WAYS}
    assert table.changes(expected, found) == [
        "labels: rewrites 0, expected 1",
        "loss only: rewrites 0, expected 1",
    ]
    assert table.changes(expected, {"not built": "why"}) == ["not built (why); expected: built"]
    assert not table.changes(expected, expected)


def test_models_that_run_by_default_are_in_the_table():
    assert BY_DEFAULT.keys() <= RECORDED["models"].keys()


def test_coverage_page_is_what_the_table_says():
    assert coverage.PATH.read_text() == coverage.page(RECORDED), f"run `{coverage.COMMAND}`"
