"""The backward pass: the estimator's rule on the support of some rows, and densely for the others."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from grade_kernels import backends
from grade_kernels.estimators import RAO
from grade_kernels.ops import tables
from grade_kernels.ops.head_gradients import Entries, HeadGradients
from grade_kernels.ops.linear_gumbel_ste.dense import DenseRows
from grade_kernels.ops.linear_gumbel_ste.records import Draw, Gradients, Kept, Statistics
from grade_kernels.ops.linear_gumbel_ste.sparse import SparseRows
from grade_kernels.ops.linear_gumbel_ste.upstream import Upstream
from grade_kernels.ops.posterior import log_normaliser, posterior_draw
from grade_kernels.ops.tables import Embedded

__all__ = ["backward"]


def backward(
    draw: Draw, kept: Kept, arrived: Embedded[torch.Tensor | None], wanted: Gradients[bool]
) -> Gradients[torch.Tensor | None]:
    """Gradients of the head's tensors, the tables and tau, those that are wanted."""
    backend, tau, eps, ids, dlogprobs = backends.get(draw.backend), draw.tau, draw.eps, arrived.ids, arrived.logprobs
    head, soft = draw.head.canonical(), draw.estimator == "soft"
    gradients, dtau = HeadGradients(backend, head, wanted.head), torch.zeros_like(tau)
    upstream = Upstream(backend, tables.upstream(arrived.embedded, len(tau), draw.tables), draw.tables, tau.dtype)
    statistics = Statistics(*kept.statistics.unbind())
    draw = draw._replace(noise=draw.noise.won_with(statistics.score_max))
    support, untempered = kept.support, kept.untempered
    through_logits = any(wanted.head) or wanted.tau
    if eps > 0 and soft and (through_logits or any(wanted.tables)):
        _, _, support = backend.head_scores(head, tau, draw.noise, eps)
    if eps > 0 and dlogprobs is not None and draw.estimator != "reinmax" and any(wanted.head):
        _, untempered = backend.head_softmax(head, torch.ones_like(tau), draw.noise, eps)
    # A row that overflowed in one of its supports takes the dense backward as a whole. So what it has in the other support
    # must not count as well.
    draws = len(support.overflow) // max(1, len(tau))
    overflow = support.overflow.view(draws, len(tau)).any(0) | untempered.overflow
    dense = torch.arange(len(tau), device=tau.device) if eps == 0 else overflow.nonzero().squeeze(1)
    if eps > 0 and len(dense):
        support, untempered = support.without(overflow.repeat(draws)), untempered.without(overflow)
    if eps > 0 and through_logits:
        sparse = SparseRows(upstream, tau, ids, statistics, eps, dtau)
        parts = sparse.entries(draw.estimator, support, untempered, dlogprobs)
        entries = Entries.joined(parts)
        if len(dense):  # entries of the sampled tokens are there for every row, also for those that overflowed
            entries = entries._replace(values=torch.where(overflow[entries.rows], 0.0, entries.values))
        gradients.add_entries(entries)
    dtables: list[torch.Tensor | None] = []
    for part, table, needed in zip(upstream.parts, draw.tables, wanted.tables, strict=True):
        if not needed:
            dtables.append(None)
        elif not soft:
            dtables.append(tables.scatter_rows(part, ids, table))
        else:
            q = support.p.clamp_min(eps)
            dtables.append(backend.scatter_sum(q, part, support.rows(), support.tokens, table))
    if len(dense) and (through_logits or (soft and any(wanted.tables))):
        for one, share, of in _dense_parts(draw, upstream, ids, statistics):
            DenseRows(one, dense, gradients, share, ids, of, dlogprobs).add(dtau if wanted.tau else None, dtables)
            dlogprobs = None  # it counts once
    return Gradients(gradients.results(draw.head.bias), dtables, dtau)


def _dense_parts(
    draw: Draw, upstream: Upstream, ids: torch.Tensor, statistics: Statistics
) -> Iterator[tuple[Draw, Upstream, Statistics]]:
    """What the dense backward is taken of, one after the other: with `gumbel_rao` its draws, each with its share of dY."""
    if draw.estimator != RAO:
        yield draw, upstream, statistics
        return
    share = upstream.scaled(1.0 / draw.draws)
    normaliser = log_normaliser(statistics.logit_max, statistics.logit_sum, statistics.chosen)
    for m in range(draw.draws):
        noise = posterior_draw(draw.noise, ids, m, normaliser)
        assert noise.posterior is not None
        assert noise.posterior.score_max is not None
        yield (
            draw._replace(estimator="ste", noise=noise), share, statistics._replace(score_max=noise.posterior.score_max)
        )  # fmt: skip
