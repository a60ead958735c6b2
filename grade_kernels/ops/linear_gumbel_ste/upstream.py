"""dY, the gradient of the relaxed sample: `sum_i de_i @ E_i.T`, never held as a whole."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from grade_kernels.backends import Backend
from grade_kernels.backends.chunks import Scratch

__all__ = ["DenseUpstream", "Upstream"]


class Upstream:
    """The gradients of embeddings, and dY at single places.

    Args:
        backend: whose products are taken.
        parts: the gradient `[N, D]` of each table's embeddings.
        tables: `[V, D]`.
        dtype: of dY.
    """

    def __init__(
        self, backend: Backend, parts: Sequence[torch.Tensor], tables: Sequence[torch.Tensor], dtype: torch.dtype
    ) -> None:
        self.backend, self.parts, self.tables, self.dtype = backend, parts, tables, dtype

    def scaled(self, factor: float) -> Upstream:
        """The same times a number."""
        return Upstream(self.backend, [part * factor for part in self.parts], self.tables, self.dtype)

    def at(self, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """dY `[K]` of these rows at these tokens."""
        total = torch.zeros(len(tokens), dtype=self.dtype, device=tokens.device)
        for part, table in zip(self.parts, self.tables, strict=True):
            if total.dtype == torch.float64:  # tables may be narrower
                part = part.double()
            total += self.backend.gather_dot(part, table, rows, tokens)
        return total


class DenseUpstream:
    """dY of some rows, for one chunk of the vocabulary after another.

    Args:
        upstream: of all rows.
        rows: which.
        rounded: a dtype of 16 bits. If the backend has no product of 16-bit operands with a float32 result, dY is rounded
            to this dtype, as PyTorch's product does. To keep float32 would take up to ten times as long.
    """

    def __init__(self, upstream: Upstream, rows: torch.Tensor, rounded: torch.dtype) -> None:
        self.backend, self.tables, self.rounded = upstream.backend, upstream.tables, rounded
        self.parts = [part[rows] for part in upstream.parts]
        self._scratches = [Scratch(len(rows), upstream.dtype, rows.device) for _ in upstream.tables]

    def chunk(self, columns: slice) -> torch.Tensor:
        """dY `[rows, columns]`, until the next chunk's is asked for; it may be overwritten."""
        found = []
        for part, table, scratch in zip(self.parts, self.tables, self._scratches, strict=True):
            found.append(scratch(columns.stop - columns.start))
            if part.dtype == self.rounded and not self.backend.exact_weights(part.dtype):
                found[-1].copy_(self.backend.product(part, table[columns]))
            else:
                self.backend.product(part, table[columns], found[-1])
        return functools.reduce(torch.Tensor.add_, found)
