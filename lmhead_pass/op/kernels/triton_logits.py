"""The FP32 logits of a chunk of rows, out of the library's product: see ``triton_loop.py``.

One kernel reads each row once for its loss, and a second time for its gradient, which it writes in
the compute dtype to the front of the row's own memory. ``triton_row_kernels.py`` has the formulas.
"""

from torch import Tensor

from ..problem import Problem, padded_width
from .device_rows import DeviceRows
from .triton_row_kernels import Terms, row_gradients, row_losses
from .wide_products import multiply_into


class LogitRows:
    """What is held of one chunk after another."""

    def __init__(self, problem: Problem, rows: DeviceRows, size: int) -> None:
        """``size`` is the number of rows of the largest chunk."""
        self._problem, self._rows = problem, rows
        dtype, vocab = problem.accumulate_dtype, problem.weight.size(0)
        width = padded_width(vocab, dtype)
        self._buffer = problem.hidden.new_empty((size, width), dtype=dtype)
        self._terms = Terms(
            ignore_index=problem.ignore_index,
            bias=None if problem.bias is None else problem.bias.contiguous(),
            class_weight=rows.class_weight,
            fill=None if problem.fill is None else problem.fill.contiguous(),
            label_smoothing=problem.label_smoothing,
            logit_scale=None if problem.logit_scale == 1 else problem.logit_scale,
            softcap=problem.softcap,
            softcap_kind=problem.softcap_kind,
        )

    def multiply(self, chunk: slice, hidden: Tensor) -> None:
        """Go on to the rows ``chunk``: their logits are ``[rows, V]`` and without the bias yet."""
        self._target = self._rows.target[chunk]
        self.logits = self._buffer[: len(hidden), : self._problem.weight.size(0)]
        multiply_into(self.logits, hidden, self._problem.compute_weight.t())

    def losses(self, loss: Tensor, row_max: Tensor, log_sum: Tensor, every_row: bool) -> None:
        """Write each row's loss and the two numbers of its log-sum-exp."""
        row_losses(
            self.logits, self._target, self._terms, loss, row_max, log_sum, every_row=every_row
        )

    def losses_and_gradients(self, loss: Tensor, upstream: Tensor) -> Tensor:
        """Write each row's loss; the gradients of the logits."""
        gradient = self._gradient()
        row_gradients(self.logits, self._target, self._terms, gradient, upstream, loss=loss)
        return gradient

    def gradients(
        self, upstream: Tensor, row_max: Tensor, log_sum: Tensor, grad_logsumexp: Tensor | None
    ) -> Tensor:
        """The gradients of the logits, of rows whose two numbers are known."""
        gradient = self._gradient()
        row_gradients(
            self.logits, self._target, self._terms, gradient, upstream,
            saved=(row_max, log_sum), grad_logsumexp=grad_logsumexp,
        )  # fmt: skip
        return gradient

    def _gradient(self) -> Tensor:
        """``[rows, V]`` of the compute dtype at the front of the memory of each row of logits."""
        rows, vocab = self.logits.shape
        return self._buffer[:rows].view(self._problem.compute_dtype)[:, :vocab]
