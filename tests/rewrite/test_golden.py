"""The graph before and after, for a consumer to see."""

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline

import lmhead_pass

from ..backend import rewrite
from ..forms import V, inputs


def graphs(function, dynamic=False):
    """The code of the one graph of ``function``, before and after."""
    codes = []
    hidden, weight, _, target = inputs()
    with lmhead_pass.config.patch(batch_chunk_size=512):
        rewrite(function, codes, dynamic=dynamic)(hidden, weight, target)
    before, after = (code.strip().replace("torch.nn.functional", "F") for code in codes)
    return "\n".join(("before:", *_lines(before), "after:", *_lines(after)))


def _lines(code):
    """The statements, without type annotations and the deletions that FX adds."""
    for line in code.splitlines():
        statement = line.split(";  ")[0].strip()
        if statement and not statement.startswith("def "):
            yield "    " + statement


def test_flat_logits():
    def function(h, w, y):
        return F.cross_entropy(F.linear(h, w).float().view(-1, V), y.view(-1))

    assert_expected_inline(
        graphs(function),
        """\
before:
    l_h_ = L_h_
    l_w_ = L_w_
    l_y_ = L_y_
    linear = torch._C._nn.linear(l_h_, l_w_)
    float_1 = linear.float()
    view = float_1.view(-1, 97)
    view_1 = l_y_.view(-1)
    cross_entropy = F.cross_entropy(view, view_1)
    return (cross_entropy,)
after:
    l_h_ = L_h_
    l_w_ = L_w_
    l_y_ = L_y_
    view_1 = l_y_.view(-1)
    flatten = l_h_.flatten(0, -2)
    linear_cross_entropy_default = torch.ops.lmhead_pass.linear_cross_entropy.default(flatten, l_w_, None, view_1, None, None, None, None, None, 'mean', -100, 0.0, 1.0, None, 'tanh', torch.float32, 512)
    return (linear_cross_entropy_default,)""",
    )


def test_shifted_logits_with_dynamic_sizes():
    def function(h, w, y):
        logits = F.linear(h, w)
        return F.cross_entropy(
            logits[..., :-1, :].contiguous().view(-1, V), y[..., 1:].contiguous().view(-1)
        )

    assert_expected_inline(
        graphs(function, dynamic=True),
        """\
before:
    l_h_ = L_h_
    l_w_ = L_w_
    l_y_ = L_y_
    logits = torch._C._nn.linear(l_h_, l_w_)
    getitem = logits[(Ellipsis, slice(None, -1, None), slice(None, None, None))]
    contiguous = getitem.contiguous()
    view = contiguous.view(-1, 97)
    getitem_1 = l_y_[(Ellipsis, slice(1, None, None))]
    contiguous_1 = getitem_1.contiguous()
    view_1 = contiguous_1.view(-1)
    cross_entropy = F.cross_entropy(view, view_1)
    return (cross_entropy,)
after:
    l_h_ = L_h_
    l_w_ = L_w_
    l_y_ = L_y_
    getitem_1 = l_y_[(Ellipsis, slice(1, None, None))]
    contiguous_1 = getitem_1.contiguous()
    view_1 = contiguous_1.view(-1)
    getitem_2 = l_h_[(slice(None, None, None), slice(None, -1, None))]
    flatten = getitem_2.flatten(0, -2)
    linear_cross_entropy_default = torch.ops.lmhead_pass.linear_cross_entropy.default(flatten, l_w_, None, view_1, None, None, None, None, None, 'mean', -100, 0.0, 1.0, None, 'tanh', torch.float32, 512)
    return (linear_cross_entropy_default,)""",
    )


def test_classes_second_without_reduction():
    def function(h, w, y):
        return F.cross_entropy((h @ w.t()).permute(0, 2, 1), y, reduction="none")

    assert_expected_inline(
        graphs(function),
        """\
before:
    l_w_ = L_w_
    l_h_ = L_h_
    l_y_ = L_y_
    t = l_w_.t()
    matmul = l_h_ @ t
    permute = matmul.permute(0, 2, 1)
    cross_entropy = F.cross_entropy(permute, l_y_, reduction = 'none')
    return (cross_entropy,)
after:
    l_w_ = L_w_
    l_h_ = L_h_
    l_y_ = L_y_
    t = l_w_.t()
    flatten = l_h_.flatten(0, -2)
    reshape = l_y_.reshape(-1)
    t_1 = t.t()
    linear_cross_entropy_default = torch.ops.lmhead_pass.linear_cross_entropy.default(flatten, t_1, None, reshape, None, None, None, None, None, 'none', -100, 0.0, 1.0, None, 'tanh', torch.float32, 512)
    view_as = linear_cross_entropy_default.view_as(l_y_)
    return (view_as,)""",
    )


def test_log_softmax_under_no_grad():
    def function(h, w, y):
        with torch.no_grad():
            log_probabilities = F.log_softmax(F.linear(h, w), dim=-1)
            return F.nll_loss(log_probabilities.flatten(0, 1), y.flatten(), reduction="sum")

    assert_expected_inline(
        graphs(function),
        """\
before:
    l_h_ = L_h_
    l_w_ = L_w_
    l_y_ = L_y_
    _set_grad_enabled = torch._C._set_grad_enabled(False)
    linear = torch._C._nn.linear(l_h_, l_w_)
    log_probabilities = F.log_softmax(linear, dim = -1)
    flatten = log_probabilities.flatten(0, 1)
    flatten_1 = l_y_.flatten()
    nll_loss = F.nll_loss(flatten, flatten_1, reduction = 'sum')
    _set_grad_enabled_1 = torch._C._set_grad_enabled(True)
    return (nll_loss,)
after:
    l_h_ = L_h_
    l_w_ = L_w_
    l_y_ = L_y_
    _set_grad_enabled = torch._C._set_grad_enabled(False)
    flatten_1 = l_y_.flatten()
    flatten_2 = l_h_.flatten(0, -2)
    detach = flatten_2.detach()
    detach_1 = l_w_.detach()
    linear_cross_entropy_default = torch.ops.lmhead_pass.linear_cross_entropy.default(detach, detach_1, None, flatten_1, None, None, None, None, None, 'sum', -100, 0.0, 1.0, None, 'tanh', torch.float32, 512)
    _set_grad_enabled_1 = torch._C._set_grad_enabled(True)
    return (linear_cross_entropy_default,)""",
    )
