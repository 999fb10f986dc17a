"""Real models: as many losses are rewritten as the table says, and none of them is changed."""

import pytest

from . import coverage, table

transformers = pytest.importorskip("transformers")

RECORDED = table.load()
# One for each kind of head, loss or model; all others run with `-m models`.
BY_DEFAULT: dict[str, str] = {
    "LlamaForCausalLM": "causal, the plain case",
}


def _parameters():
    for class_name in RECORDED["models"]:
        marks = () if class_name in BY_DEFAULT else pytest.mark.models
        yield pytest.param(class_name, marks=marks)


@pytest.fixture
def _recorded_release():
    if transformers.__version__ != RECORDED["transformers"]:
        pytest.skip(f"the table was recorded with transformers {RECORDED['transformers']}")


@pytest.mark.parametrize("class_name", _parameters())
def test_model(class_name, _recorded_release):
    from .isolated import run_isolated

    expected = RECORDED["models"][class_name]
    found = run_isolated(class_name, expected["kind"])
    assert not table.differences(found)
    for sentence in table.changes(expected, found):
        pytest.fail(
            f"{class_name}, {sentence}. If that is right, `{table.COMMAND} {class_name}` records it"
        )


def test_table_names_every_language_model(_recorded_release):
    from .architectures import architectures

    named = {n: (entry["architecture"], entry["kind"]) for n, entry in RECORDED["models"].items()}
    assert named == architectures(), f"`{table.COMMAND}` records the table again"


def test_models_that_run_by_default_are_in_the_table():
    assert BY_DEFAULT.keys() <= RECORDED["models"].keys()


def test_coverage_page_is_what_the_table_says():
    assert coverage.PATH.read_text() == coverage.page(RECORDED), f"run `{coverage.COMMAND}`"
