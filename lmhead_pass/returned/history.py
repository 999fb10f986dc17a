"""How autograd sees lazy logits: nodes between hidden states, logits, and what is made of them.

Lazy logits are tensors with a history like others, so that hooks, ``torch.autograd.grad`` and
leaves work as ever. What comes back through these nodes is a ``LazyGradient`` if the op computed
it, and a plain tensor of the logits' size if somebody has read the logits.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compat import lazy_tensors as compat
from ..compat.compiling import is_batched, never_compiled
from .cells import Call, Cell, written_to
from .joint_gradients import Joinable, take_all
from .lazy_gradient import (
    Gradients,
    LazyGradient,
    Sources,
    Term,
    known_by,
    taken,
    terms_of,
    through,
)
from .one_of_several import Result, done
from .recipe import SETTING, Recipe


def _second_time() -> RuntimeError:
    return RuntimeError(
        "Trying to backward through the graph a second time. Specify retain_graph=True"
    )


class Head(torch.autograd.Function):
    """Logits of hidden states, weight and bias: nothing is computed."""

    @staticmethod
    def forward(
        ctx: Any,
        make: Callable[[], Tensor],
        recipe: Recipe,
        cell: Cell,
        is_late: bool,
        is_cut_off: bool,
        *inputs: Tensor,
    ) -> Tensor:
        """The head may have been written to since (``is_late``), and ``inputs`` may lack the way
        back to what they were made of (``is_cut_off``). An empty tensor that requires a gradient
        may come after all.
        """
        ctx.recipe, ctx.identity = recipe, cell.identity
        ctx.is_late, ctx.is_cut_off = is_late, is_cut_off
        ctx.save_for_backward(*_read_by_gradients(recipe, ctx.needs_input_grad[5:], inputs))
        return make()

    @staticmethod
    @never_compiled
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        recipe = ctx.recipe
        if recipe is None:
            raise _second_time()
        if not compat.keeps_graph():
            ctx.recipe = None
        count = len(recipe.tensors)
        needed = ctx.needs_input_grad[5 : 5 + count]
        extra = (None,) * (len(ctx.needs_input_grad) - 5 - count)
        terms = known_by(terms_of(gradient), ctx.identity)
        if ctx.is_cut_off:
            _refuse(
                terms,
                "DistributedDataParallel cuts its graph into parts, which may return no more than "
                "they did. Compute the loss inside the compiled model, set "
                "torch._dynamo.config.optimize_ddp = False",
            )
        results: Gradients = (None,) * len(needed)
        sources, others = taken(terms)
        plain = [term.dense() for term in others]
        if plain:
            if ctx.is_late:
                raise RuntimeError(
                    "lmhead_pass: the head of logits that a compiled model returned has been "
                    "modified by an inplace operation, and their gradient needs it as it was. Call "
                    f"backward() before optimizer.step(), or set {SETTING}."
                )
            results = _gradients(recipe, ctx.saved_tensors, needed, sum(plain[1:], plain[0]))
        for part in take_all(sources):
            if part:
                results = tuple(map(_sum, results, part))
            part = ()  # A weight's gradient, and the next one is computed now.
        wanted = (r if is_needed else None for r, is_needed in zip(results, needed, strict=True))
        return None, None, None, None, None, *wanted, *extra


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    # Of a weight, or hidden states: nobody else has it, and the weight's is large.
    is_own = a.dim() == b.dim() == 2 and a.is_contiguous() and a.dtype == b.dtype
    return a.add_(b) if is_own else a + b


def _refuse(terms: Sequence[Term], why: str) -> None:
    """Zeros or None come from code that wraps all outputs of a model: they are no gradient."""
    if any(term.sources is not None or term.dense().any() for term in terms):
        raise RuntimeError(
            "lmhead_pass: a gradient would flow into logits that a compiled model returned without "
            f"computing them, and it cannot get through to the model: {why}, or set {SETTING}."
        )


def _read_by_gradients(
    recipe: Recipe, needed: Sequence[bool], inputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """What of hidden states, weight and bias may not be written to before the backward."""
    hidden, weight, *bias = inputs[: len(recipe.tensors)]
    if not recipe.is_linear:
        return [hidden, weight, *bias]
    return [hidden if needed[1] else None, weight if needed[0] else None, *(None for _ in bias)]


def _gradients(
    recipe: Recipe, inputs: Sequence[Any], needed: Sequence[bool], gradient: Tensor
) -> Gradients:
    """Of hidden states, weight and bias, from that of the logits. ``inputs`` are those saved."""
    if recipe.is_linear:
        return _linear_gradients(recipe, inputs, needed, gradient)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        if not create_graph:
            inputs = [
                tensor.detach().requires_grad_(is_needed)
                for tensor, is_needed in zip(inputs, needed, strict=True)
            ]
        logits = recipe.apply(*inputs)
    asked = [tensor for tensor, is_needed in zip(inputs, needed, strict=True) if is_needed]
    given = iter(torch.autograd.grad(logits, asked, gradient, create_graph=create_graph))
    return tuple(next(given) if is_needed else None for is_needed in needed)


def _linear_gradients(
    recipe: Recipe, inputs: Sequence[Any], needed: Sequence[bool], gradient: Tensor
) -> Gradients:
    """The same without the logits, where they are ``hidden @ weight.T + bias``."""
    hidden, weight, *_ = inputs
    dtype = recipe.product_dtype
    by_rows = gradient.movedim(recipe.vocab_dim, -1)
    flat = by_rows.reshape(-1, by_rows.size(-1)).to(dtype)
    results: list[Tensor] = []
    if needed[0]:
        matrix = (weight.t() if recipe.weight_is_transposed else weight).flatten(1).to(dtype)
        results.append(flat @ matrix)
    if needed[1]:
        rows = hidden.reshape(-1, hidden.size(-1)).to(dtype)
        results.append(rows.t() @ flat if recipe.weight_is_transposed else flat.t() @ rows)
    if any(needed[2:]):
        results.append(flat.sum(0))
    given = iter(results)
    return tuple(
        next(given).view(tensor.shape).to(tensor.dtype) if is_needed else None
        for tensor, is_needed in zip(recipe.tensors, needed, strict=True)
    )


class Derive(torch.autograd.Function):
    """Logits that are made of others, by a call that is written down."""

    @staticmethod
    def forward(ctx: Any, make: Callable[[], Tensor], call: Call, *logits: Tensor) -> Tensor:
        ctx.call, ctx.logits, ctx.likes = call, logits, _likes(logits)
        ctx.made_by = _made_by(logits)
        made: Any = make()
        ctx.identity = made._cell.identity
        result: Tensor = made
        return result

    @staticmethod
    @never_compiled
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        needed, call, logits = ctx.needs_input_grad[2:], ctx.call, ctx.logits
        if call is None or (torch.is_grad_enabled() and logits is None):
            raise _second_time()
        if not compat.keeps_graph():
            # Who keeps the loss keeps this, and is to keep neither values nor hidden states.
            ctx.logits, ctx.call = None, call.without_values() if call.needs_no_values else None
        if torch.is_grad_enabled():
            return None, None, *_differentiable(ctx, gradient, needed)
        if not isinstance(gradient, LazyGradient):
            return None, None, *call.gradients(gradient, needed)
        terms = known_by(gradient.terms, ctx.identity)
        return None, None, *_lazily(call, ctx.likes, needed, terms)


def _lazily(
    call: Call,
    likes: Sequence[tuple[Tensor, torch.device]],
    needed: Sequence[bool],
    terms: Sequence[Term],
) -> list[Tensor | None]:
    """The gradients of what ``call`` reads, from the ``terms`` of that of its result."""
    results: list[Tensor | None] = []
    # A leaf that was made of detached logits needs a gradient, and hands nothing on.
    way_back = [i for i, cell in enumerate(call.cells) if needed[i] and not cell.is_detached]
    for number, (like, device) in enumerate(likes):
        change = _change(call, needed, number)
        ways = len(way_back) if number in way_back else 0
        identity = call.cells[number].identity
        handed_on = [through(term, change, ways, identity) for term in terms]
        results.append(LazyGradient(like, device, handed_on) if needed[number] else None)
    return results


def _change(call: Call, needed: Sequence[bool], number: int) -> Callable[[Tensor], Tensor]:
    def change(gradient: Tensor) -> Tensor:
        wanted = [place == number and needed[place] for place in range(len(needed))]
        result = call.gradients(gradient, wanted)[number]
        assert result is not None
        return result

    return change


class Consume(torch.autograd.Function):
    """What a call makes of logits and that has no vocabulary, computed by the op."""

    @staticmethod
    def forward(ctx: Any, result: Result, value: Tensor | None, *logits: Tensor) -> Tensor:
        """``value`` is the result if it is known, without what its gradient needs."""
        ctx.result, ctx.call, ctx.logits, ctx.likes = result, result.call, logits, _likes(logits)
        ctx.made_by = _made_by(logits)
        ctx.recipes = [recipe for recipe, _ in result.call.recipes]
        for root in result.call.ways_back:
            root.results.append(weakref.ref(result))
        if value is not None:
            return value.detach()
        if is_piece(result.call):
            # Gradients that are computed now would wait for the backward, one for each piece.
            with torch.no_grad():
                return result.compute().detach()
        with torch.enable_grad():
            result.value = result.compute()
        return result.value.detach()

    @staticmethod
    @never_compiled
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        needed, result = ctx.needs_input_grad[2:], ctx.result
        if result is None:
            raise _second_time()
        call = result.call
        if torch.is_grad_enabled():
            return None, None, *_differentiable(ctx, gradient, needed)
        if is_batched(gradient):
            return None, None, *call.gradients(gradient, needed)
        # What has been computed has saved what it still needs.
        if result.value is None and not result.is_unchanged:
            raise RuntimeError(
                "lmhead_pass: one of the variables needed for gradient computation has been "
                "modified by an inplace operation: hidden states or head of returned logits, or "
                "targets. Call backward() before what writes to them, optimizer.step() for "
                f"instance, or set {SETTING}."
            )
        done(result)
        keep, compute, known = compat.keeps_graph(), result.compute, result.value
        inputs = [tensor for root in call.ways_back for tensor in result.tensors[root]]
        asked = [tensor for tensor in inputs if tensor.requires_grad]

        def sources() -> Gradients:
            with torch.enable_grad():
                value = compute() if known is None else known
            if not asked or not value.requires_grad:
                return ()
            # Of a count of words, say, there is none.
            given = iter(
                torch.autograd.grad(
                    value, asked, gradient, retain_graph=keep, materialize_grads=True
                )
            )
            return tuple(next(given) if tensor.requires_grad else None for tensor in inputs)

        recipes = ctx.recipes if known is None or known.dim() > 0 else ()
        if not keep:
            ctx.result = ctx.call = ctx.logits = ctx.recipes = None
        of = Sources(sources, recipes)
        if result.is_recomputed or (known is not None and known.dim() > 0):
            of = Joinable(sources, result, gradient, recipes)
        terms = [Term(lambda: gradient, of)]
        return None, None, *_lazily(call, ctx.likes, needed, terms)


def _differentiable(ctx: Any, gradient: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
    """Gradients that can be differentiated again, of the logits' values."""
    call: Call = ctx.call
    if ctx.made_by != _made_by(ctx.logits):
        raise written_to()
    values = [
        Values.apply(tensor, value) if tensor.requires_grad else value  # type: ignore[no-untyped-call]
        for tensor in ctx.logits
        for value in [tensor._cell.look_back()]
    ]
    with compat.autocast_as(call.autocast):
        result = call.run(dict(zip(call.cells, values, strict=True)))
    asked = [value for value, is_needed in zip(values, needed, strict=True) if is_needed]
    given = iter(torch.autograd.grad(result, asked, gradient, create_graph=True))
    return [next(given) if is_needed else None for is_needed in needed]


def _made_by(logits: Sequence[Tensor]) -> list[Any]:
    """The node of each that made it: another one once it is written to with a gradient."""
    with compat.without_torch_function():
        return [tensor.grad_fn for tensor in logits]


def is_piece(call: Call) -> bool:
    """Whether ``call`` reads no more than half of the logits that the model returned."""
    read = max(cell.like.numel() for cell in call.cells)
    return all(2 * read <= root.like.numel() for cell in call.cells for root in cell.roots)


def _likes(logits: Sequence[Any]) -> list[tuple[Tensor, torch.device]]:
    return [(tensor._cell.like, tensor._cell.device) for tensor in logits]


class Values(torch.autograd.Function):
    """The values of lazy logits, as a plain tensor with their gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Any, values: Tensor) -> Tensor:
        return values.detach()

    @staticmethod
    @never_compiled
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Become(torch.autograd.Function):
    """Gives a lazy tensor the history of ``value``, which somebody has written to its memory."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, value: Tensor) -> Tensor:
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    @never_compiled
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


class Lose(torch.autograd.Function):
    """Takes a lazy tensor its history: autograd has none for one of several views (``unbind``) once
    their memory was written to."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, why: str) -> Tensor:
        ctx.mark_dirty(logits)
        ctx.why = why
        return logits

    @staticmethod
    @never_compiled
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        raise RuntimeError(ctx.why)


class Gate(torch.autograd.Function):
    """The history of logits that were just returned, before anybody has touched them.

    A custom function that is given such logits may not know them by another.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, anything: Tensor) -> Tensor:
        ctx.mark_dirty(logits)
        ctx.set_materialize_grads(False)
        return logits

    @staticmethod
    @never_compiled
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[None, None]:
        if gradient is not None:
            _refuse(
                terms_of(gradient),
                "it came from a torch.autograd.Function that was given them as they were returned. "
                "Give it logits.clone()",
            )
        return None, None
