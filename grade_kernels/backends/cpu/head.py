"""A head's statistics and support: a matrix product per chunk of the vocabulary, then the kernels of csrc/cpu/head.inl.

The product is taken as `weight[chunk] @ hidden.T`: faster than its transpose, and it puts hidden rows into the lanes of
the kernels, so that no statistic is reduced across lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from grade_kernels.backends import Head, Sample, Softmax, Support
from grade_kernels.backends.cpu import rows as rows_backend
from grade_kernels.backends.native import unit_stride
from grade_kernels.backends.torch import head as fallback

CHUNK_ELEMENTS = 2**20  # logits that exist at a time
_LANES, _PIECES = 16, 8  # kHeadLanes and kPieces of csrc/cpu
_FEW_ROWS = 8  # hidden rows up to which padding them to whole lanes is most of the work
_CANDIDATE_WORDS = 3  # int32 words of csrc/cpu/head.h's Candidate and of its Hit
_SAMPLE, _SCORES, _SOFTMAX = range(3)


def _kernels() -> Any:
    return torch.ops.grade_kernels_cpu


def _has_product(x: torch.Tensor) -> bool:
    """Whether products of x go to csrc/cpu/products/products.h."""
    return x.numel() > 0 and x.dtype != torch.float64 and bool(_kernels().has_product(x))


def _packed(x: torch.Tensor) -> torch.Tensor:
    """x as csrc/cpu/products/products.h wants it."""
    packed = x.new_empty(_kernels().packed_numbers(x), dtype=torch.int16)
    _kernels().product_pack(unit_stride(x), packed)
    return packed


def product(x: torch.Tensor, table: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """See `grade_kernels.backends`."""
    fits = table.dtype == x.dtype and (out is None or out.dtype in (x.dtype, torch.float32))
    if not fits or not _has_product(x):
        if out is None and 0 < len(x) < _LANES:  # few rows may be added up in another order than padded ones are
            return _Product(x, table, len(table))(slice(0, len(table)))[:, : len(x)].T
        return fallback.product(x, table, out)
    if out is None:
        out = x.new_empty(len(x), len(table))
    _kernels().packed_product(_packed(x), len(x), unit_stride(table), True, out)
    return out


def weighted_sum(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """See `grade_kernels.backends`."""
    if values.dtype in (torch.float32, table.dtype) and values.numel() > 0 and _has_product(table):
        out = values.new_empty(len(values), table.shape[1], dtype=torch.float32)
        if not _kernels().weighted_sum(unit_stride(values), unit_stride(table), out):
            rows = ~out.isfinite().all(dim=1)  # parts of an infinity are none
            out[rows] = fallback.weighted_sum(values[rows], table)
        return out
    return fallback.weighted_sum(values, table)


def weight_terms(
    weights: torch.Tensor, dy: torch.Tensor, slope: torch.Tensor | None, out: torch.Tensor, sums: torch.Tensor
) -> torch.Tensor:
    """See `grade_kernels.backends`."""
    if weights.dtype != torch.float32 or out.dtype == torch.float16:
        return fallback.weight_terms(weights, dy, slope, out, sums)
    moved = sums.new_empty(len(weights))
    slope = None if slope is None else unit_stride(slope)
    _kernels().weight_terms(unit_stride(weights), unit_stride(dy), slope, out, sums, moved)
    return moved


def exact_weights(dtype: torch.dtype) -> bool:
    """See `grade_kernels.backends`."""
    return fallback.exact_weights(dtype) or bool(_kernels().has_product(torch.empty(0, dtype=dtype)))


class _Product:
    """`weight @ hidden.T`, some rows of the weight at a time, in a buffer of `width` rows.

    Its columns are padded to a whole number of lanes.
    """

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, width: int) -> None:
        self.weight, self.rows = weight, len(hidden)
        self.buffer = hidden.new_empty(min(width, len(weight)), _padded(self.rows))
        self.own = _has_product(hidden)
        self.widened = not self.own and not fallback.has_kernels(hidden)
        if self.own:
            self.hidden = _packed(hidden)
        else:
            dtype = torch.float32 if self.widened else hidden.dtype
            self.hidden = hidden.new_zeros(hidden.shape[1], _padded(self.rows), dtype=dtype)
            self.hidden[:, : self.rows] = hidden.T

    def __call__(self, chunk: slice) -> torch.Tensor:
        out = self.buffer[: chunk.stop - chunk.start]
        if self.widened:
            fallback.product(self.hidden.T, self.weight[chunk], out.T)
            return out
        if not self.own:
            return torch.mm(self.weight[chunk], self.hidden, out=out)
        _kernels().packed_product(self.hidden, self.rows, unit_stride(self.weight[chunk]), False, out)
        return out


def _logits(head: Head, ref: Head | None, width: int) -> Callable[[slice], tuple[torch.Tensor, torch.Tensor | None]]:
    """Logits of a chunk, and the reference's in the same dtype and layout. Weights that both share are read once."""
    if ref is None:
        product = _Product(head.hidden, head.weight, width)
        return lambda chunk: (product(chunk), None)
    lanes = _padded(len(head.hidden))
    if _same(head.weight, ref.weight):
        apart = head.hidden.new_zeros(lanes - len(head.hidden), head.hidden.shape[1])
        both = _Product(torch.cat([head.hidden, apart, ref.hidden, apart]), head.weight, width)

        def split(chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
            out = both(chunk)
            return out[:, :lanes], out[:, lanes:]

        return split
    products = [_Product(h.hidden, h.weight, width) for h in (head, ref)]
    dtype = torch.float32 if head.hidden.dtype != ref.hidden.dtype else head.hidden.dtype
    return lambda chunk: (products[0](chunk).to(dtype), products[1](chunk).to(dtype))


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two tensors are the same memory seen in the same way."""
    alike = x.dtype == y.dtype and x.shape == y.shape and x.stride() == y.stride()
    return alike and x.data_ptr() == y.data_ptr()


def _padded(rows: int) -> int:
    """Rows up to a whole number of lanes."""
    return max(1, -(-rows // _LANES)) * _LANES


def _chunks(vocab: int, width: int) -> Iterator[slice]:
    """Chunks of the vocabulary. The first are short: before any normaliser is known, every token is a candidate."""
    start, step = 0, max(256, width // 32)
    while start < vocab:
        stop = min(start + min(step, width), vocab)
        yield slice(start, stop)
        start, step = stop, 4 * step


def _few_chunks(head: Head) -> Iterator[tuple[slice, torch.Tensor]]:
    """Columns and logits `[N, columns]` of a decoding step's few rows, half a buffer at a time.

    A padded product would compute several times what is needed; this one takes little longer than reading the weight.
    In narrower dtypes torch's product is that fast by itself.
    """
    hidden, weight = unit_stride(head.hidden), unit_stride(head.weight)
    rows, vocab = hidden.shape[0], weight.shape[0]
    width = max(64, CHUNK_ELEMENTS // 2 // rows // 64 * 64)
    buffer = hidden.new_empty(rows, min(width, vocab))
    for start in range(0, vocab, width):
        columns = slice(start, min(start + width, vocab))
        logits = buffer[:, : columns.stop - start]
        _kernels().few_product(hidden, weight[columns], logits)
        if head.bias is not None:
            logits += head.bias[columns]
        yield columns, fallback.softcapped(logits, head.softcap)


def _few_sample(head: Head, seed: torch.Tensor, row_ids: torch.Tensor | None, vocab_start: int) -> Sample:
    """`head_sample` of a few rows: samples of chunks, the best of which wins."""
    parts, bad = [], head.hidden.new_zeros(head.hidden.shape[0], dtype=torch.bool)
    for columns, logits in _few_chunks(head):
        part = rows_backend.sample(logits, seed, row_ids, vocab_start + columns.start, True)
        none = part.ids < 0  # NaN, +inf or only -inf; a chunk may well be masked throughout
        if none.any():
            top = logits.amax(dim=1)
            bad |= none & (top != -torch.inf)
            part = part._replace(
                score_max=torch.where(none, -torch.inf, part.score_max),
                logit_max=torch.where(none, -torch.inf, part.logit_max),
                logit_sum=torch.where(none, 0.0, part.logit_sum),
            )
        parts.append(part._replace(ids=part.ids + columns.start))
    ids, score_max, logit_max, logit_sum = (torch.stack(x) for x in zip(*parts, strict=True))
    best, where = score_max.max(dim=0)
    top = logit_max.amax(dim=0)
    bad |= best == -torch.inf
    total = (logit_sum * (logit_max - torch.where(bad, 0.0, top)).exp()).sum(dim=0)
    chosen = ids.gather(0, where[None])[0]
    return Sample(torch.where(bad, -1, chosen), torch.where(bad, torch.nan, best), top, total)


class _Pass:
    """One pass over the vocabulary."""

    def __init__(self, kind: int, head: Head, tau: torch.Tensor, eps: float) -> None:
        rows, vocab = head.hidden.shape[0], head.weight.shape[0]
        self.kind, self.head, self.tau, self.eps = kind, head, tau.contiguous(), eps
        self.state = tau.new_zeros(5, rows)  # score max, score sum, logit max, logit sum, moment
        self.state[0::2][:2] = torch.finfo(torch.float32).min
        self.ids = tau.new_full((rows,), -1, dtype=torch.int64)
        self.flags = tau.new_zeros(3, rows, dtype=torch.int32)  # bad, entries, overflow
        self.capacity = fallback.support_capacity(eps, vocab) if eps > 0 else 0
        self.candidates = tau.new_empty(rows, self.capacity * _CANDIDATE_WORDS, dtype=torch.int32)

    def run(self, seed: torch.Tensor, row_ids: torch.Tensor | None, vocab_start: int, ref: Head | None = None) -> None:
        head, rows = self.head, self.head.hidden.shape[0]
        lanes, vocab = _padded(rows), head.weight.shape[0]
        width = max(192, CHUNK_ELEMENTS // lanes // 192 * 192)  # whole blocks of products, evenly many for two threads
        logits = _logits(head, ref, width)
        # Candidates of a chunk before they are filtered: room for all, touched where there are any.
        room = lanes * (width + _PIECES) * _CANDIDATE_WORDS if self.eps > 0 else 0
        scratch = self.flags.new_empty(room)
        row_ids = None if row_ids is None else row_ids.contiguous()
        for chunk in _chunks(vocab, width):
            out, ref_out = logits(chunk)
            bias = None if head.bias is None else head.bias[chunk]
            ref_bias = None if ref is None or ref.bias is None else ref.bias[chunk].float()
            _kernels().head_chunk(
                self.kind, out, ref_out, bias, ref_bias, head.softcap or 0.0, rows, self.tau, seed, row_ids,
                vocab_start, chunk.start, self.eps, self.state, self.ids, self.flags, self.candidates, scratch,
            )  # fmt: skip

    def bad(self) -> torch.Tensor:
        """Rows that have no distribution."""
        return (self.flags[0] & 1 != 0) | (self.state[0] == torch.finfo(torch.float32).min)

    def sample(self) -> Sample:
        bad = self.bad()
        score_max = torch.where(bad, torch.nan, self.state[0])
        return Sample(torch.where(bad, -1, self.ids), score_max, self.state[2], self.state[3])

    def support(self) -> Support:
        rows = self.head.hidden.shape[0]
        if self.eps == 0:
            return fallback.empty_support(rows, self.head.hidden)
        _kernels().head_finish(self.tau, self.eps, self.state, self.flags, self.candidates)
        offsets = self.ids.new_zeros(rows + 1)
        torch.cumsum(self.flags[1], 0, out=offsets[1:])
        count = int(offsets[-1])
        tokens, p = self.ids.new_empty(count), self.state.new_empty(count)
        _kernels().head_support(self.candidates, offsets, tokens, p)
        return Support(offsets, tokens, p, self.flags[2] != 0)


def head_sample(head: Head, seed: torch.Tensor, row_ids: torch.Tensor | None, vocab_start: int) -> Sample:
    """See `grade_kernels.backends`."""
    if head.hidden.dtype == torch.float32 and 0 < head.hidden.shape[0] <= _FEW_ROWS:
        return _few_sample(head, seed, row_ids, vocab_start)
    step = _Pass(_SAMPLE, head, head.hidden.new_ones(head.hidden.shape[0], dtype=torch.float32), 0.0)
    step.run(seed, row_ids, vocab_start)
    return step.sample()


def head_scores(
    head: Head, tau: torch.Tensor, seed: torch.Tensor, row_ids: torch.Tensor | None, vocab_start: int, eps: float
) -> tuple[Sample, torch.Tensor, Support]:
    """See `grade_kernels.backends`."""
    step = _Pass(_SCORES, head, tau, eps)
    step.run(seed, row_ids, vocab_start)
    return step.sample(), step.state[1], step.support()


def head_softmax(
    head: Head,
    tau: torch.Tensor,
    seed: torch.Tensor,
    row_ids: torch.Tensor | None,
    vocab_start: int,
    eps: float,
    ref: Head | None,
) -> tuple[Softmax, Support]:
    """See `grade_kernels.backends`."""
    step = _Pass(_SOFTMAX, head, tau, eps)
    step.run(seed, row_ids, vocab_start, ref)
    largest, total, ref_max, ref_total, moment = step.state
    largest = torch.where(step.bad(), torch.nan, largest)
    if ref is None:
        ref_max = ref_total = moment.new_empty(0)
    else:
        ref_max = torch.where(step.flags[0] & 2 != 0, torch.nan, ref_max)
    return Softmax(largest, total, moment / total, ref_max, ref_total), step.support()


def head_logits_at(head: Head, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """See `grade_kernels.backends`."""
    return fallback.head_logits_at(head, rows, tokens, gather_dot)


def gather_dot(x: torch.Tensor, table: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """See `grade_kernels.backends`."""
    if torch.float64 in (x.dtype, table.dtype):
        return fallback.gather_dot(x, table, rows, tokens)
    out = x.new_empty(len(tokens), dtype=torch.float32)
    _kernels().gather_dot(unit_stride(x), unit_stride(table), rows.contiguous(), tokens.contiguous(), out)
    return out


def gather_sum(values: torch.Tensor, table: torch.Tensor, offsets: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """See `grade_kernels.backends`."""
    if torch.float64 in (values.dtype, table.dtype):
        return fallback.gather_sum(values, table, offsets, tokens)
    out = values.new_empty(len(offsets) - 1, table.shape[1])
    _kernels().gather_sum(values.contiguous(), unit_stride(table), offsets, tokens.contiguous(), out)
    return out


def _token_order(tokens: torch.Tensor, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the torch backend's, by counting."""
    order, counts = torch.empty_like(tokens), tokens.new_zeros(vocab)
    _kernels().token_order(tokens.contiguous(), order, counts)
    distinct = counts.nonzero()[:, 0]
    return order, distinct, fallback.offsets_of(counts[distinct])


def scatter_sum(
    values: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    """See `grade_kernels.backends`."""
    return fallback.scatter_sum(values, x, rows, tokens, table, gather_sum, _token_order)
