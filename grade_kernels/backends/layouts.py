"""Rows of any layout as the `[N, V]` that most kernels take: `[A, V, B]`, whose row `a * B + b` is `x[a, :, b]`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["flat", "written_flat"]


def flat(x: torch.Tensor) -> torch.Tensor:
    """`[N, V]` of `[A, V, B]`; a copy where no view exists."""
    a, vocab, b = x.shape
    return x.squeeze(2) if b == 1 else x.movedim(1, 2).reshape(a * b, vocab)


@contextmanager
def written_flat(out: torch.Tensor) -> Iterator[torch.Tensor]:
    """Contiguous memory `[N, V]`; what is written there lies in `out` `[A, V, B]` when the context ends."""
    a, vocab, b = out.shape
    if b == 1 and out.is_contiguous():
        yield out.squeeze(2)
        return
    rows = torch.empty(a * b, vocab, dtype=out.dtype, device=out.device)
    yield rows
    out.copy_(rows.view(a, b, vocab).movedim(2, 1))
