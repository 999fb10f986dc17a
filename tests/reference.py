"""The oracle: plain PyTorch in FP64, and errors measured against it."""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    softcap_kind: str = "tanh",
    fill: Tensor | None = None,
) -> Tensor:
    """Logits as the loss sees them: FP32, or FP64, after the product."""
    product = F.linear(hidden, weight, bias)
    scaled = product.to(torch.promote_types(product.dtype, torch.float32)) * logit_scale
    if softcap_kind == "algebraic":
        capped = softcap * scaled / (scaled.square() + softcap**2).sqrt()
    else:
        capped = scaled if softcap is None else softcap * torch.tanh(scaled / softcap)
    return capped if fill is None else torch.where(fill.isnan(), capped, fill.to(capped.dtype))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None = None,
    coefficient: Tensor | None = None,
    logsumexp_coefficient: Tensor | None = None,
    z_loss: Tensor | None = None,
    fill: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    softcap_kind: str = "tanh",
    reduction: str = "mean",
    **options,
) -> Tensor:
    """What the op has to compute, as its documentation defines it."""
    z = logits(hidden, weight, bias, logit_scale, softcap, softcap_kind, fill)
    if class_weight is not None:
        class_weight = class_weight.to(z.dtype)
    if coefficient is None:
        loss = F.cross_entropy(z, target, class_weight, reduction=reduction, **options)
    else:
        losses = F.cross_entropy(z, target, class_weight, reduction="none", **options)
        loss = (losses * coefficient.to(z.dtype)).sum()
    for factor, power in ((logsumexp_coefficient, 1), (z_loss, 2)):
        if factor is not None:
            loss = loss + (factor.to(z.dtype) * z.logsumexp(1) ** power).sum()
    return loss


def measures(z: Tensor) -> dict[str, Tensor]:
    """All measures of logits ``z``, in the dtype of ``z``."""
    return {
        "logsumexp": z.logsumexp(-1),
        "argmax": z.argmax(-1),
        "max": z.amax(-1),
        "entropy": torch.special.entr(z.softmax(-1)).sum(-1),
        "logits": z,
    }


def leaf(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """A copy that gathers a gradient of its own."""
    if tensor is None:
        return None
    copy = tensor.detach().clone().to(dtype or tensor.dtype)
    return copy.requires_grad_(tensor.requires_grad and copy.is_floating_point())


def doubles(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Copies in FP64 that gather gradients of their own; targets stay what they are."""
    return [
        leaf(t, torch.float64 if t is not None and t.is_floating_point() else None) for t in tensors
    ]


def run(
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    upstream: Tensor | None = None,
) -> list[Tensor]:
    """``function(*tensors)`` and the gradients of those tensors that require one."""
    result = function(*tensors)
    if result.requires_grad:
        result.backward(None if upstream is None else upstream.to(result.dtype))
    return [result.detach()] + [t.grad for t in tensors if t is not None and t.requires_grad]


def errors(results: Iterable[Tensor], exact: Iterable[Tensor]) -> list[float]:
    """For each result its largest error, relative to the largest exact value."""
    return [
        ((a.double() - b).abs().amax() / b.abs().amax().clamp_min(1e-300)).item()
        for a, b in zip(results, exact, strict=True)
    ]


def assert_no_worse(
    results: Sequence[Tensor],
    unfused: Sequence[Tensor],
    exact: Sequence[Tensor],
    dtype: torch.dtype,
    roundings: float = 1,
) -> None:
    """Errors against FP64 are those of the unfused model, but for rounding.

    That is one rounding to ``dtype``, and a few to the dtype of sums, which are taken in another
    order. Of FP64 the exact values have as many themselves.
    """
    sums = torch.promote_types(dtype, torch.float32)
    of_sums = (8 if dtype == torch.float64 else 4) * torch.finfo(sums).eps
    rounding = roundings * torch.finfo(dtype).eps + of_sums
    for ours, theirs in zip(errors(results, exact), errors(unfused, exact), strict=True):
        assert ours <= theirs + rounding, f"error {ours:.2e}, unfused {theirs:.2e}"
