"""Runs one model as a training step in two ways, rewritten and as it was, and compares them."""

import copy
import re
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.fx import GraphModule

import lmhead_pass
from lmhead_pass.graph import Refusal, describe, place_in
from lmhead_pass.graph_pass import the_pass
from lmhead_pass.plan import find

from . import table
from .configurations import configurations
from .inputs import inputs_for

Results = dict[str, Tensor]


@dataclass
class Outcome:
    """What became of a model that was compiled in one way."""

    rewrites: int = 0
    graphs: int = 0
    reasons: list[str] = field(default_factory=list)
    """Why losses are left alone, and what ended graphs; without line numbers."""
    details: list[str] = field(default_factory=list)
    """The same, with places in the source."""
    differences: list[str] = field(default_factory=list)
    """What differs from the unfused model by more than rounding."""
    worst: float = 0.0
    """The largest relative error, in units of what is allowed."""


@dataclass
class Built:
    """A tiny random model and inputs that it takes."""

    model: nn.Module
    inputs: dict[str, Any]
    double: nn.Module
    """The same model in FP64."""


def run(class_name: str, kind: str) -> dict[str, Any]:
    """Everything about one model, as plain values."""
    try:
        built = build(class_name, kind)
    except Exception as error:
        return {"not built": _sentence(error)}
    result: dict[str, Any] = {}
    for way in table.WAYS:
        try:
            result[way] = asdict(_compare(built, way))
        except Exception as error:
            result[way] = {"failed": _sentence(error), "trace": traceback.format_exc()[-3000:]}
    return result


def build(class_name: str, kind: str) -> Built:
    """The first configuration and inputs that give a loss; otherwise the first failure."""
    cls = getattr(transformers, class_name)
    failures = []
    for configuration in configurations(cls.config_class, kind):
        try:
            torch.manual_seed(0)
            model = cls(configuration()).train()
            # Before it has run: a model may keep what cannot be copied.
            double = copy.deepcopy(model).double()
        except Exception as error:
            failures.append(error)
            continue
        for inputs in inputs_for(model, kind):
            try:
                _check_loss(model(**inputs).loss)
                return Built(model, inputs, double)
            except Exception as error:
                failures.append(error)
    raise failures[0]


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad or loss.isnan():
        raise ValueError(f"the loss is {loss}")


def _compare(built: Built, way: str) -> Outcome:
    torch._dynamo.reset()
    counters.clear()
    outcome = Outcome()
    both = _with_inductor if table.WITH_INDUCTOR else _without_inductor
    with lmhead_pass.config.patch(strict=True, min_vocab_size=LEAST_VOCAB):
        ours, unfused = both(WAYS[way], built.model, built.inputs, outcome)
    _judge(outcome, ours, unfused, _exact(WAYS[way], built))
    return outcome


def _without_inductor(call, model, inputs, outcome: Outcome) -> tuple[Results, Results]:
    """Captured once; each graph is run as it is, rewritten and then as it was."""
    backend = _Both(outcome)
    compiled = torch.compile(call, backend=backend)
    ours = _step(compiled, model, inputs)
    outcome.rewrites = counters["lmhead_pass"]["rewritten"]
    backend.rewritten = False
    return ours, _step(compiled, model, inputs)


def _with_inductor(call, model, inputs, outcome: Outcome) -> tuple[Results, Results]:
    """Compiled twice, as users do, with and without the pass."""
    ours = _step(torch.compile(call), model, inputs)
    outcome.rewrites = counters["lmhead_pass"]["rewritten"]
    outcome.graphs = counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    with lmhead_pass.disabled():
        return ours, _step(torch.compile(call), model, inputs)


LEAST_VOCAB = 256
WAYS: dict[str, Callable[..., Any]] = {
    "labels": lambda model, inputs: model(**inputs),
    "loss only": lambda model, inputs: model(**inputs).loss,
}


class _Both:
    """A backend that runs each graph rewritten or as it was, whichever is asked for."""

    def __init__(self, outcome: Outcome):
        self.outcome = outcome
        self.rewritten = True

    def __call__(self, module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        if self.rewritten:  # some models are compiled once more in their second run
            self._note(module)
        unfused = copy.deepcopy(module)
        the_pass()(module.graph)
        module.graph.lint()
        module.recompile()
        return lambda *args: (module if self.rewritten else unfused).forward(*args)

    def _note(self, module: GraphModule) -> None:
        self.outcome.graphs += 1
        for part in module.modules():
            if isinstance(part, GraphModule):
                for item in find(part.graph):
                    if isinstance(item, Refusal):
                        self._add(f"{describe(item.loss)}: {item.reason}")
        reason = getattr(module, "compile_subgraph_reason", None)
        if reason is not None and reason.graph_break:
            text = " ".join(reason.reason.split("Hint:")[0].split("\n\n")[0].split())
            stack = "".join(traceback.format_list(reason.user_stack))
            self._add(f"graph break: {text} at {place_in(stack)}")

    def _add(self, detail: str) -> None:
        self.outcome.details.append(detail)
        reason = without_places(detail)
        if reason not in self.outcome.reasons:
            self.outcome.reasons.append(reason)


def without_places(text: str) -> str:
    """``text`` without paths, line numbers and addresses, but with the code it quotes."""
    text = re.sub(r" at \S+?:\d+(?= `|$| )", " at", text)
    text = re.sub(r"[^\s`]*/site-packages/", "", text)
    return re.sub(r"0x[0-9a-f]+", "0x...", text)


def _step(call: Callable[..., Any], model: nn.Module, inputs: dict[str, Any]) -> Results:
    """The loss, the logits if they are returned, and the gradients."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    output = call(model, inputs)
    loss = output if isinstance(output, Tensor) else output.loss
    loss.backward()
    results = {"loss": loss.detach()}
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        results["logits"] = logits.detach().clone()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            results[f"gradient of {name}"] = parameter.grad.detach().clone()
    return results


def _exact(call: Callable[..., Any], built: Built) -> Results:
    """The same step in FP64; nothing if the model cannot do it."""
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in built.inputs.items()}
    try:
        return _step(call, built.double, inputs)
    except Exception:
        return {}


def _judge(outcome: Outcome, ours: Results, unfused: Results, exact: Results) -> None:
    """Errors against FP64 are those of the unfused model, up to a factor, and rounding.

    A factor, since every gradient before the head is computed from one that was rounded otherwise;
    of the worst gradient, since what rounding leaves of a gradient that is zero is arbitrary.
    """
    if ours.keys() != unfused.keys():
        outcome.differences.append(f"only one has {sorted(ours.keys() ^ unfused.keys())}")
        return
    reference = exact if _is_like(unfused, exact) or _is_like(ours, exact) else unfused
    eps = torch.finfo(torch.float32).eps
    allowed = 4 * max(_errors(unfused, reference).values()) + 64 * eps
    errors = _errors(ours, reference)
    outcome.worst = max(errors.values()) / allowed
    for name, error in errors.items():
        if not error <= allowed:
            outcome.differences.append(f"{name}: error {error:.2e}, allowed {allowed:.2e}")


def _is_like(results: Results, exact: Results) -> bool:
    """Whether FP64 did the same: it may overflow masks, and choose other experts."""
    return exact.keys() == results.keys() and all(
        error < 1e-3 for error in _errors(results, exact).values()
    )


def _errors(results: Results, reference: Results) -> dict[str, float]:
    """Each result's largest error relative to its largest value.

    Of gradients that are nothing beside the largest one, relative to a thousandth of that.
    """
    reference = {name: value.double() for name, value in reference.items() if value.numel()}
    sizes = {name: value.abs().amax().item() for name, value in reference.items()}
    floor = 1e-3 * max(size for name, size in sizes.items() if name.startswith("gradient"))
    return {
        name: (results[name].double() - exact).abs().amax().item() / max(sizes[name], floor)
        for name, exact in reference.items()
    }


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]
