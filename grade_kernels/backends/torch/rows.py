"""Rows of given logits in plain PyTorch operations, chunked over the vocabulary.

The noise is that of `grade_kernels.noise`, made one chunk at a time, so nothing of the size of the logits is ever held
beside inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from grade_kernels.backends import Sample
from grade_kernels.noise import GumbelNoise, seed_on

CHUNK_ELEMENTS = 2**20  # tokens x rows that are looked at together; noise takes about 50 bytes each


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The arithmetic that serves a dtype: float64 for itself, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def column_chunks(num_rows: int, vocab_size: int, elements: int | None = None) -> Iterator[slice]:
    """Slices that cover the vocabulary in pieces of about `elements` (default: CHUNK_ELEMENTS) elements."""
    width = max(256, (elements or CHUNK_ELEMENTS) // max(1, num_rows) // 64 * 64)
    for start in range(0, vocab_size, width):
        yield slice(start, min(start + width, vocab_size))


class _Scores:
    """l + g of one chunk of columns at a time."""

    def __init__(
        self, logits: torch.Tensor, seed: torch.Tensor, row_ids: torch.Tensor | None, vocab_start: int
    ) -> None:
        if row_ids is None:
            row_ids = torch.arange(logits.shape[0], device=logits.device)
        self.logits = logits
        self.noise = GumbelNoise(seed_on(seed, logits.device), row_ids, vocab_start=vocab_start)
        self.dtype = compute_dtype(logits.dtype)

    def chunk(self, columns: slice) -> torch.Tensor:
        rows, width = self.logits.shape[0], columns.stop - columns.start
        return self.logits[:, columns].to(self.dtype) + self.noise.dense(
            rows, width, vocab_start=columns.start, dtype=self.dtype
        )


def sample(
    logits: torch.Tensor, seed: torch.Tensor, row_ids: torch.Tensor | None, vocab_start: int, logsumexp: bool
) -> Sample:
    """See `grade_kernels.backends`."""
    rows, vocab = logits.shape
    scores = _Scores(logits, seed, row_ids, vocab_start)
    score_max = torch.full((rows,), -torch.inf, dtype=scores.dtype, device=logits.device)
    ids = torch.zeros(rows, dtype=torch.int64, device=logits.device)
    logit_max, logit_sum = score_max, torch.zeros_like(score_max)
    for columns in column_chunks(rows, vocab):
        best, where = scores.chunk(columns).max(dim=1)
        # NaN wins every later comparison, as in torch.max.
        better = ~(best <= score_max) & ~score_max.isnan()
        ids = torch.where(better, where + columns.start, ids)
        score_max = torch.where(better, best, score_max)
        if logsumexp:
            part = logits[:, columns].to(scores.dtype)
            new_max = torch.maximum(logit_max, part.amax(dim=1))
            # A row that has seen only -inf so far has no finite reference point yet.
            pivot = torch.where(new_max == -torch.inf, 0.0, new_max)
            logit_sum = logit_sum * (logit_max - pivot).exp() + (part - pivot[:, None]).exp().sum(dim=1)
            logit_max = new_max
    bad = ~score_max.isfinite()
    if logits.device.type == "cpu":
        ids = torch.where(bad, -1, ids)
    else:
        score_max = torch.where(bad, torch.nan, score_max)
    if not logsumexp:
        logit_max, logit_sum = logits.new_empty(0, dtype=scores.dtype), logits.new_empty(0, dtype=scores.dtype)
    return Sample(ids, score_max, logit_max, logit_sum)


def one_hot(sample: Sample, vocab_size: int, dtype: torch.dtype) -> torch.Tensor:
    """See `grade_kernels.backends`."""
    rows = sample.ids.shape[0]
    out = torch.zeros(rows, vocab_size, dtype=dtype, device=sample.ids.device)
    out[torch.arange(rows, device=out.device), sample.ids] = 1.0  # scatter_ passes over all of it in 16 bits on CPUs
    return out if out.device.type == "cpu" else out.masked_fill_(sample.score_max.isnan()[:, None], torch.nan)


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
    rows, vocab = logits.shape
    scores = _Scores(logits, seed, row_ids, vocab_start)
    weights = torch.empty(rows, vocab, dtype=out_dtype, device=logits.device) if out is None else out
    total = torch.zeros(rows, dtype=scores.dtype, device=logits.device)

    def chunk(columns: slice) -> torch.Tensor:
        return ((scores.chunk(columns) - score_max[:, None]) / tau[:, None]).exp()

    for columns in column_chunks(rows, vocab):
        part = chunk(columns)
        total += part.sum(dim=1)
        weights[:, columns] = part
    if normalize:
        narrow = out_dtype != scores.dtype  # rounding twice would be an error of our own
        for columns in column_chunks(rows, vocab):
            weights[:, columns] = (chunk(columns) if narrow else weights[:, columns]) / total[:, None]
    return weights, total


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
    rows, vocab = logits.shape
    scores = _Scores(logits, seed, row_ids, vocab_start)
    noisy, reinmax = estimator in ("ste", "soft"), estimator == "reinmax"
    pivot = (sample.score_max if noisy else sample.logit_max)[:, None]
    tau = tau[:, None]

    def tempered(columns: slice) -> torch.Tensor:
        """Argument of the relaxation's exponential, before the division by tau; its maximum is 0."""
        return (scores.chunk(columns) if noisy else logits[:, columns].to(scores.dtype)) - pivot

    def plain(columns: slice) -> torch.Tensor:
        return (logits[:, columns].to(scores.dtype) - sample.logit_max[:, None]).exp() / sample.logit_sum[:, None]

    zeros = torch.zeros(rows, 1, dtype=scores.dtype, device=logits.device)
    total, dot, plain_dot, dtau = zeros.clone(), zeros.clone(), zeros.clone(), zeros.clone()
    for columns in column_chunks(rows, vocab):
        part, upstream = (tempered(columns) / tau).exp(), dy[:, columns].to(scores.dtype)
        total += part.sum(dim=1, keepdim=True)
        dot += (part * upstream).sum(dim=1, keepdim=True)
        if reinmax:
            plain_dot += (plain(columns) * upstream).sum(dim=1, keepdim=True)
    dot /= total
    if reinmax:
        dot = 0.5 * (dot + dy.gather(1, sample.ids[:, None]).to(scores.dtype))
    for columns in column_chunks(rows, vocab):
        distance, upstream = tempered(columns), dy[:, columns].to(scores.dtype)
        p = (distance / tau).exp() / total
        tokens = torch.arange(columns.start, columns.stop, device=logits.device)
        hit = sample.ids[:, None] == tokens[None, :]
        if reinmax:
            p = 0.5 * (p + hit)
            part = 2.0 * p * (upstream - dot) - 0.5 * plain(columns) * (upstream - plain_dot)
        else:
            part = p * (upstream - dot) / tau
            if needs_dtau:
                dtau -= torch.where(p > 0, part * distance, 0.0).sum(dim=1, keepdim=True) / tau
        if dlogprobs is not None:
            part = part + dlogprobs[:, None] * (hit.to(scores.dtype) - plain(columns))
        out[:, columns] = torch.where(logits[:, columns] == -torch.inf, 0.0, part)
    return dtau.squeeze(1)
