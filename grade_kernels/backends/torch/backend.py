"""The `torch` backend."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from typing_extensions import override

from grade_kernels.backends.interface import Backend, softcapped
from grade_kernels.backends.layouts import flat, written_flat
from grade_kernels.backends.log_sum_exp import LogSumExp
from grade_kernels.backends.records import GradientRule, Head, Noise, Rows, Sample, Softmax, Support, offsets_of
from grade_kernels.backends.torch.candidates import Candidates
from grade_kernels.backends.torch.products import product, weighted_sum
from grade_kernels.dtypes import compute_dtype
from grade_kernels.estimators import Rule, is_noisy
from grade_kernels.noise import (
    DOMAIN_GUMBEL,
    DOMAIN_REFINE,
    DOMAIN_SUPPORT,
    gumbel_from_words,
    posterior_domain,
    uniform_from_words,
)

__all__ = ["TorchBackend"]


class _Scores:
    """l + g of one chunk of columns at a time, in compute precision.

    Args:
        noise: of the rows.
        rows: how many.
        device: of the rows.
    """

    def __init__(self, noise: Noise, rows: int, device: torch.device) -> None:
        self.rows, self.drawn, self.given = rows, noise.on(rows, device), noise.posterior
        self.domains = (DOMAIN_GUMBEL, DOMAIN_REFINE)
        if self.given is not None:
            first = posterior_domain(self.given.draw)
            self.domains = (first, first + 1)

    def chunk(self, columns: slice, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores `[rows, columns]` of a chunk's logits, and the words that they were made of."""
        word, refinement = (
            self.drawn.words(self.rows, logits.shape[1], vocab_start=columns.start, domain=domain)
            for domain in self.domains
        )
        scores = logits + gumbel_from_words(word, refinement, logits.dtype)
        if self.given is not None and self.given.score_max is not None:
            largest, ids = self.given.score_max[:, None], self.given.ids[:, None]
            won = torch.arange(columns.start, columns.stop, device=logits.device) == ids
            scores = torch.where(won, largest, -torch.logaddexp(-largest, -scores))
        return scores, word


class _RowScores(_Scores):
    """The same of given logits."""

    def __init__(self, logits: torch.Tensor, noise: Noise) -> None:
        super().__init__(noise, len(logits), logits.device)
        self.logits, self.dtype = logits, compute_dtype(logits.dtype)

    def of(self, columns: slice) -> torch.Tensor:
        """Scores of a chunk."""
        return self.chunk(columns, self.logits[:, columns].to(self.dtype))[0]


class TorchBackend(Backend):
    """Every function of the interface in plain PyTorch, on every device, for all four dtypes."""

    name = "torch"

    @override
    def why_unavailable(self) -> str | None:
        return None

    @override
    def why_not_device(self, device: torch.device) -> str | None:
        return None

    @override
    def serves(self, *dtypes: torch.dtype, head: bool) -> bool:
        return True

    # Rows of given logits

    @override
    def sample(self, logits: torch.Tensor, noise: Noise, logsumexp: bool) -> Sample:
        rows, vocab = logits.shape
        scores = _RowScores(logits, noise)
        score_max = torch.full((rows,), -torch.inf, dtype=scores.dtype, device=logits.device)
        ids = torch.zeros(rows, dtype=torch.int64, device=logits.device)
        sums = LogSumExp(rows, logits)
        for columns in self.column_chunks(rows, vocab):
            best, where = scores.of(columns).max(dim=1)
            # NaN wins every later comparison, as in torch.max.
            better = ~(best <= score_max) & ~score_max.isnan()
            ids = torch.where(better, where + columns.start, ids)
            score_max = torch.where(better, best, score_max)
            if logsumexp:
                sums.update(logits[:, columns].to(scores.dtype))
        bad = ~score_max.isfinite()
        if logits.device.type == "cpu":
            ids = torch.where(bad, -1, ids)
        else:
            score_max = torch.where(bad, torch.nan, score_max)
        if not logsumexp:
            return Sample(ids, score_max, score_max.new_empty(0), score_max.new_empty(0))
        return Sample(ids, score_max, sums.max, sums.total)

    @override
    def one_hot(self, sample: Sample, vocab: int, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        rows, device = sample.ids.shape[0], sample.ids.device
        out = torch.zeros(rows, vocab, dtype=dtype, device=device) if out is None else out.zero_()
        # On CPUs scatter_ reads and writes the whole of a tensor in 16 bits.
        out[torch.arange(rows, device=out.device), sample.ids] = 1.0
        return out if out.device.type == "cpu" else out.masked_fill_(sample.score_max.isnan()[:, None], torch.nan)

    @override
    def softmax(
        self,
        rows: Rows,
        score_max: torch.Tensor,
        *,
        normalize: bool,
        dtype: torch.dtype,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits, tau = flat(rows.logits), rows.tau[:, None]
        scores = _RowScores(logits, rows.noise)
        out = torch.empty(rows.logits.shape, dtype=dtype, device=logits.device) if out is None else out
        total = torch.zeros(len(logits), dtype=scores.dtype, device=logits.device)

        def chunk(columns: slice) -> torch.Tensor:
            return ((scores.of(columns) - score_max[:, None]) / tau).exp()

        with written_flat(out) as weights:
            for columns in self.column_chunks(*logits.shape):
                part = chunk(columns)
                total += part.sum(dim=1)
                weights[:, columns] = part
            if normalize:
                # Weights in 16 bits are rounded already; dividing them would round twice. So they are computed again.
                narrow = dtype != scores.dtype
                for columns in self.column_chunks(*logits.shape):
                    weights[:, columns] = (chunk(columns) if narrow else weights[:, columns]) / total[:, None]
        return out, total

    @override
    def softmax_backward(
        self, dy: torch.Tensor, rows: Rows, sample: Sample, rule: GradientRule, out: torch.Tensor
    ) -> torch.Tensor:
        logits, upstream, tau = flat(rows.logits), flat(dy), rows.tau
        scores = _RowScores(logits, rows.noise)
        noisy, reinmax = is_noisy(rule.estimator), rule.estimator == "reinmax"
        pivot = (sample.score_max if noisy else sample.logit_max)[:, None]
        sums, dtau = Rule(rule.estimator, tau[:, None], sample.ids[:, None]), torch.zeros_like(tau)

        def distance(columns: slice) -> torch.Tensor:
            """Argument of the relaxation's exponential, before the division by tau; its maximum is 0."""
            return (scores.of(columns) if noisy else logits[:, columns].to(scores.dtype)) - pivot

        def untempered(columns: slice) -> torch.Tensor:
            """softmax(l)."""
            return (logits[:, columns].to(scores.dtype) - sample.logit_max[:, None]).exp() / sample.logit_sum[:, None]

        for columns in self.column_chunks(*logits.shape):
            weights = (distance(columns) / sums.tau).exp()
            sums.measure(weights, upstream[:, columns].to(scores.dtype), untempered(columns) if reinmax else None)
        sums.settle(upstream.gather(1, sample.ids[:, None]).to(scores.dtype) if reinmax else None)
        with written_flat(out) as gradient:
            for columns in self.column_chunks(*logits.shape):
                height, dp = distance(columns), upstream[:, columns].to(scores.dtype, copy=True)
                p = (height / sums.tau).exp() / sums.total
                dl = sums.gradient(p, dp, columns, untempered(columns) if reinmax else None)
                if rule.needs_dtau and not reinmax:
                    dtau -= torch.where(p > 0, dl * height, 0.0).sum(dim=1) / tau
                if rule.dlogprobs is not None:
                    dl = sums.with_logprobs(dl, rule.dlogprobs[:, None], columns, untempered(columns))
                gradient[:, columns] = torch.where(logits[:, columns] == -torch.inf, 0.0, dl)
        return dtau

    # Through a head

    @override
    def head_sample(self, head: Head, noise: Noise) -> Sample:
        one = torch.ones(head.hidden.shape[0], dtype=compute_dtype(head.hidden.dtype), device=head.hidden.device)
        return self.head_scores(head, one, noise, 0.0)[0]

    @override
    def head_scores(
        self, head: Head, tau: torch.Tensor, noise: Noise, eps: float
    ) -> tuple[Sample, torch.Tensor, Support]:
        rows, vocab = head.hidden.shape[0], head.weight.shape[0]
        drawn = _Scores(noise, rows, head.hidden.device)
        tempered, untempered = LogSumExp(rows, head.hidden, tau), LogSumExp(rows, head.hidden)
        ids = torch.zeros(rows, dtype=torch.int64, device=head.hidden.device)
        candidates = Candidates(tempered, tau, eps, self.support_capacity(eps, vocab)) if eps > 0 else None
        for columns, logits in self.head_chunks(head):
            scores, word = drawn.chunk(columns, logits)
            best, where = scores.max(dim=1)
            ids = torch.where(~(best <= tempered.max), where + columns.start, ids)
            untempered.update(logits)
            weights, _ = tempered.update(scores)
            if candidates is not None:
                candidates.take(columns, weights, scores, uniform_from_words(word, logits.dtype))
            del scores, word, weights  # they would be held while the next chunk's noise is made, which takes the most
        # With posterior noise no score exceeds T, not even that of a logit of +inf.
        bad = ~(tempered.max.isfinite() & untempered.max.isfinite())
        support = Support.empty(rows, head.hidden) if candidates is None else candidates.support()
        if noise.posterior is not None:
            ids = noise.posterior.ids
        if head.hidden.device.type == "cpu":
            ids = torch.where(bad, -1, ids)
        score_max = torch.where(bad, torch.nan, tempered.max)
        return Sample(ids, score_max, untempered.max, untempered.total), tempered.total, support

    @override
    def head_softmax(
        self, head: Head, tau: torch.Tensor, noise: Noise, eps: float, ref: Head | None = None
    ) -> tuple[Softmax, Support]:
        rows, vocab = head.hidden.shape[0], head.weight.shape[0]
        drawn = noise.on(rows, head.hidden.device)
        sums, ref_sums = LogSumExp(rows, head.hidden, tau), LogSumExp(rows, head.hidden, tau)
        candidates = Candidates(sums, tau, eps, self.support_capacity(eps, vocab)) if eps > 0 else None
        ref_chunks: Iterator[tuple[slice, torch.Tensor]] | None = None if ref is None else self.head_chunks(ref)
        moment = torch.zeros_like(sums.total)
        for columns, logits in self.head_chunks(head):
            # The moment is that of logits relative to the maximum so far (with a reference: to the two maxima's difference).
            # When that pivot moves by d, the sum of weights * distance grows by d * (sum of weights).
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
                word = drawn.words(rows, logits.shape[1], vocab_start=columns.start, domain=DOMAIN_SUPPORT)
                candidates.take(columns, weights, logits, uniform_from_words(word, logits.dtype))
        support = Support.empty(rows, head.hidden) if candidates is None else candidates.support()
        moment /= sums.total
        if ref is None:
            empty = moment.new_empty(0)
            return Softmax(sums.max, sums.total, moment, empty, empty), support
        return Softmax(sums.max, sums.total, moment, ref_sums.max, ref_sums.total), support

    @override
    def head_logits_at(self, head: Head, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.gather_dot(head.hidden, head.weight, rows, tokens)
        if head.bias is not None:
            logits = logits + head.bias[tokens]
        return softcapped(logits, head.softcap)

    # Products with rows of a table

    @override
    def gather_dot(
        self, x: torch.Tensor, table: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        dtype = compute_dtype(torch.promote_types(x.dtype, table.dtype))
        out = torch.empty(len(tokens), dtype=dtype, device=x.device)
        step = max(1, self.sizes.gather // max(1, x.shape[1]))
        for i in range(0, len(tokens), step):
            part = slice(i, i + step)
            out[part] = (x[rows[part]].to(dtype) * table[tokens[part]].to(dtype)).sum(dim=1)
        return out

    @override
    def gather_sum(
        self, values: torch.Tensor, table: torch.Tensor, offsets: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        width = table.shape[1]
        out = torch.zeros(len(offsets) - 1, width, dtype=values.dtype, device=table.device)
        # What is gathered at a time is limited by taking blocks of columns. Taking blocks of entries would split a row's sum.
        step = max(1, self.sizes.gather // max(1, len(tokens)))
        for i in range(0, width, step):
            gathered = table[:, i : i + step][tokens].to(values.dtype) * values[:, None]
            out[:, i : i + step] = torch.segment_reduce(gathered, "sum", offsets=offsets, axis=0, initial=0)
        return out

    @override
    def scatter_sum(
        self, values: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor, table: torch.Tensor
    ) -> torch.Tensor:
        out = torch.zeros(table.shape[0], x.shape[1], dtype=table.dtype, device=table.device)
        if len(tokens) == 0:
            return out
        order, distinct, offsets = self.token_order(tokens, table.shape[0])
        out[distinct] = self.gather_sum(values[order], x, offsets, rows[order]).to(table.dtype)
        return out

    def token_order(self, tokens: torch.Tensor, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A stable order of entries by token, the tokens that occur, and `[distinct + 1]` where those of each begin."""
        order = tokens.argsort(stable=True)
        distinct, counts = torch.unique_consecutive(tokens[order], return_counts=True)
        return order, distinct, offsets_of(counts)

    @override
    def product(self, x: torch.Tensor, table: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return product(x, table, out, self.sizes.product)

    @override
    def weighted_sum(self, values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return weighted_sum(values, table, self.sizes.product)

    @override
    def exact_weights(self, dtype: torch.dtype) -> bool:
        return dtype == compute_dtype(dtype)

    @override
    def weight_terms(
        self, weights: torch.Tensor, dy: torch.Tensor, slope: torch.Tensor | None, out: torch.Tensor, sums: torch.Tensor
    ) -> torch.Tensor:
        total, dot = sums
        before = torch.where(total > 0, dot / total, 0.0)
        total += weights.sum(dim=1)
        dot += (weights * dy).sum(dim=1)
        mean = torch.where(total > 0, dot / total, 0.0)
        weighted, unweighted = out.unbind()
        scaled = weights if slope is None else weights * slope
        unweighted.copy_(scaled)
        weighted.copy_(scaled * (dy - mean[:, None]))
        return mean - before
