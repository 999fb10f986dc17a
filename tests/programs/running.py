"""Runs a program: captured by Dynamo, with the pass and without, exactly, and with noise."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch._dynamo.exc import SkipFrame
from torch.fx import Graph, GraphModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from lmhead_pass.graph_pass import the_pass

from .mistakes import Rewritten
from .program import ARGUMENTS, Inputs, Program

_TENSORS = [name for name in ARGUMENTS if name != "number"]


@dataclass
class Outcome:
    """All that a caller can see of one run."""

    values: dict[str, Any] = field(default_factory=dict)
    """By name: what was returned, gradients, and what the arguments hold afterwards."""
    requires_grad: dict[str, bool] = field(default_factory=dict)
    structure: str = ""
    error: str | None = None
    """The type of what was raised, and where: in the forward, or the backward."""
    message: str = ""


class Captured:
    """A function captured once by Dynamo, to be run as it is, rewritten, and rewritten wrongly."""

    def __init__(self, function: Callable[..., Any], dynamic: bool):
        self.rewritten = False
        """Whether a call runs what was rewritten, or what was captured."""
        self.edit: Callable[[Rewritten], None] | None = None
        """What is done to a copy of each rewritten graph before it is run."""
        self.failure: Exception | None = None
        """What the pass raised. To the program it would look as if it failed without the pass."""
        self.function = torch.compile(function, backend=self._backend, dynamic=dynamic)
        self._graphs: list[tuple[GraphModule, set[str]]] = []

    def changes(self, edit: Callable[[Rewritten], None]) -> bool:
        """Whether ``edit`` changes any of the rewritten graphs."""
        return sum(_edited(*graph, edit).edits for graph in self._graphs) > 0

    def _backend(self, module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        original = _duplicate(module)
        old = {node.name for node in module.graph.nodes}
        try:
            _rewrite(module)
        except SkipFrame:
            raise  # what takes a loss of returned logits is left to eager
        except Exception as error:
            self.failure = error
            raise
        self._graphs.append((module, old))

        def run(*inputs: Any) -> Any:
            chosen = module if self.rewritten else original
            if self.rewritten and self.edit is not None:
                chosen = _edited(module, old, self.edit).module
            # Not by calling it: a GraphModule prints what its code raises.
            return chosen.forward(*inputs)

        return run

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


def _edited(module: GraphModule, old: set[str], edit: Callable[[Rewritten], None]) -> Rewritten:
    copy = Rewritten(_duplicate(module), old)
    edit(copy)
    copy.graph.lint()
    copy.module.recompile()
    return copy


def _duplicate(module: GraphModule) -> GraphModule:
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    copy = GraphModule(module, graph)
    for name, part in _parts(copy):
        setattr(copy, name, _duplicate(part))
    return copy


def _rewrite(module: GraphModule) -> None:
    """The pass, as Inductor runs it: on parts of the graph first."""
    for _, part in _parts(module):
        _rewrite(part)
    the_pass()(module.graph)
    module.graph.lint()
    module.recompile()


def _parts(module: GraphModule) -> list[tuple[str, GraphModule]]:
    return [(name, part) for name, part in module.named_children() if isinstance(part, GraphModule)]


def run(
    function: Callable[..., Any],
    program: Program,
    inputs: Inputs,
    dtype: torch.dtype,
    around: Callable[[], Any] = nullcontext,
) -> Outcome:
    """Call ``function`` and go backward, and write down what there is to see."""
    outcome = Outcome()
    arguments = inputs.make(dtype)
    stage = "forward"
    with _modes_as_ever(), torch.random.fork_rng(devices=()):
        try:
            with around():
                torch.manual_seed(inputs.seed)
                result = function(*arguments.values(), _linear(arguments, inputs))
                returned, spec = tree_flatten(result)
                outcome.structure = str(spec)
                for index, value in enumerate(returned):
                    if isinstance(value, Tensor):
                        outcome.requires_grad[f"output {index}"] = value.requires_grad
                if program.reads_first:
                    _note_returned(outcome, returned)
                stage = "backward"
                kept = [returned[i] for i in program.gradient_of if i < len(returned)]
                _backward(kept, inputs.seed)
                stage = "reading"
                if not program.reads_first:
                    _note_returned(outcome, returned)
        except Exception as error:
            outcome.error, outcome.message = f"{type(error).__name__} in {stage}", str(error)
            # They hold modes that a graph has entered, and that end when these do.
            traceback.clear_frames(error.__traceback__)
    for name in _TENSORS:
        outcome.values[f"{name} afterwards"] = arguments[name].detach().clone()
        grad = arguments[name].grad
        outcome.values[f"gradient of {name}"] = None if grad is None else grad.clone()
    return outcome


@contextmanager
def _modes_as_ever() -> Iterator[None]:
    """A graph that raises leaves no mode that it has entered."""
    with torch.enable_grad(), torch.inference_mode(False), torch.autocast("cpu", enabled=False):
        yield


def _linear(arguments: dict[str, Any], inputs: Inputs) -> nn.Linear | None:
    """A module with the very weight and bias that the program gets as arguments."""
    if inputs.transposed:
        return None
    head = nn.Linear(1, 1)
    head.weight, head.bias = arguments["weight"], arguments["bias"]
    return head


def _note_returned(outcome: Outcome, returned: list[Any]) -> None:
    for index, value in enumerate(returned):
        copy = value.detach().clone() if isinstance(value, Tensor) else value
        outcome.values[f"output {index}"] = copy


def _backward(roots: list[Any], seed: int) -> None:
    """From all of ``roots`` at once, with upstream gradients that are not all the same."""
    roots = [root for root in roots if isinstance(root, Tensor) and root.requires_grad]
    random = torch.Generator().manual_seed(seed + 1)
    upstream = [
        (torch.rand(root.shape, generator=random, dtype=torch.float64) + 0.5).to(root.dtype)
        for root in roots
    ]
    if roots:
        torch.autograd.backward(roots, upstream)


class _Noise(TorchDispatchMode):
    """Rounds every result once more, at random.

    What a program then gives is what it might give if its steps were taken in another order: how
    far it strays says how well-conditioned the program is.
    """

    def __init__(self, seed: int):
        super().__init__()
        self.random = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        results = result if isinstance(result, tuple | list) else (result,)
        if len(returns) != len(results) and not isinstance(result, list):
            return result
        if isinstance(result, list) and (not returns or returns[0].alias_info is not None):
            return result
        for index, value in enumerate(results):
            alias = None if isinstance(result, list) else returns[index].alias_info
            if alias is None or alias.is_write:
                self._disturb(value)
        return result

    def _disturb(self, value: Any) -> None:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return
        noise = torch.rand(value.shape, generator=self.random, dtype=torch.float64) * 2 - 1
        eps = torch.finfo(value.dtype).eps
        value.copy_((value.double() * (1 + eps * noise)).to(value.dtype))


@contextmanager
def noise(seed: int) -> Iterator[None]:
    """See ``_Noise``."""
    with _Noise(seed):
        yield
