"""Numbers of which a gradient is wanted, several of the same logits: a loss, and another one.

The gradients of a single number are computed with it: three products. Those of several would be a
gradient of the weight each, held until the backward. So once a second one comes, the first lets its
gradients go, and the backward computes all of them together, from the logits that it takes again
(``joint_gradients``). A program that does so does it in every step: the next time the first of them
is computed without gradients at once.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..compat import lazy_tensors as compat
from ..compat.compiling import is_inside_of_checkpoint
from .cells import Call, Cell
from .readers import reader_of

_MOST_WAYS = 64
_first_of_several: OrderedDict[object, None] = OrderedDict()
"""How results were taken that others followed, the latest last."""

Tensors = Mapping[Cell, tuple[Tensor, ...]]
"""Of each of the logits that models returned: hidden states, weight and bias."""


@dataclass(eq=False)
class Result:
    """What ``call`` makes of logits, and what the gradients of that need."""

    call: Call
    tensors: Tensors
    """What it is computed from. Those of which a gradient is wanted are leaves."""
    compute: Callable[[], Tensor]
    value: Tensor | None
    """With its history; None if the backward has to compute it once more."""
    is_recomputed: bool
    """Whether the forward has left nothing for the gradients, and others may be computed with
    them."""
    is_done: bool = False
    """Whether its gradients were computed."""

    def __post_init__(self) -> None:
        self._versions = self._versions_now()

    @property
    def is_unchanged(self) -> bool:
        """Whether nothing that it is computed from has been written to."""
        return self._versions == self._versions_now()

    def _versions_now(self) -> list[int]:
        parts = *self.tensors.values(), self.call.tensors
        return [compat.version_of(tensor) for part in parts for tensor in part]

    def let_go(self) -> None:
        """Leave the gradients of a number to the backward."""
        if self.value is None or self.value.dim() > 0 or not self.is_unchanged:
            return
        copied = self.call.with_copies()
        reader = reader_of(copied) if self.call.is_given_little else None
        if reader is not None:
            given = [tensor for part in self.tensors.values() for tensor in part]
            self.call, self.compute = copied, lambda: reader.run_first(*given)
            self.value, self.is_recomputed = None, True
            self._versions = self._versions_now()


def is_one_of_several(call: Call, way: object) -> bool:
    """Whether there are other results of the same logits, or will be: a number is computed without
    gradients then. Those before it let theirs go."""
    # A checkpointed region is run again, and has to save the same then.
    if not call.ways_back or not call.is_given_little or is_inside_of_checkpoint():
        return False
    (root,) = call.ways_back
    others = [result for ref in root.results if (result := ref()) and not result.is_done]
    if not others:
        root.first_differentiated = way
        return way in _first_of_several
    _first_of_several[root.first_differentiated] = None
    _first_of_several.move_to_end(root.first_differentiated)
    if len(_first_of_several) > _MOST_WAYS:
        _first_of_several.popitem(last=False)
    for result in others:
        result.let_go()
    return True


def done(result: Result) -> None:
    """The gradients of ``result`` are computed now. No other result is expected, if none came."""
    result.is_done = True
    for root in result.call.ways_back:
        if len(root.results) == 1:
            _first_of_several.pop(root.first_differentiated, None)
