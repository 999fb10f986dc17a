"""Mistakes that the pass or its op might make, to see that programs find them.

Each is planted where nothing private is touched: in the op, which gets another problem than it was
asked or gives other results, or in the graph that a program was rewritten to. Neither needs the
program to be captured again.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from lmhead_pass.op.kernels import dispatch
from lmhead_pass.op.problem import Gradients, Problem

# ---- in the op ----------------------------------------------------------------------------------


@contextmanager
def in_the_op(
    problem: Callable[[Problem], Problem] = lambda problem: problem,
    loss: Callable[[Problem, Tensor], Tensor] = lambda problem, loss: loss,
    gradients: Callable[[Problem, Gradients], Gradients] = lambda problem, gradients: gradients,
    upstream: Callable[..., tuple[Tensor | None, Tensor | None]] = lambda *upstream: upstream,
) -> Iterator[None]:
    """Let the op compute another problem than it is asked, or change what it gives or is given."""
    loop = dispatch.loop_for("cpu")

    def forward(asked, measures):
        losses, *results = loop.forward(problem(asked), measures)
        return [loss(asked, losses), *results]

    def forward_and_gradients(asked, needed, measures):
        total, *results = loop.forward_and_gradients(problem(asked), needed, measures)
        return [loss(asked, total), *gradients(asked, Gradients(*results[:3])), *results[3:]]

    def backward(asked, needed, row_max, log_sum, *given):
        return gradients(
            asked, loop.backward(problem(asked), needed, row_max, log_sum, *upstream(*given))
        )

    planted = SimpleNamespace(
        forward=forward, forward_and_gradients=forward_and_gradients, backward=backward
    )
    with mock.patch.object(dispatch, "loop_for", lambda device: planted):
        yield


def another_problem(**fields: Any) -> Callable[[], Any]:
    """The op does not hear of some of its arguments."""
    return lambda: in_the_op(problem=lambda problem: replace(problem, **fields))


without_bias = another_problem(bias=None)
without_class_weights = another_problem(class_weight=None)
without_label_smoothing = another_problem(label_smoothing=0.0)
without_scale = another_problem(logit_scale=1.0)
without_softcap = another_problem(softcap=None)
without_weights_of_rows = another_problem(coefficient=None)
without_z_loss = another_problem(z_loss=None)
without_masks = another_problem(fill=None)
without_coefficients_of_logsumexps = another_problem(logsumexp_coefficient=None)


def without_ignored_rows():
    def change(problem):
        counted = problem.target != problem.ignore_index
        return replace(problem, target=torch.where(counted, problem.target, 0))

    return in_the_op(problem=change)


def with_ignored_rows_in_no_term():
    """As if a z-loss left out the rows that the cross entropy ignores."""

    def change(problem):
        if problem.z_loss is None:
            return problem
        ignored = problem.target == problem.ignore_index
        return replace(problem, z_loss=problem.z_loss.masked_fill(ignored, 0))

    return in_the_op(problem=change)


def without_last_partial_chunk():
    """As if the logits of the last rows, which fill no chunk, were zero."""

    def change(problem):
        rows = len(problem.hidden)
        whole = rows - rows % problem.batch_chunk_size
        if whole in (0, rows):
            return problem
        kept = torch.arange(rows).unsqueeze(1) < whole
        return replace(problem, hidden=torch.where(kept, problem.hidden, 0))

    return in_the_op(problem=change)


def mean_over_all_rows():
    def share(problem):
        counted = problem.target != problem.ignore_index
        if problem.reduction != "mean":
            return 1.0
        if problem.class_weight is None:
            return counted.sum() / len(counted)
        return problem.class_weight[problem.target[counted]].sum() / len(counted)

    def gradients(problem, results):
        return Gradients(*(result * share(problem) for result in results))

    return in_the_op(loss=lambda problem, loss: loss * share(problem), gradients=gradients)


def with_gradients_off_by_a_percent():
    return in_the_op(
        gradients=lambda problem, results: results._replace(weight=results.weight * 1.01)
    )


def with_softmax_in_half_precision():
    return in_the_op(loss=lambda problem, loss: loss.bfloat16().to(loss.dtype))


def with_one_upstream_gradient_for_all_rows():
    def one_for_all(grad_losses, grad_logsumexp):
        if grad_losses is not None:
            grad_losses = grad_losses.mean().expand_as(grad_losses)
        return grad_losses, grad_logsumexp

    return in_the_op(upstream=one_for_all)


def without_gradient_of_logsumexp():
    return in_the_op(upstream=lambda grad_losses, grad_logsumexp: (grad_losses, None))


# ---- in the rewritten graph ---------------------------------------------------------------------

_CALLS = (
    torch.ops.lmhead_pass.linear_cross_entropy.default,
    torch.ops.lmhead_pass.linear_cross_entropy_and_measures.default,
)
_TERMS = ("coefficient", "logsumexp_coefficient", "z_loss")


@dataclass
class Rewritten:
    """A copy of a rewritten graph, to be edited."""

    module: GraphModule
    old: set[str]
    """Names of the nodes that were there before the pass."""
    edits: int = 0

    @property
    def graph(self) -> Graph:
        return self.module.graph

    @property
    def calls(self) -> list[Node]:
        """Of the op."""
        return [node for node in self.graph.nodes if node.target in _CALLS]

    def argument(self, call: Node, name: str) -> Any:
        return call.args[_place(call, name)]

    def change(self, call: Node, name: str, value: Any) -> None:
        """Let ``call`` get another argument."""
        if self.argument(call, name) is not value:
            call.update_arg(_place(call, name), value)
            self.edits += 1

    def bypass(self, nodes: Iterable[Node]) -> None:
        """Let what reads one of ``nodes`` read the first argument of that node instead."""
        for node in nodes:
            node.replace_all_uses_with(node.args[0])
            self.edits += 1

    def wrap(self, node: Node, function: Callable[[Tensor], Tensor]) -> None:
        """Let what reads ``node`` read ``function`` of it instead."""
        with self.graph.inserting_after(node):
            wrapped = self.graph.call_function(function, (node,))
        node.replace_all_uses_with(wrapped, delete_user_cb=lambda user: user is not wrapped)
        self.edits += 1

    def before(self, call: Node, *names: str) -> list[Node]:
        """What the pass has inserted to compute these arguments, in the order of the graph."""
        return self._new_from([self.argument(call, name) for name in names], "all_input_nodes")

    def behind(self, call: Node) -> list[Node]:
        """What the pass has inserted to make of the results what their readers are to have."""
        return self._new_from(list(call.users), "users")

    def _new_from(self, nodes: list[Any], further: str) -> list[Node]:
        found: set[Node] = set()
        while nodes:
            node = nodes.pop()
            if isinstance(node, Node) and node.name not in self.old and node not in found:
                found.add(node)
                nodes += [n for n in getattr(node, further) if n.target not in _CALLS]
        return sorted(found)


def _place(call: Node, name: str) -> int:
    return [argument.name for argument in call.target._schema.arguments].index(name)


def _is(node: Node, *names: str) -> bool:
    """Whether ``node`` calls a method, a function or an ATen operator with one of these names."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        target = target._schema.name.split("::")[1]
    return (target if isinstance(target, str) else target.__name__) in names


def without_detach(rewritten: Rewritten) -> None:
    rewritten.bypass(
        node
        for node in rewritten.graph.nodes
        if _is(node, "detach") and node.name not in rewritten.old
    )


class _WithoutUpstream(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        return torch.ones_like(upstream)


def with_upstream_of_1(loss: Tensor) -> Tensor:
    """``loss``, whose gradient is taken for 1 whatever it is."""
    return _WithoutUpstream.apply(loss)


def without_upstream_gradient(rewritten: Rewritten) -> None:
    for call in rewritten.calls:
        if rewritten.argument(call, "reduction") != "none":
            if call.target is _CALLS[0]:
                losses = [call]
            else:
                losses = [user for user in call.users if user.args[1] == 0]
            for loss in losses:
                rewritten.wrap(loss, with_upstream_of_1)


def under_no_grad(rewritten: Rewritten) -> None:
    """As if a call stood at its first reader, even if that is under no_grad."""
    for call in rewritten.calls:
        with rewritten.graph.inserting_before(call):
            rewritten.graph.call_function(torch._C._set_grad_enabled, (False,))
        with rewritten.graph.inserting_after(call):
            rewritten.graph.call_function(torch._C._set_grad_enabled, (True,))
        rewritten.edits += 1


def _in_weights_of_rows(rewritten: Rewritten, *names: str) -> Iterator[Node]:
    for call in rewritten.calls:
        yield from (node for node in rewritten.before(call, *_TERMS) if _is(node, *names))


def without_mean_in_weights(rewritten: Rewritten) -> None:
    """As if each mean of per-row losses were a sum."""
    rewritten.bypass(
        node for node in _in_weights_of_rows(rewritten, "div") if not isinstance(node.args[1], Node)
    )


def without_divisors_in_weights(rewritten: Rewritten) -> None:
    rewritten.bypass(
        node for node in _in_weights_of_rows(rewritten, "div") if isinstance(node.args[1], Node)
    )


def without_masks_in_weights(rewritten: Rewritten) -> None:
    rewritten.bypass(_in_weights_of_rows(rewritten, "masked_fill"))


def without_places_that_are_set(rewritten: Rewritten) -> None:
    """As if what is written to some places of the losses had left them there."""
    rewritten.bypass(
        _in_weights_of_rows(
            *(rewritten, "index_put", "masked_fill"),
            *("select_scatter", "slice_scatter", "as_strided_scatter"),
        )
    )


def backwards(weights: Tensor) -> Tensor:
    """What belongs to the rows, from the last to the first."""
    return weights.flip(0)


def with_places_mixed_up(rewritten: Rewritten) -> None:
    """As if what is taken out of the losses came from their end."""
    for call in rewritten.calls:
        for name in _TERMS:
            weights = rewritten.argument(call, name)
            if isinstance(weights, Node):
                with rewritten.graph.inserting_before(call):
                    rewritten.change(
                        call, name, rewritten.graph.call_function(backwards, (weights,))
                    )


def _with_numbers_behind(rewritten: Rewritten, name: str) -> Iterator[Node]:
    for call in rewritten.calls:
        for node in rewritten.behind(call):
            if _is(node, name) and isinstance(node.args[1], int | float):
                yield node


def without_shift(rewritten: Rewritten) -> None:
    rewritten.bypass(_with_numbers_behind(rewritten, "add"))


def without_factor(rewritten: Rewritten) -> None:
    """As if what a log-probability is multiplied by before a word is picked counted for nothing."""
    rewritten.bypass(_with_numbers_behind(rewritten, "mul"))


def without_what_was_done_to_the_logits(rewritten: Rewritten) -> None:
    for call in rewritten.calls:
        rewritten.change(call, "logit_scale", 1.0)
        rewritten.change(call, "softcap", None)


def _pairs(rewritten: Rewritten) -> Iterator[tuple[Node, Node]]:
    yield from zip(rewritten.calls, rewritten.calls[1:], strict=False)


def with_any_target(rewritten: Rewritten) -> None:
    """As if all losses of as many rows had the same target."""
    for first, second in _pairs(rewritten):
        targets = [rewritten.argument(call, "target") for call in (first, second)]
        shapes = [target.meta["example_value"].shape for target in targets]
        if shapes[0] == shapes[1]:
            rewritten.change(second, "target", targets[0])


def with_any_values(rewritten: Rewritten) -> None:
    """As if what was done to some logits had been done to all, in each call what was in another."""
    for first, second in _pairs(rewritten):
        for name in ("logit_scale", "softcap"):
            values = [rewritten.argument(call, name) for call in (first, second)]
            rewritten.change(first, name, values[1])
            rewritten.change(second, name, values[0])


def with_any_part_of_the_vocabulary(rewritten: Rewritten) -> None:
    """As if a part of the words were all of them."""
    for call in rewritten.calls:
        rewritten.bypass(
            node
            for node in rewritten.before(call, "weight", "bias")
            if _is(node, "getitem", "narrow")
        )


def with_regions_mixed_up(rewritten: Rewritten) -> None:
    """As if a checkpointed region returned tensors of one shape in another order."""
    for part in rewritten.module.children():
        if isinstance(part, GraphModule):
            output = part.graph.output_node()
            results = list(output.args[0])
            shapes = [result.meta["example_value"].shape for result in results]
            for number, shape in enumerate(shapes):
                if (other := shapes.index(shape)) < number:
                    results[number], results[other] = results[other], results[number]
                    rewritten.edits += 1
            output.args = (tuple(results),)
            part.recompile()


def with_the_values_of_other_rows(rewritten: Rewritten) -> None:
    """As if the rows of the logits were taken from the hidden states' other end."""
    for call in rewritten.calls:
        hidden = rewritten.argument(call, "hidden")
        with rewritten.graph.inserting_before(call):
            rewritten.change(call, "hidden", rewritten.graph.call_function(backwards, (hidden,)))
