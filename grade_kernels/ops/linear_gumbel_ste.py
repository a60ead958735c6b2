"""`linear_gumbel_ste`: sample through the LM head and embed the sample, with a backward that never sees the logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Generic

import torch
from typing_extensions import NamedTuple

from grade_kernels import backends, reference
from grade_kernels.backends import Head, Sample, Support
from grade_kernels.backends.torch.head import Scratch, empty_support, head_chunks, offsets_of
from grade_kernels.noise import GumbelNoise
from grade_kernels.ops import checks
from grade_kernels.ops.gumbel_ste_embedding import (
    joint_dtype,
    per_table,
    scatter_rows,
    weights_dtype,
    without_ignored,
)
from grade_kernels.ops.head import (
    Entries,
    HeadGradients,
    canonical_eps,
    check_head,
    check_reference_rows,
    fake_gradients,
    make_head,
    needs_graph,
    row_of_entries,
    row_sums,
    select_backend,
    softcap_slope,
)
from grade_kernels.ops.linear_gumbel_sample import chosen_logprobs
from grade_kernels.ops.registry import define, once_differentiable, public, wanted_gradients
from grade_kernels.ops.transforms import check_order, serving, without_wrappers
from grade_kernels.reference import Embedding, ignored_rows

__all__ = ["LinearGumbelSTE", "linear_gumbel_ste"]


class LinearGumbelSTE(NamedTuple, Generic[Embedding]):
    """Result of `linear_gumbel_ste`."""

    embedding: Embedding  # [..., D], one for each table
    ids: torch.Tensor  # [...] int64, the sampled tokens
    logprobs: torch.Tensor  # [...], log softmax(logits)[ids], untempered


@public
def linear_gumbel_ste(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    embedding: Embedding,
    tau: float | torch.Tensor = 1.0,
    *,
    bias: torch.Tensor | None = None,
    logit_softcap: float | None = None,
    estimator: str = "ste",
    noise: GumbelNoise | None = None,
    ids: torch.Tensor | None = None,
    ignore_index: int | None = None,
    eps: float = 2**-11,
) -> LinearGumbelSTE[Embedding]:
    """Sample tokens from a head's logits and return their embeddings, differentiable in hidden states, head and tables.

    What it computes is `gumbel_ste_embedding(softcap(hidden @ lm_head.T + bias), embedding, ...)`, estimators included,
    but `[N, V]` never exists, neither forward nor backward. Under transforms of `torch.func` and for forward-mode
    derivatives `grade_kernels.reference` serves the call, where it does. There is no second derivative, except under
    `use_backend("reference")`; `reinmax` has none anywhere.

    Args:
        hidden: `[..., H]`, float32, bfloat16, float16 or float64.
        lm_head: `[V, H]`, hidden's dtype.
        embedding: a table `[V, D]`, or a tuple of tables, all of which are looked up. Dtypes may differ.
        tau: temperature: a positive number, or a tensor with one value for all rows or one per row, as in
            `gumbel_softmax` for logits `[..., V]`. A tensor receives its gradient (`reinmax` defines none, so there it
            is zero).
        bias: `[V]`, optional; -inf masks a token.
        logit_softcap: c in `c * tanh(l / c)`, optional.
        estimator: `ste`, `soft`, `st` or `reinmax`; see `gumbel_ste_embedding`.
        noise: which noise to use. None draws a fresh seed from torch's default generator.
        ids: int64 `[...]`: return these tokens instead of sampled ones, with the same noise in the relaxation.
        ignore_index: rows of this id are ignored, as in `gumbel_ste_embedding`.
        eps: stochastic support: backward visits a token of probability p with probability `min(1, p / eps)`, about
            `2 / eps` tokens a row at most, and stays exactly unbiased. 0 is the dense, exact backward.

    Returns:
        `embedding` `[..., D]` in the table's dtype (a tuple for a tuple), `ids` int64 `[...]`, and
        `logprobs` `[...]`, float32 (float64 for float64), differentiable.

    Raises:
        TypeError: a tensor of a wrong type, hidden and lm_head of different dtypes, tau or eps that is no number, noise
            that is no GumbelNoise, ignore_index that is no int.
        ValueError: shapes that do not match (with both numbers), an unknown estimator, ids out of range, ignore_index
            without ids, eps outside [0, 1), tau or logit_softcap not positive and finite, row_ids of the wrong length,
            tensors on different devices; on CPU a row without a distribution.
    """
    hidden, lm_head, bias = check_head(hidden, lm_head, bias, logit_softcap)
    checks.check_estimator(estimator)
    eps = canonical_eps(eps)
    batch: tuple[int, ...] = hidden.shape[:-1]
    vocab = lm_head.shape[0]
    tables = checks.check_tables(embedding, vocab, hidden, "hidden")
    rows = hidden.reshape(-1, hidden.shape[-1])
    if ids is not None:
        checks.check_ids(ids, batch, hidden, "hidden")
    ignored, safe_ids, open_hidden = ignored_rows(ids, checks.canonical_ignore_index(ignore_index, ids), hidden)
    if ignored is not None and ids is not None:
        out = linear_gumbel_ste(
            open_hidden, lm_head, embedding, tau, bias=bias, logit_softcap=logit_softcap, estimator=estimator,
            noise=noise, ids=safe_ids, eps=eps,
        )  # fmt: skip
        return LinearGumbelSTE(*without_ignored(*out, ignored, ids))
    seed, row_ids, vocab_start = checks.canonical_noise(noise, rows.shape[0], hidden.device)
    row_tau = checks.canonical_tau(tau, (*batch, vocab), hidden.device, checks.compute_dtype(hidden.dtype))
    backend = serving(backends.select(hidden.device, hidden.dtype), hidden, lm_head, bias, row_tau, tables)
    backend = select_backend(backend, hidden.dtype)
    several = isinstance(embedding, (tuple, list))
    if backend == "reference":
        check_order(estimator)
        if checks.reads_values_here(row_tau):
            checks.check_tau_values(without_wrappers(row_tau))
        if ids is not None and checks.reads_values_here(ids):
            checks.check_ids_values(without_wrappers(ids.reshape(-1)), vocab)
        check_reference_rows(hidden, lm_head, bias, logit_softcap)
        noise = GumbelNoise(seed, row_ids, vocab_start=vocab_start)
        given: Any = tables if several else tables[0]
        return LinearGumbelSTE(
            *reference.linear_gumbel_ste(
                hidden,
                lm_head,
                given,
                row_tau.view(batch).unsqueeze(-1),
                bias=bias,
                logit_softcap=logit_softcap,
                estimator=estimator,
                noise=noise,
                ids=ids,
            )
        )
    collect = needs_graph(hidden, lm_head, bias, row_tau, *tables)
    flat_ids = None if ids is None else ids.reshape(-1)
    embedded, out_ids, logprobs = _linear_gumbel_ste(
        rows, lm_head, bias, logit_softcap, tables, row_tau, seed, row_ids, vocab_start, flat_ids,
        estimator, eps, collect, backend,
    )[:3]  # fmt: skip
    parts = per_table(embedded, tables, batch)
    result: Any = parts if several else parts[0]
    return LinearGumbelSTE(result, out_ids.view(batch), logprobs.view(batch))


class _Statistics(NamedTuple):
    """Rows of the statistics tensor that a forward pass saves; unused ones are zero."""

    score_max: torch.Tensor
    logit_max: torch.Tensor
    logit_sum: torch.Tensor  # sum(exp(l - logit_max))
    relaxed_sum: torch.Tensor  # the relaxation's own normaliser: of the scores, or of the logits at tau
    chosen: torch.Tensor  # logit of the token that was returned


def _kernel(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    tables: list[torch.Tensor],
    tau: torch.Tensor,
    seed: torch.Tensor,
    row_ids: torch.Tensor | None,
    vocab_start: int,
    ids: torch.Tensor | None,
    estimator: str,
    eps: float,
    collect: bool,
    backend: str,
) -> tuple[torch.Tensor, ...]:
    implementation = backends.module(backend)
    if checks.reads_values(tau):
        checks.check_tau_values(tau)
    if ids is not None and checks.reads_values(ids):
        checks.check_ids_values(ids, lm_head.shape[0])
    head = make_head(hidden, lm_head, bias, softcap)
    noise = (seed, row_ids, vocab_start)
    relaxed_sum = torch.zeros_like(tau)
    support, plain = (empty_support(hidden.shape[0], hidden) for _ in range(2))
    sparse = collect and eps > 0
    embedded = None
    if estimator == "soft":
        # The support that backward needs costs a pass of its own, which only backward pays.
        sample, relaxed_sum, embedded = _soft_lookup(implementation, head, tables, tau, *noise)
    elif collect and (estimator == "ste" or eps == 0):
        # For the dense backward, too, which takes this pass's product again; head_sample may round otherwise.
        sample, relaxed_sum, support = implementation.head_scores(head, tau, *noise, eps)
    else:
        sample = implementation.head_sample(head, *noise)
        if sparse and estimator in ("st", "reinmax"):
            sums, support = implementation.head_softmax(head, tau, *noise, eps, None)
            relaxed_sum = sums.total
            if estimator == "reinmax":
                plain = implementation.head_softmax(head, torch.ones_like(tau), *noise, eps, None)[1]
    if checks.reads_values(hidden):
        checks.check_head_rows((sample.ids < 0) | sample.score_max.isnan())
    ids = sample.ids if ids is None else ids.clone()
    rows = torch.arange(len(ids), device=ids.device)
    chosen = implementation.head_logits_at(head, rows, ids)
    if embedded is None:
        embedded = torch.cat([table[ids].to(joint_dtype(tables)) for table in tables], dim=1)
        if hidden.device.type != "cpu":  # a row without a distribution reads NaN
            embedded = embedded + (sample.score_max - sample.score_max).to(embedded.dtype)[:, None]
    statistics = torch.stack(_Statistics(sample.score_max, sample.logit_max, sample.logit_sum, relaxed_sum, chosen))
    return (
        embedded, ids, chosen_logprobs(sample, chosen), statistics,
        support.offsets, support.tokens, support.p, plain.offsets, plain.tokens, plain.p,
        support.overflow | plain.overflow,
    )  # fmt: skip


def _soft_lookup(
    implementation: Any,
    head: Head,
    tables: list[torch.Tensor],
    tau: torch.Tensor,
    seed: torch.Tensor,
    row_ids: torch.Tensor | None,
    vocab_start: int,
) -> tuple[Sample, torch.Tensor, torch.Tensor]:
    """`softmax((l + g) / tau) @ [E_1 E_2 ...]`, accumulated over chunks of the vocabulary as attention is over keys."""
    rows = len(tau)
    score_max, logit_max = (torch.full_like(tau, -torch.inf) for _ in range(2))
    total, logit_sum = torch.zeros_like(tau), torch.zeros_like(tau)
    ids = torch.full((rows,), -1, dtype=torch.int64, device=tau.device)
    sums = [torch.zeros(rows, table.shape[1], dtype=tau.dtype, device=tau.device) for table in tables]
    dtype = weights_dtype(tables, tau.dtype)
    scratch = Scratch(rows, dtype, tau.device)
    for columns, logits in head_chunks(head, implementation.product):
        part = implementation.sample(logits, seed, row_ids, vocab_start + columns.start, True)
        chunk_max = logits.amax(dim=1)
        # A chunk may be masked throughout; only a NaN or +inf in it makes the row bad.
        bad = chunk_max.isnan() | (chunk_max == torch.inf)
        best = torch.where(bad, torch.nan, torch.where(chunk_max == -torch.inf, -torch.inf, part.score_max))
        ids = torch.where(best > score_max, part.ids + columns.start, ids)
        raised = torch.where(best.isnan() | score_max.isnan(), torch.nan, torch.maximum(best, score_max))
        pivot = torch.where(raised == -torch.inf, 0.0, raised)
        scale = ((score_max - pivot) / tau).exp()
        score_max = raised
        weights, mass = implementation.softmax(
            logits, tau, seed, row_ids, vocab_start + columns.start, pivot, False, dtype, scratch(logits.shape[1])
        )
        total = total * scale + mass
        for acc, table in zip(sums, tables, strict=True):
            acc.mul_(scale[:, None]).add_(implementation.weighted_sum(weights, table[columns]))
        plain_max = torch.maximum(logit_max, chunk_max)
        pivot = torch.where(plain_max == -torch.inf, 0.0, plain_max)
        logit_sum = logit_sum * (logit_max - pivot).exp() + torch.where(
            chunk_max == -torch.inf, 0.0, part.logit_sum * (chunk_max - pivot).exp()
        )
        logit_max = plain_max
    embedded = [(acc / total[:, None]).to(table.dtype) for acc, table in zip(sums, tables, strict=True)]
    score_max = torch.where(score_max.isfinite(), score_max, torch.nan)
    sample = Sample(ids, score_max, logit_max, logit_sum)
    return sample, total, torch.cat([part.to(joint_dtype(tables)) for part in embedded], dim=1)


def _fake(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    tables: list[torch.Tensor],
    tau: torch.Tensor,
    seed: torch.Tensor,
    row_ids: torch.Tensor | None,
    vocab_start: int,
    ids: torch.Tensor | None,
    estimator: str,
    eps: float,
    collect: bool,
    backend: str,
) -> tuple[torch.Tensor, ...]:
    rows = hidden.shape[0]

    def entries(used: bool) -> Any:
        return torch.library.get_ctx().new_dynamic_size() if used else 0

    sparse = collect and eps > 0 and estimator != "soft"
    count, plain_count = entries(sparse), entries(sparse and estimator == "reinmax")

    def integers(size: Any) -> torch.Tensor:
        return tau.new_empty(size, dtype=torch.int64)

    return (
        hidden.new_empty(rows, sum(table.shape[1] for table in tables), dtype=joint_dtype(tables)),
        integers(rows), tau.new_empty(rows), tau.new_empty(5, rows),
        integers(rows + 1), integers(count), tau.new_empty(count),
        integers(rows + 1), integers(plain_count), tau.new_empty(plain_count),
        tau.new_empty(rows, dtype=torch.bool),
    )  # fmt: skip


class _Backward:
    """One backward pass: the estimator's rule, on the support of some rows and densely on the others."""

    def __init__(
        self,
        implementation: Any,
        gradients: HeadGradients,
        tables: list[torch.Tensor],
        upstream: list[torch.Tensor],
        tau: torch.Tensor,
        noise: tuple[torch.Tensor, torch.Tensor | None, int],
        ids: torch.Tensor,
        statistics: _Statistics,
        eps: float,
        wants_dtau: bool,
    ) -> None:
        self.implementation, self.gradients, self.head = implementation, gradients, gradients.head
        self.tables, self.upstream, self.tau, self.noise = tables, upstream, tau, noise
        self.ids, self.statistics, self.eps = ids, statistics, eps
        self.wants_dtau, self.dtau = wants_dtau, torch.zeros_like(tau)

    def dy(self, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """`dY` at single places."""
        total = torch.zeros(len(tokens), dtype=self.tau.dtype, device=self.tau.device)
        for upstream, table in zip(self.upstream, self.tables, strict=True):
            if total.dtype == torch.float64:  # tables may be narrower
                upstream = upstream.double()
            total += self.implementation.gather_dot(upstream, table, rows, tokens)
        return total

    def allowed(self, values: torch.Tensor) -> torch.Tensor:
        """Values `[N]` at the returned tokens; a given token that is masked gets exactly zero."""
        return torch.where(self.statistics.chosen == -torch.inf, 0.0, values)

    def relaxed(self, support: Support, factor: torch.Tensor, tempered: bool) -> Entries:
        """`factor * J(p) dY` on a support; unbiased, since each entry sees the mean without its own rounding."""
        rows, q = row_of_entries(support), support.p.clamp_min(self.eps)
        dy = self.dy(rows, support.tokens)
        mean = row_sums(q * dy, support)[rows] + (support.p - q) * dy
        values = factor[rows] * q * (dy - mean)
        if tempered:  # z - max(z) is log p up to a constant, which a gradient that sums to zero does not see
            self.dtau -= row_sums(values * support.p.log(), support)
        return Entries(rows, support.tokens, values, support.offsets)

    def reinmax(self, support: Support, plain: Support, sampled_p: torch.Tensor) -> list[Entries]:
        """`2 J((D + p) / 2) dY - J(softmax(l)) dY / 2`; the sampled token is always visited, at its exact value."""
        everyone = torch.arange(len(self.ids), device=self.ids.device)
        sampled_dy, sampled_weight = self.dy(everyone, self.ids), (1.0 + sampled_p) / 2
        rows = row_of_entries(support)
        others = support.tokens != self.ids[rows]
        p = torch.where(others, support.p, 0.0) / 2
        q = torch.where(others, support.p.clamp_min(self.eps), 0.0) / 2
        dy = self.dy(rows, support.tokens)
        mean = row_sums(q * dy, support) + sampled_weight * sampled_dy
        return [
            Entries(rows, support.tokens, 2 * q * (dy - mean[rows] - (p - q) * dy)),
            Entries(everyone, self.ids, self.allowed(2 * sampled_weight * (sampled_dy - mean))),
            self.relaxed(plain, torch.full_like(self.tau, -0.5), tempered=False),
        ]

    def dense(
        self, rows: torch.Tensor, estimator: str, dlogprobs: torch.Tensor | None, dtables: list[torch.Tensor | None]
    ) -> None:
        """The exact rule for some rows.

        The gradient of the logits is `p (dY - D)`, and D is known only at the end of the vocabulary. The gradient of
        the hidden states is linear in D, so where no other is asked for, one pass will do. Otherwise one pass finds the
        means and another makes the gradient.
        """
        tau, ids = self.tau[rows, None], self.ids[rows, None]
        upstream = [d[rows] for d in self.upstream]
        statistics = _Statistics(*(x[rows, None] for x in self.statistics))
        seed, row_ids, vocab_start = self.noise
        row_ids = rows if row_ids is None else row_ids[rows]
        noisy, reinmax = estimator in ("ste", "soft"), estimator == "reinmax"

        scratch = Scratch(len(rows), tau.dtype, tau.device)

        def weights(columns: slice, logits: torch.Tensor) -> torch.Tensor:
            """Unnormalised probabilities of the relaxation, until the next chunk's are asked for."""
            out = scratch(logits.shape[1])
            if noisy:
                noise, pivot = (seed, row_ids, vocab_start + columns.start), statistics.score_max.squeeze(1)
                return self.implementation.softmax(logits, tau.squeeze(1), *noise, pivot, False, out.dtype, out)[0]
            return torch.sub(logits, statistics.logit_max, out=out).div_(tau).exp_()

        def plain(logits: torch.Tensor) -> torch.Tensor:
            return (logits - statistics.logit_max).exp() / statistics.logit_sum

        scratches = [Scratch(len(rows), tau.dtype, tau.device) for _ in self.tables]

        def dy_chunk(columns: slice) -> torch.Tensor:
            parts = []
            for d, table, scratch in zip(upstream, self.tables, scratches, strict=True):
                parts.append(scratch(columns.stop - columns.start))
                if d.dtype == self.head.hidden.dtype and not self.implementation.exact_weights(d.dtype):
                    # Rounded as PyTorch does it: without a kernel that keeps more, more takes up to ten times as long.
                    parts[-1].copy_(self.implementation.product(d, table[columns]))
                else:
                    self.implementation.product(d, table[columns], parts[-1])
            return functools.reduce(torch.Tensor.add_, parts)

        # Where chunks of a sum are themselves rounded to less, two passes are the more exact.
        exact = self.implementation.exact_weights(self.head.weight.dtype)
        if exact and not (reinmax or self.gradients.needs[1] or self.gradients.needs[2]):
            self._dense_hidden(rows, estimator, dlogprobs, dtables, weights, plain, dy_chunk)
            return
        total, dot, plain_dot = (torch.zeros_like(tau) for _ in range(3))
        for columns, logits in head_chunks(
            self.head._replace(hidden=self.head.hidden[rows]), self.implementation.product
        ):
            part, dy = weights(columns, logits), dy_chunk(columns)
            total += part.sum(dim=1, keepdim=True)
            dot += (part * dy).sum(dim=1, keepdim=True)
            if reinmax:
                plain_dot += (plain(logits) * dy).sum(dim=1, keepdim=True)
        mean = dot / total
        if reinmax:
            mean = 0.5 * (mean + self.dy(rows, self.ids[rows])[:, None])
        dtau = torch.zeros_like(tau)

        def rule(columns: slice, logits: torch.Tensor) -> torch.Tensor:
            p, dy = weights(columns, logits).div_(total), dy_chunk(columns)
            if reinmax or dlogprobs is not None:
                hit = ids == torch.arange(columns.start, columns.stop, device=ids.device)
            if reinmax:
                dl = (p + hit) * (dy - mean) - 0.5 * plain(logits) * (dy - plain_dot)
            else:
                dl = dy.sub_(mean).mul_(p).div_(tau)
                if self.wants_dtau:
                    dtau.sub_(torch.where(p > 0, dl * p.log(), 0.0).sum(dim=1, keepdim=True))
            if dlogprobs is not None:
                dl = dl + dlogprobs[rows, None] * (hit.to(dl.dtype) - plain(logits))
            if estimator == "soft":
                for d, dtable in zip(upstream, dtables, strict=True):
                    if dtable is not None:
                        dtable[columns] += p.to(d.dtype).T @ d
            return torch.where(logits == -torch.inf, 0.0, dl)

        self.gradients.add_dense(rows, rule)
        self.dtau[rows] += dtau.squeeze(1)

    def _dense_hidden(
        self,
        rows: torch.Tensor,
        estimator: str,
        dlogprobs: torch.Tensor | None,
        dtables: list[torch.Tensor | None],
        weights: Callable[[slice, torch.Tensor], torch.Tensor],
        plain: Callable[[torch.Tensor], torch.Tensor],
        dy_chunk: Callable[[slice], torch.Tensor],
    ) -> None:
        """`dense` in one pass, for the gradients of hidden states, tau and, with `soft`, tables.

        What is summed counts dY from its mean so far, and sums are mended as the mean moves: so terms are nearly the
        gradient's own, and rounding them to bfloat16, if the head is, loses no more than rounding that would.
        """
        tau, head = self.tau[rows, None], self.head._replace(hidden=self.head.hidden[rows])
        moment, moment_dot = (torch.zeros_like(tau) for _ in range(2))
        totals = tau.new_zeros(2, len(rows))
        kinds = 2 if dlogprobs is None else 3
        sums = torch.zeros(kinds, len(rows), head.hidden.shape[1], dtype=tau.dtype, device=tau.device)
        # In float16 large terms would be infinite.
        dtype = head.weight.dtype if head.weight.dtype == torch.bfloat16 else tau.dtype
        scratch = Scratch(kinds * len(rows), dtype, tau.device)
        for columns, logits in head_chunks(head, self.implementation.product):
            stacked = scratch(logits.shape[1])
            terms = stacked.view(kinds, *logits.shape)
            part, dy = weights(columns, logits), dy_chunk(columns)
            slope = None if head.softcap is None else softcap_slope(logits, head.softcap)
            moved = self.implementation.weight_terms(part, dy, slope, terms[:2], totals)[:, None]
            if self.wants_dtau:
                logp = torch.where(part > 0, part.log(), 0.0)
                mean = torch.where(totals[0] > 0, totals[1] / totals[0], 0.0)[:, None]
                moment_dot += (part * (dy - mean) * logp).sum(dim=1, keepdim=True) - moved * moment
                moment += (part * logp).sum(dim=1, keepdim=True)
            if estimator == "soft":
                p = part / self.statistics.relaxed_sum[rows, None]
                for upstream, dtable in zip(self.upstream, dtables, strict=True):
                    if dtable is not None:
                        dtable[columns] += p.to(upstream.dtype).T @ upstream[rows]
            if self.gradients.hidden is None:
                continue
            if dlogprobs is not None:
                terms[2].copy_(plain(logits) if slope is None else plain(logits) * slope)
            sums[0] -= moved * sums[1]
            sums += self.implementation.weighted_sum(stacked, head.weight[columns]).view_as(sums)
        total = totals[0, :, None]
        self.dtau[rows] -= (moment_dot / (total * tau)).squeeze(1)
        if self.gradients.hidden is not None:
            self.gradients.hidden[rows] += sums[0] / (total * tau)
            if dlogprobs is not None:
                self.gradients.hidden[rows] -= dlogprobs[rows, None] * sums[2]
        if dlogprobs is not None:
            self.gradients.add_entries(Entries(rows, self.ids[rows], self.allowed(dlogprobs)[rows]))


def _backward_kernel(
    dembedded: torch.Tensor,
    dlogprobs: torch.Tensor | None,
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    tables: list[torch.Tensor],
    tau: torch.Tensor,
    seed: torch.Tensor,
    row_ids: torch.Tensor | None,
    vocab_start: int,
    ids: torch.Tensor,
    statistics: torch.Tensor,
    supports: list[torch.Tensor],
    overflow: torch.Tensor,
    estimator: str,
    eps: float,
    needs: list[bool],
    backend: str,
) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
    implementation = backends.module(backend)
    head = make_head(hidden, lm_head, bias, softcap)
    needs_head, needs_dtau, needs_tables = needs[:3], needs[3], needs[4:]
    widths = [table.shape[1] for table in tables]
    upstream = [part.to(table.dtype) for part, table in zip(dembedded.split(widths, dim=1), tables, strict=True)]
    gradients = HeadGradients(implementation, head, (needs_head[0], needs_head[1], needs_head[2]))
    saved = _Statistics(*statistics.unbind())
    noise = (seed, row_ids, vocab_start)
    step = _Backward(implementation, gradients, tables, upstream, tau, noise, ids, saved, eps, needs_dtau)
    support = Support(supports[0], supports[1], supports[2], overflow)
    plain = Support(supports[3], supports[4], supports[5], overflow)
    soft = estimator == "soft"
    through_logits = any(needs_head) or needs_dtau
    if eps > 0 and soft and (through_logits or any(needs_tables)):
        _, _, support = implementation.head_scores(head, tau, *noise, eps)
    if eps > 0 and dlogprobs is not None and estimator != "reinmax" and any(needs_head):
        _, plain = implementation.head_softmax(head, torch.ones_like(tau), *noise, eps, None)
    overflow = support.overflow | plain.overflow
    dense = torch.arange(len(tau), device=tau.device) if eps == 0 else overflow.nonzero().squeeze(1)
    if eps > 0 and len(dense):
        support, plain = (_without(rows, overflow) for rows in (support, plain))
    if eps > 0 and through_logits:
        if estimator == "reinmax":
            sampled_p = ((saved.chosen - saved.logit_max) / tau).exp() / saved.relaxed_sum
            parts = step.reinmax(support, plain, sampled_p)
        else:
            parts = [step.relaxed(support, 1.0 / tau, tempered=True)]
        if dlogprobs is not None:
            rows = row_of_entries(plain)
            parts.append(Entries(rows, plain.tokens, -dlogprobs[rows] * plain.p.clamp_min(eps)))
            parts.append(Entries(torch.arange(len(ids), device=ids.device), ids, step.allowed(dlogprobs)))
        entries = Entries.joined(parts)
        if len(dense):
            entries = entries._replace(values=torch.where(overflow[entries.rows], 0.0, entries.values))
        gradients.add_entries(entries)
    dtables: list[torch.Tensor | None] = []
    for part, table, needed in zip(upstream, tables, needs_tables, strict=True):
        if not needed:
            dtables.append(None)
        elif not soft:
            dtables.append(scatter_rows(part, ids, table))
        else:
            q = support.p.clamp_min(eps)
            dtables.append(implementation.scatter_sum(q, part, row_of_entries(support), support.tokens, table))
    if len(dense) and (through_logits or (soft and any(needs_tables))):
        step.dense(dense, estimator, dlogprobs, dtables)
    return (
        gradients.results(bias),
        step.dtau if needs_dtau and estimator != "reinmax" else torch.zeros_like(tau),
        [table.new_empty(0) if d is None else d for d, table in zip(dtables, tables, strict=True)],
    )


def _without(support: Support, rows: torch.Tensor) -> Support:
    """A support without the entries of the marked rows."""
    kept = ~rows[row_of_entries(support)]
    counts = torch.where(rows, 0, support.offsets.diff())
    return Support(offsets_of(counts), support.tokens[kept], support.p[kept], rows)


def _backward_fake(
    dembedded: torch.Tensor,
    dlogprobs: torch.Tensor | None,
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    tables: list[torch.Tensor],
    tau: torch.Tensor,
    seed: torch.Tensor,
    row_ids: torch.Tensor | None,
    vocab_start: int,
    ids: torch.Tensor,
    statistics: torch.Tensor,
    supports: list[torch.Tensor],
    overflow: torch.Tensor,
    estimator: str,
    eps: float,
    needs: list[bool],
    backend: str,
) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
    return (
        fake_gradients(hidden, lm_head, bias, needs[:3]),
        torch.empty_like(tau, memory_format=torch.contiguous_format),
        [torch.empty_like(t) if needed else t.new_empty(0) for t, needed in zip(tables, needs[4:], strict=True)],
    )


_linear_gumbel_ste = define(
    "linear_gumbel_ste(Tensor hidden, Tensor lm_head, Tensor? bias, float? softcap, Tensor[] tables, Tensor tau, "
    "Tensor seed, Tensor? row_ids, SymInt vocab_start, Tensor? ids, str estimator, float eps, bool collect, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _kernel,
    _fake,
)
_linear_gumbel_ste_backward = define(
    "linear_gumbel_ste_backward(Tensor dembedded, Tensor? dlogprobs, Tensor hidden, Tensor lm_head, Tensor? bias, "
    "float? softcap, Tensor[] tables, Tensor tau, Tensor seed, Tensor? row_ids, SymInt vocab_start, Tensor ids, "
    "Tensor statistics, Tensor[] supports, Tensor overflow, str estimator, float eps, bool[] needs, str backend) "
    "-> (Tensor[], Tensor, Tensor[])",
    _backward_kernel,
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, lm_head, bias, ctx.softcap, tables, tau, seed, row_ids, ctx.vocab_start, _, *rest = inputs
    ctx.estimator, ctx.eps, _, ctx.backend = rest
    ctx.save_for_backward(hidden, lm_head, bias, tau, seed, row_ids, output[1], *output[3:], *tables)
    ctx.mark_non_differentiable(output[1], *output[3:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dembedded: torch.Tensor | None, *rest: torch.Tensor | None) -> tuple[Any, ...]:
    hidden, lm_head, bias, tau, seed, row_ids, ids, statistics, *saved = ctx.saved_tensors
    supports, overflow, tables = saved[:6], saved[6], saved[7:]
    dlogprobs = rest[1]
    if dembedded is None and dlogprobs is None:
        return *(None,) * 4, [None] * len(tables), *(None,) * 9
    if dembedded is None:
        width = sum(table.shape[1] for table in tables)
        dembedded = torch.zeros(hidden.shape[0], width, dtype=joint_dtype(tables), device=hidden.device)
    needed = ctx.needs_input_grad
    inputs = [hidden, lm_head, bias, *tables, tau]
    *needs, needs_tau = wanted_gradients(ctx, inputs, [*needed[:3], *needed[4], needed[5]])
    needs.insert(3, needs_tau)
    dhead, dtau, dtables = _linear_gumbel_ste_backward(
        dembedded, dlogprobs, hidden, lm_head, bias, ctx.softcap, tables, tau, seed, row_ids, ctx.vocab_start, ids,
        statistics, supports, overflow, ctx.estimator, ctx.eps, needs, ctx.backend,
    )  # fmt: skip
    return (
        *(gradient if wanted else None for gradient, wanted in zip(dhead, needs[:3], strict=True)),
        None,
        [gradient if wanted else None for gradient, wanted in zip(dtables, needs[4:], strict=True)],
        dtau if needs[3] else None,
        *(None,) * 8,
    )


torch.library.register_autograd("grade_kernels::linear_gumbel_ste", _backward, setup_context=_setup_context)
once_differentiable("linear_gumbel_ste_backward")
