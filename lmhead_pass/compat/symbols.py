"""Sizes and numbers that may be others the next time, as in Dynamo's graphs."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import SymInt, Tensor

from .graphs import size_hint
from .lazy_tensors import new_fake_mode
from .lookup import find

_TRACED_AGAIN = "what is taken of returned logits is traced for each size of a batch"
_NAMES = (
    "torch.fx.experimental.symbolic_shapes.ShapeEnv",
    "torch.fx.experimental.symbolic_shapes.StatelessSymbolicContext",
    "torch.fx.experimental.symbolic_shapes.DimDynamic",
    "torch._dynamo.source.ConstantSource",
    "torch._dispatch.python.enable_python_dispatcher",
)


def _found() -> list[Any]:
    return [find(name, _TRACED_AGAIN) for name in _NAMES]


def are_known() -> bool:
    """Whether this torch has symbols: else nothing may change."""
    return None not in _found()


class Symbols:
    """Fake tensors and numbers that stand for others, too."""

    def __init__(self) -> None:
        environment, self._context, self._kinds, self._source, self._dispatcher = _found()
        # Without values: nobody would look at those of the next time.
        self._environment = environment and environment(
            allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False
        )
        self._mode = new_fake_mode(shape_env=self._environment)
        self._inputs: list[Any] = []

    @contextlib.contextmanager
    def block(self) -> Iterator[None]:
        """A block in which these are what calls are given."""
        # Functions in C++ that ask for sizes would make constants of symbols.
        dispatcher = self._dispatcher() if self._dispatcher else contextlib.nullcontext()
        with self._mode, dispatcher:
            yield

    def tensor(self, tensor: Tensor, may_change: Sequence[bool]) -> Tensor:
        """A fake of ``tensor``, of other sizes too in those dimensions that ``may_change``."""
        tensor = tensor.detach()
        if tensor.storage_offset():  # It makes no difference, and none is to be made of it.
            tensor = tensor.as_strided(tensor.size(), tensor.stride(), 0)
        if any(may_change):
            kinds = [self._kinds.DYNAMIC if one else self._kinds.STATIC for one in may_change]
            context = self._context(dynamic_sizes=kinds)
            fake: Tensor = self._mode.from_tensor(tensor, symbolic_context=context)
        else:
            fake = self._mode.from_tensor(tensor, static_shapes=True)
        self._inputs.append(fake)
        return fake

    def number(self, number: float) -> Any:
        """A symbol for ``number``: another whole number, or float, the next time."""
        environment, source = self._environment, self._source(f"number_{len(self._inputs)}")
        symbol = environment.create_unspecified_symbol(number, source, self._kinds.DYNAMIC)
        make = "create_symintnode" if isinstance(number, int) else "create_symfloatnode"
        self._inputs.append(getattr(environment, make)(symbol, hint=number, source=source))
        return self._inputs[-1]

    def take_as_equal(self, tensors: Iterable[Tensor]) -> None:
        """Let sizes of ``tensors`` that are equal now be equal the next time."""
        known: dict[int, SymInt] = {}
        for size in (size for tensor in tensors for size in tensor.shape):
            if isinstance(size, SymInt):
                # A comparison that is asked for is one of the condition's.
                bool(size == known.setdefault(size_hint(size), size))

    def condition(self) -> Callable[[Sequence[Any]], bool]:
        """Whether other tensors and numbers may take the places of these, in this order.

        It depends on what has been done with these: a size may have been compared with another one.
        """
        environment = self._environment
        code = environment.produce_guards_expression(self._inputs, ignore_static=True)
        forms = [_form(one, _as_constant) for one in self._inputs]

        def holds(inputs: Sequence[Any]) -> bool:
            for form, one in zip(forms, inputs, strict=True):
                if any(a != b for a, b in zip(form, _form(one), strict=True) if a is not None):
                    return False
            return code is None or bool(environment.evaluate_guards_expression(code, inputs))

        return holds


def _form(one: Any, change: Callable[[Any], Any] = lambda size: size) -> list[Any]:
    """Sizes and strides of a tensor."""
    return [change(n) for n in (*one.shape, *one.stride())] if isinstance(one, Tensor) else []


def _as_constant(size: Any) -> int | None:
    """``size`` if it may be no other; None if it may."""
    number: int | None = size.node.maybe_as_int() if isinstance(size, SymInt) else size
    return number
