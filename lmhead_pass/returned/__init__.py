"""Logits that a compiled function returns, computed when somebody reads them.

``return_op`` has the op that makes them in a graph, with ``own_memory`` for what it takes,
``recipe`` what they are computed from, and ``lazy_logits`` the tensor that the caller gets: it
stands for a ``Cell`` (``cells``), a value that is computed when it is read. ``just_returned`` makes
it after each run, and the ``views`` that leave beside it. ``plain_values`` reads such tensors
(``lazy_tensor``), ``writes`` writes to them. ``history`` is what autograd sees of it,
``lazy_gradient`` what comes back, ``one_of_several`` which results leave their gradients to the
backward, and ``joint_gradients`` what those come to. ``steps`` says which functions are written
down, ``likes`` what they return, without values, and ``metadata`` and ``by_form`` what reads no
values; ``readers`` asks for what computes a result, ``results`` has that done, and ``foresight``
with it what is asked for next; ``taken_again`` has numbers that logits are compared with read with
these; ``rows_alone`` reads a few rows; ``masks`` picks rows; ``reading`` looks after late readings,
and tells of all.
Importing this registers the ops.
"""

from . import own_memory, return_op
from .cells import Call, Cell
from .lazy_logits import LazyLogits
from .likes import likes_of
from .reading import user_stack
from .recipe import Recipe, Step, StepKind
from .views import encode as encode_view

__all__ = [
    "Call",
    "Cell",
    "LazyLogits",
    "Recipe",
    "Step",
    "StepKind",
    "encode_view",
    "likes_of",
    "own_memory",
    "return_op",
    "user_stack",
]
