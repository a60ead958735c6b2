"""Sampling again and again through one head: a copy in eight bits rules out nearly all tokens, see csrc/cpu/screen.h."""

from __future__ import annotations

from typing import Any

import torch

from grade_kernels.backends import Head
from grade_kernels.backends.native import contiguous, unit_stride

MOST_ROWS = 8  # kScreenRows of csrc/cpu/screen.h: with more, reading the head is no longer what takes the time
_LANES, _ROWS_FOR_COLUMNS = 16, 1024


def _kernels() -> Any:
    return torch.ops.grade_kernels_cpu


class Screen:
    """A head's weight in eight bits with the error of each row, a quarter of float32's bytes.

    Args:
        weight: `[V, H]`, float32, bfloat16 or float16; it must not change while this is in use.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        vocab, width = weight.shape
        self._weight = unit_stride(weight)
        # Columns that are larger throughout, as trained heads have, would make the codes of all others coarse. Some rows
        # tell which; any factors are right.
        some = weight[:: -(-vocab // _ROWS_FOR_COLUMNS)].float()
        size = torch.nan_to_num(some.square().mean(dim=0).sqrt(), posinf=0.0)
        self._columns = torch.where(size > 0, size, 1.0)
        padded = -(-width // _LANES) * _LANES
        inverse = size.new_zeros(padded)
        inverse[:width] = 1.0 / self._columns
        self._codes = size.new_empty(vocab, padded, dtype=torch.int8)
        self._scale, self._slack = size.new_empty(vocab), size.new_empty(vocab)
        _kernels().screen_encode(self._weight, inverse, self._codes, self._scale, self._slack)
        self.usable = bool(self._slack.isfinite().all())

    def sample(
        self, head: Head, seed: torch.Tensor, row_ids: torch.Tensor | None, vocab_start: int
    ) -> torch.Tensor | None:
        """Ids `[N]` of `head_sample`, up to the rounding of a product; None where that has to be asked.

        So it is if a row has no distribution, or if too many tokens stay in question.
        """
        rows, width = head.hidden.shape
        x = self._scale.new_zeros(rows, self._codes.shape[1])
        x[:, :width] = head.hidden.float() * self._columns
        ids = x.new_empty(rows, dtype=torch.int64)
        looked_at = _kernels().screen_sample(
            unit_stride(head.hidden), self._weight, x, torch.linalg.vector_norm(x, dim=1), self._codes, self._scale,
            self._slack, head.bias, head.softcap or 0.0, seed, contiguous(row_ids), vocab_start, ids,
        )  # fmt: skip
        return None if looked_at < 0 else ids
