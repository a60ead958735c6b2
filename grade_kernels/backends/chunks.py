"""A vocabulary taken a chunk at a time: sizes, slices, and memory that one chunk after another uses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

__all__ = ["Scratch", "Sizes", "column_chunks", "support_capacity"]


@dataclass(frozen=True)
class Sizes:
    """How much a backend holds at a time. Results depend on it no further than rounding.

    Attributes:
        chunk: logits (rows times tokens) that PyTorch operations look at together; noise takes about 50 bytes each.
        head_chunk: the same where a head makes them.
        gather: gathered elements that are held at once.
        product: elements of a product that PyTorch computes at a time where its result goes into a given tensor.
        tile_buffer: logits that exist at a time in the CPU kernels' passes through a head.
        support: entries that a row's support may take; None for `support_capacity` of eps and the vocabulary.
    """

    chunk: int = 2**20
    head_chunk: int = 2**20
    gather: int = 2**22
    product: int = 2**18
    tile_buffer: int = 2**20
    support: int | None = None


def column_chunks(rows: int, vocab: int, elements: int) -> Iterator[slice]:
    """Slices that cover the vocabulary in pieces of about `elements` elements of all rows."""
    width = max(256, elements // max(1, rows) // 64 * 64)
    for start in range(0, vocab, width):
        yield slice(start, min(start + width, vocab))


def support_capacity(eps: float, vocab: int) -> int:
    """Entries that a row's support may take: more than any distribution needs, yet far from the vocabulary. 0 for eps 0.

    The expected count is at most 1 / eps. If rows overflowed by chance, their gradient would be exact when many tokens are
    kept and sparse when few are, which is a bias. Room for ten standard deviations more makes that negligible. The CPU
    kernels give a row up when seven eighths of its room are taken, hence the factor.
    """
    return 0 if eps == 0 else int(min(vocab + 64, (1.0 / eps + 10.0 / eps**0.5) * 8 / 7 + 64))


class Scratch:
    """Memory that one chunk after another uses. With fresh memory for each, page faults would take longer than the work."""

    def __init__(self, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows, self.memory = rows, torch.empty(0, dtype=dtype, device=device)

    def __call__(self, width: int) -> torch.Tensor:
        """`[rows, width]`, uninitialised. It overwrites what the call before returned."""
        if self.rows * width > len(self.memory):
            self.memory = self.memory.new_empty(self.rows * width)
        return self.memory[: self.rows * width].view(self.rows, width)
