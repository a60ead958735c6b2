"""Products of matrices whose result is kept in float32 whatever the factors' dtype."""

from __future__ import annotations

import functools

import torch

from grade_kernels.backends.chunks import column_chunks

__all__ = ["float32_product", "has_wide_product"]


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


def float32_product(x: torch.Tensor, table: torch.Tensor, out: torch.Tensor, elements: int) -> torch.Tensor:
    """Write `x @ table.T` `[N, C]` to `out`, in float32 and with unit stride along columns, and return it.

    Sums in 16 bits would each be off by up to 2^-9 of themselves. A log-sum-exp is convex, so that does not average out over
    tokens: entropies and log-probabilities would be biased. Where no library multiplies 16 bits into float32, `elements` of
    the table are widened at a time.
    """
    if x.dtype == table.dtype == torch.float32:
        return torch.mm(x, table.T, out=out)
    if x.dtype == table.dtype and has_wide_product(x.dtype, x.device):
        return torch.mm(x, table.T, out_dtype=torch.float32, out=out)
    x = x.float()
    for columns in column_chunks(table.shape[1], len(table), elements):
        torch.mm(x, table[columns].float().T, out=out[:, columns])
    return out
