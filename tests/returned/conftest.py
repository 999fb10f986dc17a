"""Logits that nobody has read, and those of the same model uncompiled."""

import pytest

from ..backend import rewrite
from .model import Model, batch, is_unread


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def returned(model):
    """``get() -> (unread logits, what the model returns uncompiled)``, in today's gradient mode."""
    compiled, inputs = rewrite(model), batch()

    def get():
        logits, plain = compiled(*inputs)[1], model(*inputs)[1]
        assert is_unread(logits)
        return logits, plain

    return get
