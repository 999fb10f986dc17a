"""What a tensor can be asked for that does not depend on its values."""

import torch
from torch import Tensor

METADATA = {
    *(
        getattr(Tensor, name).__get__
        for name in (
            *("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes"),
            *("requires_grad", "grad_fn", "grad", "is_leaf", "retains_grad", "_version", "_base"),
            *("is_cpu", "is_cuda", "is_xpu", "is_mps", "is_meta", "output_nr"),
            *("is_sparse", "is_sparse_csr", "is_quantized", "is_nested", "is_mkldnn"),
        )
        if hasattr(Tensor, name)
    ),
    *(getattr(Tensor, name).__set__ for name in ("requires_grad", "grad")),
    *(
        getattr(namespace, name)
        for namespace in (Tensor, torch)
        for name in (
            *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset"),
            *("is_contiguous", "element_size", "get_device", "is_inference", "_is_view"),
            *("is_floating_point", "is_complex", "is_signed", "is_conj", "is_neg"),
            *("requires_grad_", "detach_", "retain_grad", "register_hook"),
            "register_post_accumulate_grad_hook",
        )
        if hasattr(namespace, name)
    ),
    *(Tensor.__len__, Tensor.__hash__, Tensor.__dir__),
}
