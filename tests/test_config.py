"""Settings: defaults, environment, patches, and bad values."""

import pytest

import lmhead_pass

from .process import output_of, run_python

config = lmhead_pass.config


def test_defaults():
    code = "import lmhead_pass; print(lmhead_pass.config.get_config_copy())"
    assert output_of(code) == str(
        {
            "min_vocab_size": 4096,
            "batch_chunk_size": None,
            "memory_budget": None,
            "returned_logits": "lazy",
            "strict": False,
        }
    )


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("min_vocab_size", "1", 1),
        ("batch_chunk_size", "256", 256),
        ("batch_chunk_size", "none", None),
        ("memory_budget", "100000000", 100_000_000),
        ("returned_logits", "detach", "detach"),
        ("strict", "1", True),
        ("strict", "0", False),
    ],
)
def test_environment(name, text, value):
    code = f"import lmhead_pass; print(repr(lmhead_pass.config.{name}))"
    assert output_of(code, **{f"LMHEAD_PASS_{name.upper()}": text}) == repr(value)


def test_bad_environment_is_an_error_that_names_the_setting():
    done = run_python("import lmhead_pass", LMHEAD_PASS_BATCH_CHUNK_SIZE="many")
    assert done.returncode != 0
    assert "lmhead_pass.config.batch_chunk_size takes an integer" in done.stderr


BAD = {
    "min_vocab_size": [0, -1, 1.5, "4096", None, True],
    "batch_chunk_size": [0, -5, 2.0, "all", False],
    "memory_budget": [0, 1e9, "1GB"],
    "returned_logits": ["drop", None, True],
    "strict": [1, "yes", None],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_bad_values(name, value):
    before = getattr(config, name)
    with pytest.raises(ValueError, match=rf"lmhead_pass\.config\.{name} takes .*; got "):
        setattr(config, name, value)
    with (
        pytest.raises(ValueError, match=rf"lmhead_pass\.config\.{name} takes .*; got "),
        config.patch({name: value}),
    ):
        pass
    assert getattr(config, name) == before


def test_patch():
    with config.patch(batch_chunk_size=7, memory_budget=8):
        assert (config.batch_chunk_size, config.memory_budget) == (7, 8)
    assert (config.batch_chunk_size, config.memory_budget) == (None, None)


def test_unknown_setting():
    with pytest.raises(AttributeError):
        config.chunk_size = 3
