"""Products of matrices, whose sums are kept in compute precision, by PyTorch's kernels where they do that or need not."""

from __future__ import annotations

import functools

import torch

from grade_kernels.backends.chunks import column_chunks
from grade_kernels.dtypes import compute_dtype

__all__ = ["has_kernels", "has_wide_product", "product", "weighted_sum"]


@functools.cache
def _onednn_has(dtype: torch.dtype) -> bool:
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    supported = getattr(torch.ops.mkldnn, name, None)  # a build without oneDNN has no such operation
    return supported is not None and bool(supported())


def has_kernels(x: torch.Tensor) -> bool:
    """Whether PyTorch has kernels for products of x's dtype here; else they take up to 100 times as long as in float32."""
    return x.device.type != "cpu" or x.dtype.itemsize != 2 or _onednn_has(x.dtype)


@functools.cache
def has_wide_product(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch.mm multiplies matrices of a 16-bit dtype into a result in float32 on a device.

    PyTorch documents neither for which devices nor from which version on. So it is tried, once.
    """
    x = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        torch.mm(x, x, out_dtype=torch.float32, out=torch.empty(16, 16, device=device))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # NotImplementedError is one
        return False
    return True


def product(x: torch.Tensor, table: torch.Tensor, out: torch.Tensor | None, elements: int) -> torch.Tensor:
    """`Backend.product`: PyTorch's own where it keeps the sums' precision, or one of `elements` of the widened table.

    If sums were rounded to 16 bits, each would be off by up to 2^-9 of itself. A log-sum-exp is convex, so that does not
    average out over tokens: mean entropies and log-probabilities would be biased.
    """
    if out is None:
        out = x.new_empty(len(x), len(table), dtype=compute_dtype(torch.promote_types(x.dtype, table.dtype)))
    if x.dtype == table.dtype == out.dtype:
        return torch.mm(x, table.T, out=out)
    wide = x.dtype == table.dtype and x.dtype.itemsize == 2 and out.dtype == torch.float32
    if wide and has_wide_product(x.dtype, x.device):
        return torch.mm(x, table.T, out_dtype=torch.float32, out=out)
    dtype = torch.promote_types(compute_dtype(x.dtype), out.dtype)
    x = x.to(dtype)
    for columns in column_chunks(max(len(x), table.shape[1]), len(table), elements):
        part = table[columns].to(dtype).T
        if out.dtype == dtype:
            torch.mm(x, part, out=out[:, columns])
        else:
            out[:, columns] = x @ part
    return out


def weighted_sum(values: torch.Tensor, table: torch.Tensor, elements: int) -> torch.Tensor:
    """`Backend.weighted_sum`; where there are no kernels, it widens `elements` of the table at a time."""
    dtype = compute_dtype(values.dtype)
    if not has_kernels(table):
        values, out = values.to(dtype), torch.zeros(len(values), table.shape[1], dtype=dtype)
        for rows in column_chunks(max(1, table.shape[1]), len(table), elements):
            out.addmm_(values[:, rows], table[rows].to(dtype))
        return out
    if table.dtype != torch.float16:
        return (values.to(table.dtype) @ table).to(dtype)
    values = values.to(dtype)
    # A sum of thousands of rows may exceed float16's largest number. So weights that sum to more than 1024 are scaled down
    # before the product, and its result up.
    shrink = (values.abs().sum(dim=1, keepdim=True) / 2**10).clamp_min_(1.0)
    return ((values / shrink).half() @ table) * shrink
