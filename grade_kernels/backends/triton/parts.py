"""Rows that are read twice, a part at a time: the second time comes from the cache that the first time has filled."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from grade_kernels.backends.records import GradientRule, Rows, Sample

__all__ = ["Part", "parts"]


class Part(NamedTuple):
    """Some neighbouring rows."""

    rows: slice
    dim: int  # of the tensors [A, V, B] that they are cut along
    planes: slice  # of that dimension

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of `[A, V, B]`."""
        return x.narrow(self.dim, self.planes.start, self.planes.stop - self.planes.start)

    def numbers(self, x: torch.Tensor) -> torch.Tensor:
        """Those of `[N]`, or of nothing."""
        return x[self.rows] if len(x) else x

    def given(self, rows: Rows) -> Rows:
        """The rows of a record of rows."""
        if self.rows == slice(0, len(rows.tau)):
            return rows
        ids = torch.arange(self.rows.start, self.rows.stop, device=rows.tau.device)
        return Rows(self.of(rows.logits), rows.tau[self.rows], rows.noise.rows(ids))

    def sampled(self, sample: Sample) -> Sample:
        """Their samples."""
        return Sample(*map(self.numbers, sample))

    def rule(self, rule: GradientRule) -> GradientRule:
        """Their rule."""
        return rule._replace(dlogprobs=None if rule.dlogprobs is None else self.numbers(rule.dlogprobs))


def parts(tensors: Sequence[torch.Tensor], most_bytes: int) -> Iterator[Part]:
    """Parts of tensors `[A, V, B]` whose elements are read twice, of so many bytes together."""
    a, vocab, b = tensors[0].shape
    if a * b == 0:
        return
    dim = 0 if a > 1 else 2
    planes, rows, size = (a, b, vocab * b) if dim == 0 else (b, 1, vocab)
    # A part's first element is as well aligned as the tensor's is.
    step = 16 // math.gcd(16, size if dim == 0 else 1)
    step *= max(1, most_bytes // (sum(x.element_size() for x in tensors) * size * step))
    for start in range(0, planes, step):
        stop = min(start + step, planes)
        yield Part(slice(start * rows, stop * rows), dim, slice(start, stop))
