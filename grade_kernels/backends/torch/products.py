"""Products of matrices in 16 bits, by PyTorch's kernels for them where the machine has such, else in float32."""

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
    """Whether PyTorch has kernels for products of x's dtype here; else they take up to 100 times as long as in float32."""
    return x.device.type != "cpu" or x.dtype.itemsize != 2 or _onednn_has(x.dtype)


def product(x: torch.Tensor, table: torch.Tensor, out: torch.Tensor | None, elements: int) -> torch.Tensor:
    """`Backend.product`: PyTorch's own, or one of chunks of the table, of which the result has `elements` at most."""
    if out is None:
        if has_kernels(x):
            return x @ table.T
        out, x = x.new_empty(len(x), len(table)), x.float()
    # A result in float32 of operands in 16 bits must not be rounded to 16 bits in between.
    dtype = torch.promote_types(x.dtype, out.dtype)
    x, width = x.to(dtype), 0 if dtype == x.dtype else x.shape[1]
    for columns in column_chunks(max(len(x), width), len(table), elements):
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
