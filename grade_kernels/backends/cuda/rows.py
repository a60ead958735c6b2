"""Rows of given logits: launches the kernels of csrc/cuda."""

from __future__ import annotations

from typing import Any

import torch

from grade_kernels.backends import Sample
from grade_kernels.backends.native import ESTIMATOR, contiguous, unit_stride
from grade_kernels.backends.torch import rows as fallback


def _kernels() -> Any:
    return torch.ops.grade_kernels_cuda


def _seed(seed: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """A launch takes a seed on the host by its value; any other must be on its own device."""
    return seed if seed.device.type == "cpu" else seed.to(logits.device)


def _partial(logits: torch.Tensor, vocab_start: int, *planes: int) -> torch.Tensor:
    """Room for partial results, `[*planes, N, pieces]`."""
    pieces = _kernels().pieces(logits.shape[1], vocab_start)
    return torch.empty(*planes, logits.shape[0], pieces, dtype=torch.float32, device=logits.device)


def sample(
    logits: torch.Tensor, seed: torch.Tensor, row_ids: torch.Tensor | None, vocab_start: int, logsumexp: bool
) -> Sample:
    """See `grade_kernels.backends`."""
    if logits.dtype == torch.float64:
        return fallback.sample(logits, seed, row_ids, vocab_start, logsumexp)
    rows, device = logits.shape[0], logits.device
    ids = torch.empty(rows, dtype=torch.int64, device=device)
    score_max = torch.empty(rows, dtype=torch.float32, device=device)
    logit_max, logit_sum = (torch.empty(rows if logsumexp else 0, dtype=torch.float32, device=device) for _ in range(2))
    found = Sample(ids, score_max, logit_max, logit_sum)
    best = _partial(logits, vocab_start)
    tile = torch.empty(best.shape, dtype=torch.int32, device=device)
    top, total = (torch.empty_like(best) if logsumexp else None for _ in range(2))
    _kernels().sample(
        unit_stride(logits), _seed(seed, logits), contiguous(row_ids), vocab_start, best, tile, top, total, *found
    )  # fmt: skip
    return found


def one_hot(sample: Sample, vocab_size: int, dtype: torch.dtype) -> torch.Tensor:
    """See `grade_kernels.backends`."""
    if dtype == torch.float64:
        return fallback.one_hot(sample, vocab_size, dtype)
    out = torch.empty(sample.ids.shape[0], vocab_size, dtype=dtype, device=sample.ids.device)
    _kernels().one_hot(sample.ids.contiguous(), sample.score_max.contiguous(), out)
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
    if logits.dtype == torch.float64:
        return fallback.softmax(logits, tau, seed, row_ids, vocab_start, score_max, normalize, out_dtype, out)
    # The kernels write float32 and the logits' dtype; what is rounded once more from float32 is rounded once.
    direct = out_dtype if out_dtype == logits.dtype else torch.float32
    weights = out
    if weights is None or weights.dtype != direct:
        weights = torch.empty(logits.shape, dtype=direct, device=logits.device)
    total = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    _kernels().softmax(
        unit_stride(logits), tau.contiguous(), _seed(seed, logits), contiguous(row_ids), vocab_start,
        score_max.contiguous(), normalize, _partial(logits, vocab_start), weights, total,
    )  # fmt: skip
    if out is None:
        return weights.to(out_dtype), total
    return (out if weights is out else out.copy_(weights)), total


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
    if logits.dtype == torch.float64:
        return fallback.softmax_backward(
            dy, logits, tau, seed, row_ids, vocab_start, estimator, sample, dlogprobs, needs_dtau, out
        )
    needs_dtau = needs_dtau and estimator != "reinmax"  # which defines none
    dtau = (torch.empty if needs_dtau else torch.zeros)(logits.shape[0], dtype=torch.float32, device=logits.device)
    written = out
    if out.stride(1) != 1 and out.shape[1] > 1:
        written = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    _kernels().softmax_backward(
        unit_stride(dy), unit_stride(logits), tau.contiguous(), _seed(seed, logits), contiguous(row_ids), vocab_start,
        ESTIMATOR[estimator], *(part.contiguous() for part in sample), contiguous(dlogprobs),
        _partial(logits, vocab_start, 3), torch.empty_like(dtau), _partial(logits, vocab_start) if needs_dtau else None,
        written, dtau,
    )  # fmt: skip
    if written is not out:
        out.copy_(written)
    return dtau
