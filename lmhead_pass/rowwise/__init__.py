"""Losses without a fused form: a part of the graph that treats rows apart is run in chunks.

``operations`` is the table of what treats rows apart; ``along_words``, ``shapes``, ``new_values``
and ``losses`` say what each of these is on a chunk of rows, and ``alignment`` how the tensors of a
``call`` lie beside each other. ``tracer`` runs nodes again on fake tensors, and ``call_tracer``
writes down the calls that they make (``layout`` knows which dimensions are rows, ``values`` which
expression each tensor holds).
``region`` goes from a head to numbers without a vocabulary, and describes what it finds
(``types``): ``row_calls`` what is computed of each row, ``placing`` where that comes in the graph;
``dependents`` knows what depends on which head.
"""

from .call import Mixes
from .layout import Dim, Label, Space, finest
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
