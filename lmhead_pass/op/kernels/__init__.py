"""Implementations of the op: ``dispatch`` chooses between ``aten_loop`` and ``triton_loop``.

Both use ``row_terms`` (coefficients of the losses, sums of the gradients) and ``measures``;
``triton_loop`` uses ``triton_row_kernels`` and ``wide_products`` too.
"""
