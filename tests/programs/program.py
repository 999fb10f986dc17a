"""One generated program: its source text, its inputs, its settings."""

import linecache
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from lmhead_pass.op.kernels import compiled_blocks

ARGUMENTS = ("hidden", "weight", "bias", "target", "scale", "row", "number")

_SCRIPT = '''\
"""{why}"""
import torch
from tests.programs.checking import check
from tests.programs.program import Inputs, Program

SOURCE = """\\
{source}"""

check(Program(
    source=SOURCE,
    inputs={inputs},
    more_inputs={more_inputs},
    gradient_of={gradient_of},
    reads_first={reads_first},
    returned_logits={returned_logits!r},
    batch_chunk_size={batch_chunk_size},
    captures_unknown_numbers={captures_unknown_numbers},
    compiles_rows={compiles_rows},
))
'''


@dataclass(frozen=True)
class Inputs:
    """What a program is called with; the tensors' values follow from the seed."""

    batch: int
    length: int
    hidden_size: int
    vocab_size: int
    dtype: torch.dtype
    requires_grad: tuple[str, ...] = ()
    """Which of the arguments are leaves that gather a gradient."""
    transposed: bool = False
    """Whether the weight is given as ``[H, V]``."""
    ignored: int | None = None
    """What some of the targets are, beside class indices."""
    seed: int = 0

    def make(self, dtype: torch.dtype) -> dict[str, Any]:
        """Fresh arguments, with the values of ``self.dtype``, in ``dtype``."""
        random = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64)

        rows = (self.batch, self.length)
        weight = normal(self.vocab_size, self.hidden_size) * 0.5
        tensors = {
            "hidden": normal(*rows, self.hidden_size),
            "weight": weight.t().contiguous() if self.transposed else weight,
            "bias": normal(self.vocab_size),
            "scale": normal().abs() + 0.5,
            "row": normal(*rows).abs() + 0.25,
        }
        tensors = {
            name: tensor.to(self.dtype).to(dtype).requires_grad_(name in self.requires_grad)
            for name, tensor in tensors.items()
        }
        for name in ("weight", "bias"):
            tensors[name] = nn.Parameter(tensors[name].detach(), name in self.requires_grad)
        tensors["target"] = self._target(rows, random)
        number = 0.5 + torch.rand((), generator=random, dtype=torch.float64).item()
        arguments = {**tensors, "number": number}
        return {name: arguments[name] for name in ARGUMENTS}

    def _target(self, rows: tuple[int, int], random: torch.Generator) -> Tensor:
        target = torch.randint(self.vocab_size, rows, generator=random)
        if self.ignored is not None:
            target[torch.rand(rows, generator=random) < 0.3] = self.ignored
        return target


@dataclass(frozen=True)
class Program:
    """The source of ``program(*ARGUMENTS, head)``, and how to run it.

    hidden is ``[B, S, H]``, weight ``[V, H]``, bias ``[V]``, target ``[B, S]``, scale ``[]`` and
    row ``[B, S]``; number is a float, another one in each call; head is an ``nn.Linear`` of this
    weight and bias.
    """

    source: str
    inputs: Inputs
    more_inputs: Inputs | None = None
    """Of other sizes: then the program is compiled with dynamic shapes."""
    gradient_of: tuple[int, ...] = (0,)
    """Which of the returned tensors a gradient is sent into."""
    reads_first: bool = True
    """Whether what is returned is read before the backward, or after it."""
    returned_logits: str = "lazy"
    batch_chunk_size: int | None = None
    captures_unknown_numbers: bool = False
    """Whether Dynamo goes on where it does not know how many rows there are, or an item's value."""
    compiles_rows: bool = False
    """Whether Inductor compiles what is done to each row, or ATen runs it as it is."""
    kinds: frozenset[str] = frozenset()
    """Which parts of the grammar it uses."""

    def __repr__(self) -> str:
        return self.script("What hypothesis found")

    def script(self, why: str) -> str:
        """What runs this program again, from the root of the repository."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return _SCRIPT.format(why=why, **fields)

    def function(
        self, exact: bool = False, checkpoint: Callable[..., Any] = checkpoint
    ) -> Callable[..., Any]:
        """The program as a function; ``exact``: with every cast to FP64, and no autocast."""
        source = _in_double(self.source) if exact else self.source
        name = f"<program {hash(source):x}>"
        # Where the pass looks up the user's lines. An entry without a time is never checked.
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        names: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "checkpoint": checkpoint}
        names["uncompiled"] = torch.compiler.disable
        exec(compile(source, name, "exec"), names)
        return names["program"]


def forget() -> None:
    """Drop what torch and Python keep of all programs that ran: lines, code, and fake results."""
    for name in [name for name in linecache.cache if name.startswith(("<program ", "<eval_with"))]:
        del linecache.cache[name]
    torch.fx.graph_module._loader.eval_cache.clear()
    compiled_blocks._compiled.clear()
    FakeTensorMode.cache_clear()


def _in_double(source: str) -> str:
    source = re.sub(r"\.(float|half|bfloat16)\(\)", ".double()", source)
    source = re.sub(r"torch\.(float32|float16|bfloat16)\b", "torch.float64", source)
    return re.sub(r"torch\.autocast\([^)]*\)", "torch.autocast('cpu', enabled=False)", source)
