"""Rows of any layout as the `[N, V]` that most kernels take: `[A, V, B]`, whose row `a * B + b` is `x[a, :, b]`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["contiguous_view", "copy_flat", "flat", "written_flat"]


def flat(x: torch.Tensor) -> torch.Tensor:
    """`[N, V]` of `[A, V, B]`; a copy where no view exists."""
    a, vocab, b = x.shape
    return x.squeeze(2) if b == 1 else x.movedim(1, 2).reshape(a * b, vocab)


def contiguous_view(x: torch.Tensor) -> torch.Tensor | None:
    """`[N, V]` of `[A, V, B]` in the same memory and contiguous, where it is that."""
    return x.squeeze(2) if x.shape[2] == 1 and x.is_contiguous() else None


def copy_flat(rows: torch.Tensor, out: torch.Tensor) -> None:
    """Copy `[N, V]` to `[A, V, B]`."""
    a, vocab, b = out.shape
    out.copy_(rows.view(a, b, vocab).movedim(2, 1))


@contextmanager
def written_flat(out: torch.Tensor) -> Iterator[torch.Tensor]:
    """Contiguous memory `[N, V]`; what is written there lies in `out` `[A, V, B]` when the context ends."""
    place = contiguous_view(out)
    if place is not None:
        yield place
        return
    a, vocab, b = out.shape
    rows = torch.empty(a * b, vocab, dtype=out.dtype, device=out.device)
    yield rows
    copy_flat(rows, out)
