"""Sampling again and again through one head: a copy in eight bits rules out nearly all tokens, see csrc/cpu/screen.h."""

from __future__ import annotations

import torch

from grade_kernels.backends.native import contiguous, cpu_kernels, unit_stride
from grade_kernels.backends.records import Head, Noise

# kScreenRows of csrc/cpu/screen.h: with more rows, a step's arithmetic takes longer than reading the head.
MOST_ROWS = 8
_LANES, _ROWS_FOR_COLUMNS = 16, 1024


class Screen:
    """A head's weight in eight bits with the error of each row, a quarter of float32's bytes.

    Args:
        head: in float32, bfloat16 or float16; its weight must not change while this is in use. Its hidden rows are not
            read.
    """

    def __init__(self, head: Head) -> None:
        vocab, width = head.weight.shape
        self._head = head._replace(weight=unit_stride(head.weight))
        # In trained heads a few columns are much larger than the others. Codes with one scale for all columns would be
        # coarse for the others. So each column is divided by its root mean square, estimated on about a thousand rows.
        # Any positive factor gives the right ids; a good one makes the error smaller.
        some = head.weight[:: -(-vocab // _ROWS_FOR_COLUMNS)].float()
        size = torch.nan_to_num(some.square().mean(dim=0).sqrt(), posinf=0.0)
        self._columns = torch.where(size > 0, size, 1.0)
        padded = -(-width // _LANES) * _LANES
        inverse = size.new_zeros(padded)
        inverse[:width] = 1.0 / self._columns
        self._codes = size.new_empty(vocab, padded, dtype=torch.int8)
        self._scale, self._slack = size.new_empty(vocab), size.new_empty(vocab)
        cpu_kernels().screen_encode(self._head.weight, inverse, self._codes, self._scale, self._slack)
        self.usable = bool(self._slack.isfinite().all())

    def sample(self, hidden: torch.Tensor, noise: Noise) -> torch.Tensor | None:
        """Ids `[N]` of `head_sample`, up to the rounding of a product; None where the caller must ask `head_sample`.

        That is the answer for hidden rows `[N, H]` of another dtype or width than the weight's. It is also the answer from
        the first call on in which a row has no distribution, or in which eight bits do not rule out enough tokens.
        """
        head = self._head
        if not self.usable or hidden.dtype != head.weight.dtype or hidden.shape[1] != head.weight.shape[1]:
            return None
        rows, width = hidden.shape
        x = self._scale.new_zeros(rows, self._codes.shape[1])
        x[:, :width] = hidden.float() * self._columns
        ids = x.new_empty(rows, dtype=torch.int64)
        looked_at = cpu_kernels().screen_sample(
            unit_stride(hidden), head.weight, x, torch.linalg.vector_norm(x, dim=1), self._codes, self._scale,
            self._slack, head.bias, head.softcap or 0.0, noise.seed, contiguous(noise.row_ids), noise.vocab_start, ids,
        )  # fmt: skip
        self.usable = looked_at >= 0
        return ids if self.usable else None
