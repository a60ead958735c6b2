"""Statistics and stochastic support of a head's logits in plain PyTorch, one chunk of the vocabulary at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from grade_kernels.backends import Head, Sample, Softmax, Support
from grade_kernels.backends.torch.rows import column_chunks
from grade_kernels.noise import (
    DOMAIN_GUMBEL,
    DOMAIN_REFINE,
    DOMAIN_SUPPORT,
    GumbelNoise,
    gumbel_from_words,
    seed_on,
    uniform_from_words,
)

GATHER_ELEMENTS = 2**22  # gathered elements that are held at once
PRODUCT_ELEMENTS = 2**18  # of a product that is written where it belongs: what is taken, and if need be held, at a time


def support_capacity(eps: float, vocab_size: int) -> int:
    """Entries a row's support may take: four times what a flat distribution needs, yet far from the vocabulary."""
    # The expected count is at most 1 / eps. A row that overflows by chance would be exact when many tokens are kept and
    # sparse when few are, hence biased; ten standard deviations and the slack of compaction make that negligible.
    return int(min(vocab_size + 64, (1.0 / eps + 10.0 / eps**0.5) * 8 / 7 + 64))


def offsets_of(counts: torch.Tensor) -> torch.Tensor:
    """`[len(counts) + 1]`: where runs of so many entries begin, and where the last ends."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The arithmetic that serves a dtype: float64 for itself, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def _onednn_has(dtype: torch.dtype) -> bool:
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    supported = getattr(torch.ops.mkldnn, name, None)  # a build without oneDNN has no such operation
    return supported is not None and bool(supported())


def has_kernels(x: torch.Tensor) -> bool:
    """Whether PyTorch has kernels for products of x's dtype here. Without, they take up to 100 times as long as float32."""
    return x.device.type != "cpu" or x.dtype.itemsize != 2 or _onednn_has(x.dtype)


def product(x: torch.Tensor, table: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """See `grade_kernels.backends`."""
    if out is None:
        if has_kernels(x):
            return x @ table.T
        out, x = x.new_empty(len(x), len(table)), x.float()
    dtype = torch.promote_types(x.dtype, out.dtype)  # what is kept in more bits is not rounded to fewer on its way
    x, width = x.to(dtype), 0 if dtype == x.dtype else x.shape[1]
    for columns in column_chunks(max(len(x), width), len(table), PRODUCT_ELEMENTS):
        part = table[columns].to(dtype).T
        if out.dtype == dtype:
            torch.mm(x, part, out=out[:, columns])
        else:
            out[:, columns] = x @ part
    return out


def weighted_sum(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """See `grade_kernels.backends`."""
    dtype = compute_dtype(values.dtype)
    if not has_kernels(table):
        values, out = values.to(dtype), torch.zeros(len(values), table.shape[1], dtype=dtype)
        for rows in column_chunks(max(1, table.shape[1]), len(table), PRODUCT_ELEMENTS):
            out.addmm_(values[:, rows], table[rows].to(dtype))
        return out
    if table.dtype != torch.float16:
        return (values.to(table.dtype) @ table).to(dtype)
    values = values.to(dtype)
    # Thousands of rows of a table may add up to more than float16 holds, though their mean never does.
    shrink = (values.abs().sum(dim=1, keepdim=True) / 2**10).clamp_min_(1.0)
    return ((values / shrink).half() @ table) * shrink


def weight_terms(
    weights: torch.Tensor, dy: torch.Tensor, slope: torch.Tensor | None, out: torch.Tensor, sums: torch.Tensor
) -> torch.Tensor:
    """See `grade_kernels.backends`."""
    total, dot = sums
    before = torch.where(total > 0, dot / total, 0.0)
    total += weights.sum(dim=1)
    dot += (weights * dy).sum(dim=1)
    mean = torch.where(total > 0, dot / total, 0.0)
    weighted, plain = out.unbind()
    scaled = weights if slope is None else weights * slope
    plain.copy_(scaled)
    weighted.copy_(scaled * (dy - mean[:, None]))
    return mean - before


def exact_weights(dtype: torch.dtype) -> bool:
    """See `grade_kernels.backends`."""
    return dtype == compute_dtype(dtype)


class Scratch:
    """Memory for one chunk after another: to the system, fresh pages for each are more work than what fills them."""

    def __init__(self, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows, self.memory = rows, torch.empty(0, dtype=dtype, device=device)

    def __call__(self, width: int) -> torch.Tensor:
        """`[rows, width]`, uninitialised, at the expense of what was there before."""
        if self.rows * width > len(self.memory):
            self.memory = self.memory.new_empty(self.rows * width)
        return self.memory[: self.rows * width].view(self.rows, width)


def head_chunks(
    head: Head, product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = product
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Columns and logits `[N, columns]` in compute precision, chunk by chunk; another backend lends its own product.

    Logits last until the next chunk is asked for.
    """
    dtype = compute_dtype(head.hidden.dtype)
    scratch = Scratch(head.hidden.shape[0], dtype, head.hidden.device)
    for columns in column_chunks(head.hidden.shape[0], head.weight.shape[0]):
        logits = product(head.hidden, head.weight[columns])
        if logits.dtype != dtype:
            logits = scratch(logits.shape[1]).copy_(logits)
        if head.bias is not None:
            logits += head.bias[columns]
        yield columns, softcapped(logits, head.softcap)


def softcapped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """`softcap * tanh(l / softcap)`, as in Gemma 2; a masked logit stays masked."""
    if softcap is None:
        return logits
    return torch.where(logits == -torch.inf, -torch.inf, softcap * torch.tanh(logits / softcap))


class _LogSumExp:
    """Running `max(x)` and `sum(exp((x - max) / tau))` of `[N, V]` values that come in chunks."""

    def __init__(self, rows: int, like: torch.Tensor, tau: torch.Tensor | None = None) -> None:
        dtype = compute_dtype(like.dtype)
        self.max = torch.full((rows,), -torch.inf, dtype=dtype, device=like.device)
        self.total = torch.zeros(rows, dtype=dtype, device=like.device)
        self.tau = torch.ones_like(self.max) if tau is None else tau

    def pivot(self) -> torch.Tensor:
        """The maximum so far, 0 before there is one."""
        return torch.where(self.max == -torch.inf, 0.0, self.max)

    def update(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a chunk; returns its `exp((x - max) / tau)` and the factor by which earlier ones have shrunk."""
        before, self.max = self.max, torch.maximum(self.max, x.amax(dim=1))
        pivot = self.pivot()
        scale = ((before - pivot) / self.tau).exp()
        weights = ((x - pivot[:, None]) / self.tau[:, None]).exp()
        self.total = self.total * scale + weights.sum(dim=1)
        return weights, scale


class _Candidates:
    """Entries that may be in the support: decided against the running normaliser, a lower bound of the final one."""

    def __init__(self, sums: _LogSumExp, eps: float, vocab_size: int) -> None:
        self.sums, self.eps, self.capacity = sums, eps, support_capacity(eps, vocab_size)
        self.rows: list[torch.Tensor] = []
        self.tokens: list[torch.Tensor] = []
        self.scores: list[torch.Tensor] = []
        self.uniforms: list[torch.Tensor] = []

    def take(self, columns: slice, weights: torch.Tensor, scores: torch.Tensor, uniform: torch.Tensor) -> None:
        kept = weights > uniform * self.eps * self.sums.total[:, None]
        rows, tokens = kept.nonzero(as_tuple=True)
        self.rows.append(rows)
        self.tokens.append(tokens + columns.start)
        self.scores.append(scores[rows, tokens])
        self.uniforms.append(uniform[rows, tokens])
        if sum(len(part) for part in self.rows[1:]) > 4 * self.capacity * len(weights):
            self._filter()

    def _filter(self) -> torch.Tensor:
        """Drop what the normaliser so far rules out; returns the probabilities of the rest under it."""
        rows, tokens = torch.cat(self.rows), torch.cat(self.tokens)
        scores, uniforms = torch.cat(self.scores), torch.cat(self.uniforms)
        p = ((scores - self.sums.max[rows]) / self.sums.tau[rows]).exp() / self.sums.total[rows]
        kept = p > uniforms * self.eps
        self.rows, self.tokens = [rows[kept]], [tokens[kept]]
        self.scores, self.uniforms = [scores[kept]], [uniforms[kept]]
        return p[kept]

    def support(self) -> Support:
        p, rows, tokens = self._filter(), self.rows[0], self.tokens[0]
        overflow = torch.bincount(rows, minlength=len(self.sums.max)) > self.capacity
        fits = ~overflow[rows]
        p, rows, tokens = p[fits], rows[fits], tokens[fits]
        order = rows.argsort(stable=True)  # chunks came in token order
        counts = torch.bincount(rows, minlength=len(self.sums.max))
        return Support(offsets_of(counts), tokens[order], p[order], overflow)


def empty_support(rows: int, like: torch.Tensor) -> Support:
    """A support without entries."""
    device = like.device
    return Support(
        torch.zeros(rows + 1, dtype=torch.int64, device=device),
        torch.zeros(0, dtype=torch.int64, device=device),
        torch.zeros(0, dtype=compute_dtype(like.dtype), device=device),
        torch.zeros(rows, dtype=torch.bool, device=device),
    )


def _noise(head: Head, seed: torch.Tensor, row_ids: torch.Tensor | None, vocab_start: int) -> GumbelNoise:
    if row_ids is None:
        row_ids = torch.arange(head.hidden.shape[0], device=head.hidden.device)
    return GumbelNoise(seed_on(seed, head.hidden.device), row_ids, vocab_start=vocab_start)


def head_scores(
    head: Head, tau: torch.Tensor, seed: torch.Tensor, row_ids: torch.Tensor | None, vocab_start: int, eps: float
) -> tuple[Sample, torch.Tensor, Support]:
    """See `grade_kernels.backends`."""
    rows, vocab = head.hidden.shape[0], head.weight.shape[0]
    noise = _noise(head, seed, row_ids, vocab_start)
    tempered, plain = _LogSumExp(rows, head.hidden, tau), _LogSumExp(rows, head.hidden)
    ids = torch.zeros(rows, dtype=torch.int64, device=head.hidden.device)
    candidates = _Candidates(tempered, eps, vocab) if eps > 0 else None
    for columns, logits in head_chunks(head):
        word, refinement = (
            noise.words(rows, logits.shape[1], vocab_start=columns.start, domain=domain)
            for domain in (DOMAIN_GUMBEL, DOMAIN_REFINE)
        )
        scores = logits + gumbel_from_words(word, refinement, logits.dtype)
        best, where = scores.max(dim=1)
        ids = torch.where(~(best <= tempered.max), where + columns.start, ids)
        plain.update(logits)
        weights, _ = tempered.update(scores)
        if candidates is not None:
            candidates.take(columns, weights, scores, uniform_from_words(word, logits.dtype))
    bad = ~tempered.max.isfinite()
    support = empty_support(rows, head.hidden) if candidates is None else candidates.support()
    if head.hidden.device.type == "cpu":
        ids = torch.where(bad, -1, ids)
    score_max = torch.where(bad, torch.nan, tempered.max)
    return Sample(ids, score_max, plain.max, plain.total), tempered.total, support


def head_sample(head: Head, seed: torch.Tensor, row_ids: torch.Tensor | None, vocab_start: int) -> Sample:
    """See `grade_kernels.backends`."""
    one = torch.ones(head.hidden.shape[0], dtype=compute_dtype(head.hidden.dtype), device=head.hidden.device)
    return head_scores(head, one, seed, row_ids, vocab_start, 0.0)[0]


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
    rows, vocab = head.hidden.shape[0], head.weight.shape[0]
    noise = _noise(head, seed, row_ids, vocab_start)
    sums, ref_sums = _LogSumExp(rows, head.hidden, tau), _LogSumExp(rows, head.hidden, tau)
    candidates = _Candidates(sums, eps, vocab) if eps > 0 else None
    ref_chunks = None if ref is None else head_chunks(ref)
    moment = torch.zeros_like(sums.total)
    for columns, logits in head_chunks(head):
        # The moment counts from the maxima, which may move: a constant on all logits does not show in it.
        pivots, total = sums.pivot() - ref_sums.pivot(), sums.total
        weights, scale = sums.update(logits)
        centred = logits - sums.pivot()[:, None]
        if ref_chunks is not None:
            ref_logits = next(ref_chunks)[1]
            ref_sums.update(ref_logits)
            centred -= ref_logits - ref_sums.pivot()[:, None]
        moved = total * (pivots - (sums.pivot() - ref_sums.pivot())) / tau
        moment = torch.where((total > 0) & (scale > 0), scale * (moment + moved), 0.0)
        moment += torch.where(weights > 0, weights * centred / tau[:, None], 0.0).sum(dim=1)
        if candidates is not None:
            word = noise.words(rows, logits.shape[1], vocab_start=columns.start, domain=DOMAIN_SUPPORT)
            candidates.take(columns, weights, logits, uniform_from_words(word, logits.dtype))
    support = empty_support(rows, head.hidden) if candidates is None else candidates.support()
    moment /= sums.total
    if ref is None:
        empty = moment.new_empty(0)
        return Softmax(sums.max, sums.total, moment, empty, empty), support
    return Softmax(sums.max, sums.total, moment, ref_sums.max, ref_sums.total), support


def gather_dot(x: torch.Tensor, table: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """See `grade_kernels.backends`."""
    dtype = compute_dtype(torch.promote_types(x.dtype, table.dtype))
    out = torch.empty(len(tokens), dtype=dtype, device=x.device)
    step = max(1, GATHER_ELEMENTS // max(1, x.shape[1]))
    for i in range(0, len(tokens), step):
        part = slice(i, i + step)
        out[part] = (x[rows[part]].to(dtype) * table[tokens[part]].to(dtype)).sum(dim=1)
    return out


def gather_sum(values: torch.Tensor, table: torch.Tensor, offsets: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """See `grade_kernels.backends`."""
    width = table.shape[1]
    out = torch.zeros(len(offsets) - 1, width, dtype=values.dtype, device=table.device)
    # Blocks of columns keep what is gathered small without splitting a row's sum.
    step = max(1, GATHER_ELEMENTS // max(1, len(tokens)))
    for i in range(0, width, step):
        gathered = table[:, i : i + step][tokens].to(values.dtype) * values[:, None]
        out[:, i : i + step] = torch.segment_reduce(gathered, "sum", offsets=offsets, axis=0, initial=0)
    return out


def head_logits_at(
    head: Head, rows: torch.Tensor, tokens: torch.Tensor, dot: Callable[..., torch.Tensor] = gather_dot
) -> torch.Tensor:
    """See `grade_kernels.backends`; another backend lends its own gather_dot."""
    logits = dot(head.hidden, head.weight, rows, tokens)
    logits = logits.to(head.hidden.dtype).to(logits.dtype)  # what a matrix product in that dtype returns
    if head.bias is not None:
        logits = logits + head.bias[tokens]
    return softcapped(logits, head.softcap)


def token_order(tokens: torch.Tensor, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A stable order of entries by token, the tokens that occur, and `[distinct + 1]` where the entries of each begin."""
    order = tokens.argsort(stable=True)
    distinct, counts = torch.unique_consecutive(tokens[order], return_counts=True)
    return order, distinct, offsets_of(counts)


def scatter_sum(
    values: torch.Tensor,
    x: torch.Tensor,
    rows: torch.Tensor,
    tokens: torch.Tensor,
    table: torch.Tensor,
    summed: Callable[..., torch.Tensor] = gather_sum,
    ordered: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = token_order,
) -> torch.Tensor:
    """See `grade_kernels.backends`; another backend lends its own gather_sum and token_order."""
    out = torch.zeros(table.shape[0], x.shape[1], dtype=table.dtype, device=table.device)
    if len(tokens) == 0:
        return out
    order, distinct, offsets = ordered(tokens, table.shape[0])
    out[distinct] = summed(values[order], x, offsets, rows[order]).to(table.dtype)
    return out
