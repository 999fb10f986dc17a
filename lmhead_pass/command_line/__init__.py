"""What ``python -m lmhead_pass`` prints.

``environment`` has what a bug report needs to know, ``estimate`` what the pass would save a head,
and ``tables`` prints either.
"""

from .environment import environment
from .estimate import estimate
from .tables import show

__all__ = ["environment", "estimate", "show"]
