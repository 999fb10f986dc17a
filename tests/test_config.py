"""Settings: defaults, environment, patches, and bad values."""

import re

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


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("chunk_size", " Did you mean batch_chunk_size?"),
        ("memory_bugdet", " Did you mean memory_budget?"),
        ("colour", ""),
    ],
)
def test_an_unknown_setting_is_an_error_that_lists_the_right_ones(name, meant):
    for use in (
        lambda: setattr(config, name, 3),
        lambda: getattr(config, name),
        lambda: config.patch({name: 3}).__enter__(),
    ):
        with pytest.raises(AttributeError) as error:
            use()
        assert str(error.value) == (
            f"lmhead_pass.config: there is no {name}.{meant} There are min_vocab_size, "
            "batch_chunk_size, memory_budget, returned_logits, strict"
        )


def test_an_unknown_variable_is_warned_of():
    done = run_python("import lmhead_pass", LMHEAD_PASS_MEMORY_BUGDET="3", LMHEAD_PASS_STRICT="1")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("UserWarning") == 1
    assert (
        "lmhead_pass.config: there is no LMHEAD_PASS_MEMORY_BUGDET. Did you mean "
        "LMHEAD_PASS_MEMORY_BUDGET? There are LMHEAD_PASS_MIN_VOCAB_SIZE, " in done.stderr
    )


def test_help_has_every_setting_and_its_default():
    assert config.defaults().keys() == config.get_config_copy().keys()
    for name, default in config.defaults().items():
        (kind,) = re.findall(rf"\n{name}: (.+)\n    \w", config.__doc__)
        kind, _, value = kind.partition(" = ")
        assert value.replace('"', "'") == repr(default)
        assert kind == str(getattr(config.__annotations__[name], "__name__", None) or kind)
