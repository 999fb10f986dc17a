"""What a lazy tensor stands for: a value that is computed when it is first read, and kept."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..compat import lazy_tensors as compat
from .recipe import SETTING, Recipe


@dataclass(frozen=True)
class Call:
    """A call of a function of torch. Where it is given unread logits, its arguments have a Cell."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    item: int | None = None
    """Which of the tensors that the function returns is meant; None if it returns one."""
    autocast: tuple[Any, ...] = ()
    """``compat.autocast_state`` where it was called."""
    needs_no_values: bool = False
    """Whether the gradient is the same whatever values the cells have."""

    @cached_property
    def leaves(self) -> list[Any]:
        """What it was given, in any containers."""
        return compat.leaves_of((self.args, self.kwargs))

    @cached_property
    def cells(self) -> "list[Cell]":
        """Each once."""
        return list(dict.fromkeys(leaf for leaf in self.leaves if isinstance(leaf, Cell)))

    @cached_property
    def tensors(self) -> list[Tensor]:
        """Those that it was given beside unread logits."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    @cached_property
    def roots(self) -> "tuple[Cell, ...]":
        """The logits as models returned them of which the result is made; empty if not of these
        alone."""
        roots = [cell.roots for cell in self.cells]
        return tuple(dict.fromkeys(sum(roots, ()))) if all(roots) else ()

    @cached_property
    def ways_back(self) -> "set[Cell]":
        """Those of ``roots`` to which a gradient goes."""
        return set[Cell]().union(*(cell.ways_back for cell in self.cells))

    @property
    def recipes(self) -> list[tuple[Recipe, tuple[bool, ...]]]:
        """Of ``roots`` that nobody has read, each with the gradients of its tensors that are
        wanted: none if none goes back there."""
        back = self.ways_back
        return [
            (recipe, recipe.wanted if root in back else (False,) * len(recipe.wanted))
            for root in self.roots
            if isinstance(recipe := root.source, Recipe)
        ]

    @property
    def is_given_little(self) -> bool:
        """Whether its tensors are small beside the logits."""
        most = self.cells[0].like.numel() / 16
        return not any(tensor.numel() > most for tensor in self.tensors)

    def run(self, values: "Mapping[Cell, Tensor]") -> Any:
        """The result for ``values`` in place of the cells, in today's modes."""
        args, kwargs = compat.map_arguments(
            self.args, self.kwargs, lambda leaf: values[leaf] if isinstance(leaf, Cell) else leaf
        )
        result = self.function(*args, **kwargs)
        return result if self.item is None else result[self.item]

    def without_values(self) -> "Call":
        """The same for cells that hold nothing. Their gradients can be computed."""
        return self._given_instead({id(cell): cell.bare() for cell in self.cells})

    def with_copies(self) -> "Call":
        """The same with copies of its tensors, for when it is run later: they may change."""
        return self._given_instead({id(t): t.detach().clone() for t in self.tensors})

    def _given_instead(self, others: dict[int, Any]) -> "Call":
        if not others:
            return self
        args, kwargs = compat.map_arguments(
            self.args, self.kwargs, lambda leaf: others.get(id(leaf), leaf)
        )
        return replace(self, args=args, kwargs=kwargs)

    def of_others(self, others: "dict[Cell, Cell]") -> "Call":
        """The same with ``others`` in place of the cells that it was made of."""
        for cell in self.cells:
            if cell not in others:
                assert isinstance(cell.source, Call)
                call = cell.source.of_others(others)
                others[cell] = Cell(call, cell.like, cell.device, is_detached=cell.is_detached)
        return self._given_instead({id(cell): others[cell] for cell in self.cells})

    def gradients(self, gradient: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
        """Of each cell the gradient, from that of the result; None where it is not wanted."""
        with torch.enable_grad(), compat.autocast_as(self.autocast):
            leaves = {
                cell: (cell.undefined() if self.needs_no_values else cell.look_back())
                .detach()
                .requires_grad_(is_wanted)
                for cell, is_wanted in zip(self.cells, wanted, strict=True)
            }
            result = self.run(leaves)
        asked = [leaf for leaf in leaves.values() if leaf.requires_grad]
        given = iter(torch.autograd.grad(result, asked, gradient, materialize_grads=True))
        return [next(given) if leaf.requires_grad else None for leaf in leaves.values()]


def written_to() -> RuntimeError:
    return RuntimeError(
        "lmhead_pass: one of the variables needed for gradient computation has been modified by an "
        "inplace operation: logits that a compiled model returned. Write to a clone of them, or "
        f"set {SETTING}."
    )


class Cell:
    """A value that is computed when it is first read, and kept from then on.

    All that was made of it before is computed at the same time: the reader may change it next. What
    is made of it afterwards is computed at once.
    """

    def __init__(
        self,
        source: Recipe | Call | None,
        like: Tensor,
        device: torch.device,
        value: Tensor | None = None,
        is_detached: bool = False,
    ):
        """``like`` has the size, strides and dtype of the value, and is on the meta device."""
        self.source = source
        self.like = like
        self.device = device
        """Of the value."""
        self.identity = object()
        """What a gradient of this is known by."""
        self.value = value
        """Without a gradient."""
        self.owner: Callable[[], Tensor | None] = lambda: None
        """The tensor that stands for this, as long as somebody holds it."""
        self.versions = source.versions if isinstance(source, Recipe) else []
        """Of what they are computed from, when they were returned."""
        self.is_detached = is_detached
        """Whether no gradient goes from here to the hidden states and the weight: a call without
        one made it (``detach``, under no_grad), or all that it was made of is detached."""
        self.alone: Tensor | None = None
        """The value in memory of its own, until it is read (``look``, ``rows_alone``)."""
        self.is_used_again = False
        """Whether a checkpointed region has used these logits unread: it runs once more in the
        backward, and would save other tensors if it found values."""
        self._differentiated: list[weakref.ref[Call]] = []
        self.first_way: object = None
        """How the first result that has no vocabulary was taken of these logits (``foresight``)."""
        self.has_gradients = False
        """Whether its gradients were computed with it."""
        self.results: list[weakref.ref[Any]] = []
        """What was made of these logits as they were returned and has a gradient."""
        self.first_differentiated: object = None
        """How the first of them was taken (``one_of_several``)."""
        self.foreseen: dict[object, Tensor] = {}
        """Results that were computed with the first, and that nobody has asked for yet."""
        self._original: Tensor | None = None
        self._version = 0
        self.numbers_alone = 0
        """How many numbers of what was made of this were computed so."""
        self.rows_alone: tuple[object, Tensor] | None = None
        """The last of them, and how they were taken."""
        self.taken: list[Any] = []
        """Of logits as a model returned them, what was taken of them unread (``taken_again``)."""
        self._is_root = isinstance(source, Recipe)
        # Never itself: memory waits for no garbage collector.
        self._roots: tuple[Cell, ...] = ()
        self._ways_back: set[Cell] = set()
        self._made: list[weakref.ref[Cell]] = []
        self._form: Tensor | None = None
        self._is_settled = value is not None
        """Whether the value is computed, and those of all that was made of it before."""
        if isinstance(source, Call):
            cells = source.cells
            self._roots = source.roots
            self.is_detached = is_detached or all(cell.is_detached for cell in cells)
            if not self.is_detached:
                self._ways_back = source.ways_back
            for cell in cells:
                cell._made.append(weakref.ref(self))
            if any(cell.value is not None for cell in cells):
                self.read()

    def is_needed_by(self, call: Call) -> None:
        """The gradient of ``call`` needs the value that this has now, as long as somebody holds it
        for a backward."""
        self._differentiated = [ref for ref in self._differentiated if ref() is not None]
        self._differentiated.append(weakref.ref(call))

    @property
    def is_differentiated(self) -> bool:
        """Whether the gradient of a call that was given this needs the value it had then."""
        return any(ref() is not None for ref in self._differentiated)

    @property
    def roots(self) -> "tuple[Cell, ...]":
        """As those of a call."""
        return (self,) if self._is_root else self._roots

    @property
    def ways_back(self) -> "set[Cell]":
        """Those of ``roots`` to which a gradient goes from here."""
        if isinstance(self.source, Recipe) and self.source.requires_grad:
            return {self}
        return self._ways_back

    @property
    def is_late(self) -> bool:
        """Whether the head of these logits has been written to since they were returned."""
        recipe = self.source
        return not isinstance(recipe, Recipe) or self.versions != recipe.versions

    @property
    def made(self) -> "list[Cell]":
        """What was made of this and is still held by somebody."""
        return [cell for ref in self._made if (cell := ref()) is not None]

    def read(self) -> Tensor:
        """The value. RuntimeError if it can no longer be computed."""
        if not self._is_settled:
            first = self._unread_sources()
            # It may be read again elsewhere, so no mode or transform of this reader applies.
            with compat.outside_of_modes(), torch.inference_mode(False), torch.no_grad():
                for cell in first:
                    cell._compute()
            for cell in first:
                cell._compute_with_others()
        assert self.value is not None
        return self.value

    @property
    def is_to_stay_unread(self) -> bool:
        """Whether a checkpointed region that has used this is to find it unread again."""
        return self.value is None and any(root.is_used_again for root in self.roots)

    def look(self) -> Tensor:
        """The value, for those that neither write to it nor keep its memory."""
        if not self.is_to_stay_unread:
            return self.read()
        if self.alone is None:
            with compat.outside_of_modes(), torch.inference_mode(False), torch.no_grad():
                if isinstance(self.source, Recipe):
                    self.alone = self.source.compute()
                else:
                    assert self.source is not None
                    values = {cell: cell.look() for cell in self.source.cells}
                    with compat.autocast_as(self.source.autocast):
                        self.alone = self.source.run(values).detach()
        return self.alone

    def look_back(self) -> Tensor:
        """The value that calls were given before somebody wrote to it."""
        if self._original is not None:
            return self._original
        value = self.look()
        if self.is_differentiated and not self.is_as_computed:
            raise written_to()
        return value

    def undefined(self) -> Tensor:
        """A tensor of the value's form, with any values."""
        like = self.like
        return torch.empty_strided(like.size(), like.stride(), dtype=like.dtype, device=self.device)

    def bare(self) -> "Cell":
        """For the value's gradient, without what the value is computed from."""
        cell = Cell(None, self.like, self.device, is_detached=self.is_detached)
        cell.identity = self.identity
        return cell

    def replace_value(self, value: Tensor) -> None:
        """Let ``value``, of the same form, be there instead, as if it had been written."""
        self.value, self._version = value, -1

    def keep_original(self) -> None:
        """Somebody is about to write to the value, which has been read: gradients need it as it is.

        So they may need that of what shares its memory.
        """
        first = self
        while first.is_view:
            assert isinstance(first.source, Call)
            (first,) = first.source.cells
        pending = [first]
        while pending:
            cell = pending.pop()
            if cell.is_differentiated and cell._original is None and cell.value is not None:
                with compat.outside_of_modes(), torch.inference_mode(False), torch.no_grad():
                    cell._original = cell.value.clone()
            pending += [made for made in cell.made if made.is_view]

    def _unread_sources(self) -> "list[Cell]":
        if isinstance(self.source, Call):
            unread = [cell for cell in self.source.cells if cell.value is None]
            if unread:
                return [first for cell in unread for first in cell._unread_sources()]
        return [self]

    def _compute(self) -> None:
        if self.value is None:
            if isinstance(self.source, Recipe):
                self.value = self.source.compute()
            elif isinstance(self.source, Call):
                values = {cell: cell.value for cell in self.source.cells}
                if any(value is None for value in values.values()):
                    return  # once the others are read
                with compat.autocast_as(self.source.autocast):
                    self.value = self.source.run(values).detach()  # type: ignore[arg-type]
        if self.value is not None:
            self._version = compat.version_of(self.value)
        for cell in self.made:
            cell._compute()
        self._is_settled, self.alone, self.rows_alone = True, None, None
        if isinstance(self.source, Recipe) or not self.is_view:
            self.source = None

    def _compute_with_others(self) -> None:
        """What was made of this and of unread logits, which takes these: this may be written to."""
        for cell in self.made:
            cell.read()
            cell._compute_with_others()

    @property
    def is_unread(self) -> bool:
        """Whether the value is still to be computed from a head."""
        return self.value is None and bool(self.roots)

    @property
    def is_as_computed(self) -> bool:
        """Whether nobody has written to the value."""
        return self.value is None or compat.version_of(self.value) == self._version

    def form(self) -> Tensor:
        """A tensor of the value's form, without a value: the same until the value is read."""
        if self._form is None:
            storage = None
            for cell in self.source.cells if isinstance(self.source, Call) else ():
                if compat.memory_of(cell.like) == compat.memory_of(self.like):
                    storage = cell.form().untyped_storage()
            self._form = compat.without_memory(self.like, self.device, storage)
        return self._form

    @property
    def is_view(self) -> bool:
        """Whether the value is in the memory of that which it was made of."""
        if not isinstance(self.source, Call) or self.value is None:
            return False
        (*_, cell) = self.source.cells
        return cell.value is not None and compat.memory_of(cell.value) == compat.memory_of(
            self.value
        )
