"""The constants of a GPU's rows: nothing here waits for the device."""

import torch
from torch import Tensor

from ...compat.kernels import check_on_device
from ..problem import Problem
from .row_terms import RowTerms


class DeviceRows(RowTerms):
    """All rows of the problem, and their constants. What the ignored rows have is masked."""

    def __init__(self, problem: Problem) -> None:
        vocab, dtype = problem.weight.size(0), problem.accumulate_dtype
        self.target = problem.target.contiguous()
        """``[N]``."""
        self.ignored = self.target == problem.ignore_index
        """``[N]``."""
        in_range = (self.target >= 0) & (self.target < vocab)
        check_on_device((in_range | self.ignored).all(), "a target is out of bounds")
        self.word = self.target.where(in_range, -1).to(torch.int32)
        """``[N]``: the target, or -1 if that is no word."""

        class_weight, smoothing = problem.class_weight, problem.label_smoothing
        smoothing_coef_sum: Tensor | float = smoothing
        target_weight = (~self.ignored).to(dtype)
        if class_weight is not None:
            class_weight = class_weight.to(dtype).contiguous()
            target = self.target.masked_fill(~in_range, 0)
            target_weight = self.select(class_weight.index_select(0, target))
            smoothing_coef_sum = smoothing * class_weight.mean()
        super().__init__(problem, target_weight, smoothing_coef_sum)
        self.class_weight = class_weight
        """``[V]``, contiguous, in the accumulation dtype."""

    def select(self, values: Tensor) -> Tensor:
        return values.masked_fill(self.ignored, 0)
