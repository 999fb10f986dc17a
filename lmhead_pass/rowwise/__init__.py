"""Losses without a fused form: a part of the graph that treats rows apart is run in chunks.

``operations`` is the table of what treats rows apart. ``tracer`` runs nodes again on fake tensors,
and writes down, operation by operation, what they are on a chunk of rows (``layout`` knows which
dimensions are rows, ``values`` which expression each tensor holds). ``region`` goes from a head to
numbers without a vocabulary, and describes what it finds (``types``).
"""

from .layout import Dim, Label, Space, finest
from .operations import Mixes
from .region import carve, ends_in_a_sum, may_be_carved
from .types import Region, RowCall
from .values import ConstantLeaf, Exit, Outer, RowLeaf

__all__ = [
    "ConstantLeaf",
    "Dim",
    "Exit",
    "Label",
    "Mixes",
    "Outer",
    "Region",
    "RowCall",
    "RowLeaf",
    "Space",
    "carve",
    "ends_in_a_sum",
    "finest",
    "may_be_carved",
]
