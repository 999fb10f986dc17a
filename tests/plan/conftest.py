"""Fixtures of the tests of plans."""

import pytest

from lmhead_pass.graph import Refused
from lmhead_pass.rewrite import rewriter


@pytest.fixture
def no_regions(monkeypatch):
    """Nothing is run in chunks that has no fused form, so that the reason for that is told."""

    def carve(head, heads):
        raise Refused("")

    monkeypatch.setattr(rewriter, "carve", carve)
