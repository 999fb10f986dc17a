"""What is done to a block of rows: the part of the graph, and the gradients of what it reads.

A ``BlockWork`` runs as it is, in ATen, or compiled by Inductor (``compiled_blocks.py``).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...compat.kernels import recording_gradients
from ..row_part import RowPart, parse


@dataclass(frozen=True)
class BlockWork:
    """What is asked of each block of a call, whatever its rows."""

    text: str
    """Of the part."""
    keeps_outputs: bool = True
    wanted: tuple[bool, ...] = ()
    """Of the part's inputs, those whose gradients are computed; none if this is empty."""
    upstream: tuple[bool, ...] = ()
    """Of the part's outputs, those whose gradients are given."""

    @property
    def part(self) -> RowPart:
        return parse(self.text)

    def __call__(self, *tensors: Tensor) -> list[Tensor | None]:
        """The outputs, then the gradient of each input, None for 0, in memory of their own.

        ``tensors`` are the inputs of the part, then the gradients of its outputs that are given.
        """
        part, left = self.part, iter(tensors)
        inputs = [next(left) for _ in range(part.inputs)]
        if not any(self.wanted):
            results = part.run([_wide(given) for given in inputs], inputs[0].size(0))
            return [result.clone() for result in results]
        upstream = [next(left) if is_given else None for is_given in self.upstream]
        results, gradients = self._differentiate(inputs, upstream)
        # Nothing that is returned may share memory with logits, which are written over.
        kept = [result.clone() for result in results] if self.keeps_outputs else []
        return [*kept, *(None if of is None else of.clone() for of in gradients)]

    def _differentiate(
        self, inputs: list[Tensor], upstream: list[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """The outputs of the part, and the gradient of each of its inputs."""
        with recording_gradients():
            leaves = [
                _wide(given).detach().requires_grad_(is_wanted)
                for given, is_wanted in zip(inputs, self.wanted, strict=True)
            ]
            results = self.part.run(leaves, inputs[0].size(0))
            ends = [
                (result, of.to(result.dtype))
                for result, of in zip(results, upstream, strict=True)
                if of is not None and result.requires_grad
            ]
            sources = [leaf for leaf in leaves if leaf.requires_grad]
            found: tuple[Tensor | None, ...] = (None,) * len(sources)
            if ends:
                found = torch.autograd.grad(
                    [end for end, _ in ends], sources, [of for _, of in ends], allow_unused=True
                )
        left = iter(found)
        return (
            [result.detach() for result in results],
            [next(left) if is_wanted else None for is_wanted in self.wanted],
        )


def _wide(tensor: Tensor) -> Tensor:
    """``tensor``, in FP32 if it is in BF16 or FP16."""
    is_narrow = tensor.is_floating_point() and tensor.dtype.itemsize < torch.float32.itemsize
    return tensor.float() if is_narrow else tensor
