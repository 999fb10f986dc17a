"""The op by its name, with inputs for it."""

import torch

op = torch.ops.lmhead_pass.linear_cross_entropy
op_and_measures = torch.ops.lmhead_pass.linear_cross_entropy_and_measures
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
VIEWS = {
    "words": lambda matrix: torch.cat((matrix, matrix))[: len(matrix)],
    "columns": lambda matrix: torch.cat((matrix, matrix / 0), 1)[:, : matrix.size(1)],
    "transposed": lambda matrix: matrix.t().contiguous().t(),
}


def tensors(dtype=torch.float32, tokens=37, hidden=16, vocab=101, bias=False, ignored=True):
    """Leaves hidden, weight and bias, and targets of which some are ignored."""
    target = torch.randint(vocab, (tokens,))
    if ignored:
        target[::5] = -100
    leaves = [torch.randn(shape).to(dtype) for shape in ((tokens, hidden), (vocab, hidden), vocab)]
    hidden, weight, bias_ = (leaf.requires_grad_() for leaf in leaves)
    return hidden, weight, bias_ if bias else None, target


def call(
    hidden,
    weight,
    bias,
    target,
    class_weight=None,
    coefficient=None,
    logsumexp_coefficient=None,
    z_loss=None,
    fill=None,
    *,
    reduction="mean",
    ignore_index=-100,
    label_smoothing=0.0,
    rows=10,
    logit_scale=1.0,
    softcap=None,
    softcap_kind="tanh",
    measures=None,
    words=None,
):
    arguments = (
        *(hidden, weight, bias, target, class_weight, coefficient, logsumexp_coefficient, z_loss),
        *(fill, reduction, ignore_index, label_smoothing, logit_scale, softcap, softcap_kind),
        *(hidden.dtype, rows),
    )
    given = {} if words is None else {"vocab_chunk_size": words}
    if measures is None:
        return op(*arguments, **given)
    return op_and_measures(*arguments, measures, **given)
