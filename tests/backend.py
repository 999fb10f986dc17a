"""A backend for torch.compile that runs the pass and then the graph as it is, without Inductor.

It takes a hundredth of Inductor's time. What Inductor makes of the rewritten graph is tested with
Inductor, on fewer models.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

from lmhead_pass.graph_pass import the_pass


def _as_it_is(module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    return module.forward


def rewrite(
    function: Callable[..., Any],
    graphs: list[str] | None = None,
    then: Callable[..., Callable[..., Any]] = _as_it_is,
    **options: Any,
) -> Any:
    """``function``, captured by Dynamo, rewritten, and run eagerly.

    ``graphs`` receives the code of each graph, before and after; ``then`` is the backend that
    takes the graphs afterwards.
    """

    def backend(module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        if graphs is not None:
            graphs.append(module.code)
        the_pass()(module.graph)
        module.graph.lint()
        module.recompile()
        if graphs is not None:
            graphs.append(module.code)
        return then(module, example_inputs)

    return torch.compile(function, backend=backend, **options)
