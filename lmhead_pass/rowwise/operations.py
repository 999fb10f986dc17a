"""Which ATen operations treat rows apart, and what they are on chunks of rows: one table.

Decided from what an operation does: it is elementwise, perhaps with broadcasts; it reduces, scans,
sorts or picks along a dimension that is no row; it only looks at its input in another shape. A sum
over rows ends what is done in chunks. All else mixes rows, as far as is known.
"""

from collections.abc import Callable
from typing import Any

import torch

from .alignment import aligned, broadcast, space_of
from .along_words import reduction, reduction_of_all, scan, scan_with_index
from .call import Call, Context, Mixes, New, Result, describe_call
from .losses import nll_loss, reduced_loss
from .new_values import cat, copy, fill, index_put, like, stack
from .shapes import (
    copied,
    expand,
    index_select,
    permute,
    pick,
    reshape,
    same_values,
    select,
    slice_of,
    split,
    unbind,
)


def rowwise(context: Context, call: Call) -> Result | list[Result]:
    """What ``call`` gives; Mixes if it may mix rows."""
    function = call.function
    if torch.Tag.nondeterministic_seeded in function.tags:
        raise Mixes(f"{describe_call(function)} draws random numbers")
    if function.namespace != "aten":
        raise Mixes(f"{function} is no operation of torch")
    handler = _TABLE.get(call.name) or _TABLE.get(call.name.split(".")[0])
    if handler is None and torch.Tag.pointwise in function.tags:
        handler = _pointwise
    if handler is None:
        raise Mixes(f"{describe_call(function)} is not known to treat rows apart")
    result: Result | list[Result] = handler(context, call)
    return result


def _pointwise(context: Context, call: Call) -> New:
    if not isinstance(call.out, torch.Tensor):
        raise Mixes(f"{describe_call(call.function)} is not known to treat rows apart")
    space, dims = space_of(context, call), broadcast(context, call, call.out.shape)

    def lying(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [lying(part) for part in value]
        if isinstance(value, torch.Tensor):
            return aligned(context, value, dims, call.out.shape, space)
        return value

    changed = {name: lying(value) for name, value in call.named.items()}
    return New(call.with_arguments(context.make, changed), dims, space)


def _names(handler: Any, *names: str) -> dict[str, Any]:
    return dict.fromkeys(names, handler)


_TABLE: dict[str, Callable[[Context, Call], Any]] = {
    # Elementwise, though torch does not say so.
    **_names(_pointwise, "_to_copy", "where", "masked_fill", "clamp", "nan_to_num", "xlogy"),
    **_names(_pointwise, "logical_and", "logical_or", "logical_not", "isnan", "isinf"),
    **_names(copied, "clone"),
    # Along a dimension that stays.
    **_names(scan, "_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp", "cummax"),
    **_names(scan, "cummin", "sort", "topk", "flip", "gather", "scatter", "scatter_add"),
    **_names(scan, "scatter_reduce", "glu"),
    **_names(scan_with_index, "index_fill", "index_add", "index_copy"),
    # Over a dimension that goes.
    **_names(reduction, "sum.dim_IntList", "mean.dim", "amax", "amin", "logsumexp", "prod.dim_int"),
    **_names(reduction, "any.dim", "any.dims", "all.dim", "all.dims", "argmax", "argmin"),
    **_names(reduction, "max.dim", "min.dim", "median.dim", "nanmedian.dim", "mode", "kthvalue"),
    **_names(reduction, "var.correction", "std.correction", "var_mean.correction"),
    **_names(reduction, "std_mean.correction", "linalg_vector_norm"),
    **_names(reduction, "count_nonzero"),
    **_names(reduction_of_all, "sum.default", "mean.default", "max.default", "min.default"),
    # Other shapes.
    **_names(same_values, "alias", "detach"),
    # Not view.dtype, which looks at bits.
    **_names(reshape, "view.default", "_unsafe_view", "unsqueeze", "squeeze"),
    **_names(permute, "permute", "transpose", "t"),
    **_names(expand, "expand"),
    **_names(slice_of, "slice"),
    **_names(select, "select"),
    **_names(split, "split", "split_with_sizes"),
    **_names(unbind, "unbind"),
    **_names(pick, "index"),
    **_names(index_select, "index_select"),
    # Other values.
    **_names(like, "zeros_like", "ones_like", "full_like", "empty_like"),
    **_names(like, "new_zeros", "new_ones", "new_full", "new_empty"),
    **_names(fill, "fill", "zero"),
    **_names(copy, "copy"),
    **_names(cat, "cat"),
    **_names(stack, "stack"),
    **_names(index_put, "index_put"),
    # Losses.
    **_names(reduced_loss, "mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy"),
    **_names(reduced_loss, "binary_cross_entropy_with_logits"),
    **_names(nll_loss, "nll_loss_forward", "nll_loss2d_forward"),
}
