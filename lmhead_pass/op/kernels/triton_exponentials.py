"""The exponentials of a chunk's logits, out of a Triton product: see ``triton_loop.py``.

``triton_products.py`` says what that product leaves; ``triton_exponential_kernels.py`` makes losses
of it, and of the exponentials gradients in place. For losses alone no exponentials are held.
"""

import torch
from torch import Tensor

from ..problem import Problem, padded_width
from .device_rows import DeviceRows
from .triton_exponential_kernels import exponential_gradients, exponential_losses
from .triton_products import TILE_WORDS, exponentials, target_logits


class ExponentialRows:
    """What is held of one chunk after another."""

    def __init__(self, problem: Problem, rows: DeviceRows, size: int, gradients: bool) -> None:
        """``size`` is the number of rows of the largest chunk. ``gradients``: not losses alone."""
        self._problem, self._rows = problem, rows
        vocab = problem.weight.size(0)
        self._tiles = -(-vocab // TILE_WORDS)
        self._buffer = None
        if gradients:
            width = padded_width(vocab, problem.compute_dtype)
            self._buffer = problem.hidden.new_empty((size, width), dtype=problem.compute_dtype)
        self._bias = None if problem.bias is None else problem.bias.contiguous()
        self._fill = None if problem.fill is None else problem.fill.contiguous()

    def multiply(self, chunk: slice, hidden: Tensor) -> None:
        """Go on to the rows ``chunk``."""
        rows, new = len(hidden), self._problem.hidden.new_empty
        self._largest, self._total = new((2, self._tiles, rows), dtype=torch.float32)
        self._target_logit = new(rows, dtype=torch.float32)
        self._gradient = None if self._buffer is None else self._buffer[:rows]
        self._of_rows = (
            self._rows.word[chunk], self._rows.ignored[chunk], self._rows.target_coef[chunk]
        )  # fmt: skip
        given = (hidden, self._problem.compute_weight, self._of_rows[0], self._bias, self._fill)
        scale = self._problem.logit_scale
        target_logits(*given, scale, self._target_logit)
        out = None if self._gradient is None else self._gradient.view(torch.float16)
        exponentials(*given, scale, self._largest, self._total, out)

    def losses(self, loss: Tensor, row_max: Tensor, log_sum: Tensor, every_row: bool) -> None:
        """Write each row's loss and the two numbers of its log-sum-exp, in any case."""
        exponential_losses(
            self._largest, self._total, self._target_logit, *self._of_rows, loss, row_max, log_sum
        )

    def losses_and_gradients(self, loss: Tensor, upstream: Tensor) -> Tensor:
        """Write each row's loss; the gradients of the logits."""
        row_max, log_sum = torch.empty_like(loss), torch.empty_like(loss)
        self.losses(loss, row_max, log_sum, every_row=False)
        return self.gradients(upstream, row_max, log_sum, None)

    def gradients(
        self, upstream: Tensor, row_max: Tensor, log_sum: Tensor, grad_logsumexp: Tensor | None
    ) -> Tensor:
        """The gradients of the logits, of rows whose two numbers are known.

        ``[rows, >= V]``: what is behind the words is undefined.
        """
        assert self._gradient is not None
        exponential_gradients(
            self._gradient.view(torch.float16), self._gradient, self._largest, self._target_logit,
            *self._of_rows, row_max, log_sum, self._fill, self._problem.logit_scale, upstream,
            grad_logsumexp,
        )  # fmt: skip
        return self._gradient
