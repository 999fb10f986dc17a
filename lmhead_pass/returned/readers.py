"""What computes results of unread logits by the op: ``outside``, which reads graphs."""

import importlib
from typing import Any

from .cells import Call


def reader_of(*calls: Call) -> Any:
    """What computes calls whose results have no vocabulary; None if only the logits' values do."""
    # Not imported with this: it takes the matcher, which no model without lazy logits needs.
    return importlib.import_module("lmhead_pass.outside").reader_of(*calls)
