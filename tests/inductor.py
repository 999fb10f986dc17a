"""Inductor, with its last step or without.

A C++ compiler takes most of the time of a test that calls ``torch.compile``. Where a test is not
about the code that Inductor generates, it goes through all that Inductor does to a graph before
(the passes, autograd's partition into forward and backward, decompositions), and the graphs are run
as they are; what is done in chunks is not compiled either. ``@pytest.mark.codegen`` asks for
generated code; with ``--codegen``, and on a GPU, all tests have it.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch._inductor.compile_fx as inductor
from functorch.compile import make_boxed_func
from torch.fx import GraphModule

from lmhead_pass.op.kernels import row_loop


def _as_it_is(graph: GraphModule, *args: Any, **options: Any) -> Callable[..., Any]:
    return make_boxed_func(graph.forward)


@contextmanager
def without_codegen() -> Iterator[None]:
    """``torch.compile`` runs the graphs that Inductor would generate code for."""
    flow = functools.partial(inductor.compile_fx, inner_compile=_as_it_is)
    with (
        mock.patch.object(inductor, "compile_fx", flow),
        mock.patch.object(row_loop, "run_compiled", lambda work, tensors: work(*tensors)),
    ):
        yield
