"""``python -m lmhead_pass env``: what a bug report needs to know."""

import pytest
import torch
import torch._inductor.config as inductor_config

import lmhead_pass
from lmhead_pass import compat
from lmhead_pass.__main__ import main
from lmhead_pass.command_line import environment
from lmhead_pass.registration import why_not_run

from ..process import output_of


def shown():
    return {title: dict(rows) for title, rows in environment(why_not_run).items()}


@pytest.fixture(autouse=True)
def _default_settings():
    with lmhead_pass.config.patch(lmhead_pass.config.defaults()):
        yield


def test_all_is_well(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    tables = shown()
    assert tables["Versions"]["torch"] == torch.__version__
    assert tables["Pass"]["registered"] == "yes"
    assert tables["Pass"]["pre-grad passes"] == "lmhead_pass.graph_pass.LMHeadPass"
    assert tables["Known conflicts"] == {"none": ""}
    assert tables["Caches"]["folder"] == f"{tmp_path}, which is empty"
    settings = tables["Settings that differ from their defaults"]
    assert settings["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)
    assert not [name for name in settings if name.startswith("lmhead_pass.config")]


def test_settings_that_differ(monkeypatch):
    monkeypatch.setenv("LMHEAD_PASS_STRICT", "1")
    with lmhead_pass.config.patch(batch_chunk_size=7):
        tables = shown()
    settings = tables["Settings that differ from their defaults"]
    assert settings["lmhead_pass.config.batch_chunk_size"] == "7"
    assert settings["LMHEAD_PASS_STRICT"] == "1"
    if torch.__version__ >= "2.13":  # else settings belong to the process
        assert "differs from that of a new thread" in tables["Known conflicts"]["threads"]


def test_conflicts():
    def other(graph):
        pass

    passes = compat.passes_in(inductor_config.pre_grad_custom_pass)
    with inductor_config.patch(pre_grad_custom_pass=compat.pass_setting([*passes, other])):
        conflicts = shown()["Known conflicts"]
        assert list(conflicts) == ["other pre-grad passes"]
        assert "other: graphs may reach lmhead_pass changed" in conflicts["other pre-grad passes"]
    with inductor_config.patch(pre_grad_custom_pass=other):
        tables = shown()
    assert "lmhead_pass.register() adds it again" in tables["Pass"]["registered"]
    assert "lmhead_pass.register()" in tables["Known conflicts"]["the pass does not run"]


def test_the_command(capsys):
    main(["env"])
    printed = capsys.readouterr().out
    assert torch.__version__ in printed and "registered" in printed


def test_in_a_process_that_has_imported_nothing_of_inductor():
    """The pass is made, and registered, while Inductor is imported for its sake."""
    code = """
        from lmhead_pass.__main__ import main
        main(["env"])
    """
    assert "does not run" not in output_of(code)
