"""Rows of given logits: launches the kernels of csrc/cpu/rows.inl."""

from __future__ import annotations

import contextlib
import mmap
from typing import Any

import torch

from grade_kernels.backends import Sample
from grade_kernels.backends.native import ESTIMATOR, contiguous, unit_stride

_FRESH_MEMORY = 2**21  # bytes from which a mapping of its own pays


def _kernels() -> Any:
    return torch.ops.grade_kernels_cpu


def sample(
    logits: torch.Tensor, seed: torch.Tensor, row_ids: torch.Tensor | None, vocab_start: int, logsumexp: bool
) -> Sample:
    """See `grade_kernels.backends`."""
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = logits.shape[0]
    ids, score_max = logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=compute)
    logit_max, logit_sum = (logits.new_empty(rows if logsumexp else 0, dtype=compute) for _ in range(2))
    _kernels().sample(
        unit_stride(logits), seed, contiguous(row_ids), vocab_start, logsumexp, ids, score_max, logit_max, logit_sum
    )
    return Sample(ids, score_max, logit_max, logit_sum)


def one_hot(sample: Sample, vocab_size: int, dtype: torch.dtype) -> torch.Tensor:
    """See `grade_kernels.backends`.

    A large one stands on fresh anonymous memory, which the system hands out as zeros and backs with real pages only
    where it is written: once a row. Filling it would take longer than sampling, and most of that in page faults.
    """
    rows = sample.ids.shape[0]
    size = rows * vocab_size * dtype.itemsize
    if size < _FRESH_MEMORY:
        out = sample.ids.new_zeros(rows, vocab_size, dtype=dtype)
    else:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # by default a fork would share it
        with contextlib.suppress(AttributeError, OSError):
            memory.madvise(mmap.MADV_NOHUGEPAGE)  # each would be cleared for the one number in it
        out = torch.frombuffer(memory, dtype=dtype).view(rows, vocab_size)
    out[torch.arange(rows, device=out.device), sample.ids] = 1.0  # in 16 bits scatter_ would pass over all of it
    return out


def softmax(
    logits: torch.Tensor,
    tau: torch.Tensor,
    seed: torch.Tensor,
    row_ids: torch.Tensor | None,
    vocab_start: int,
    score_max: torch.Tensor,
    normalize: bool,
    out_dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `grade_kernels.backends`."""
    out = logits.new_empty(logits.shape, dtype=out_dtype) if out is None else out
    total = torch.empty_like(score_max)
    _kernels().softmax(
        unit_stride(logits), tau.contiguous(), seed, contiguous(row_ids), vocab_start, score_max, normalize, out, total
    )
    return out, total


def softmax_backward(
    dy: torch.Tensor,
    logits: torch.Tensor,
    tau: torch.Tensor,
    seed: torch.Tensor,
    row_ids: torch.Tensor | None,
    vocab_start: int,
    estimator: str,
    sample: Sample,
    dlogprobs: torch.Tensor | None,
    needs_dtau: bool,
    out: torch.Tensor,
) -> torch.Tensor:
    """See `grade_kernels.backends`."""
    dtau = tau.new_zeros(logits.shape[0])
    _kernels().softmax_backward(
        unit_stride(dy),
        unit_stride(logits),
        tau.contiguous(),
        seed,
        contiguous(row_ids),
        vocab_start,
        ESTIMATOR[estimator],
        *sample,
        contiguous(dlogprobs),
        out,
        dtau if needs_dtau else None,
    )
    return dtau
