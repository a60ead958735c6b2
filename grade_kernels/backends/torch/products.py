"""Products of narrow matrices on machines that have kernels for them, and on those that have none."""

from __future__ import annotations

import functools

import torch

from grade_kernels.backends.chunks import column_chunks
from grade_kernels.dtypes import compute_dtype

__all__ = ["has_kernels", "product", "weighted_sum"]


@functools.cache
def _onednn_has(dtype: torch.dtype) -> bool:
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    supported = getattr(torch.ops.mkldnn, name, None)  # a build without oneDNN has no such operation
    return supported is not None and bool(supported())


def has_kernels(x: torch.Tensor) -> bool:
    """Whether PyTorch has kernels for products of x's dtype here. Without, they take up to 100 times as long as float32."""
    return x.device.type != "cpu" or x.dtype.itemsize != 2 or _onednn_has(x.dtype)


def product(x: torch.Tensor, table: torch.Tensor, out: torch.Tensor | None, elements: int) -> torch.Tensor:
    """`Backend.product`, of which `elements` are taken at a time where it is not PyTorch's own."""
    if out is None:
        if has_kernels(x):
            return x @ table.T
        out, x = x.new_empty(len(x), len(table)), x.float()
    dtype = torch.promote_types(x.dtype, out.dtype)  # what is kept in more bits is not rounded to fewer on its way
    x, width = x.to(dtype), 0 if dtype == x.dtype else x.shape[1]
    for columns in column_chunks(max(len(x), width), len(table), elements):
        part = table[columns].to(dtype).T
        if out.dtype == dtype:
            torch.mm(x, part, out=out[:, columns])
        else:
            out[:, columns] = x @ part
    return out


def weighted_sum(values: torch.Tensor, table: torch.Tensor, elements: int) -> torch.Tensor:
    """`Backend.weighted_sum`, for which `elements` of the table are widened at a time where they have to be."""
    dtype = compute_dtype(values.dtype)
    if not has_kernels(table):
        values, out = values.to(dtype), torch.zeros(len(values), table.shape[1], dtype=dtype)
        for rows in column_chunks(max(1, table.shape[1]), len(table), elements):
            out.addmm_(values[:, rows], table[rows].to(dtype))
        return out
    if table.dtype != torch.float16:
        return (values.to(table.dtype) @ table).to(dtype)
    values = values.to(dtype)
    # Thousands of rows of a table may add up to more than float16 holds, though their mean never does.
    shrink = (values.abs().sum(dim=1, keepdim=True) / 2**10).clamp_min_(1.0)
    return ((values / shrink).half() @ table) * shrink
