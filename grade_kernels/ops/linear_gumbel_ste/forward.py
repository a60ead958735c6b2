"""The forward pass: sample, look up, and keep what backward needs."""

from __future__ import annotations

import torch

from grade_kernels import backends, reference
from grade_kernels.backends import Backend, Head, Noise, Rows, Sample, Support
from grade_kernels.backends.chunks import Scratch
from grade_kernels.backends.log_sum_exp import LogSumExp
from grade_kernels.estimators import RAO
from grade_kernels.ops import checks, tables
from grade_kernels.ops.head import check_reference_rows, fake_support
from grade_kernels.ops.linear_gumbel_sample import chosen_logprobs
from grade_kernels.ops.linear_gumbel_ste.records import Draw, Kept, Statistics
from grade_kernels.ops.posterior import log_normaliser, looked_at, posterior_draw, winning_scores
from grade_kernels.ops.tables import Embedded
from grade_kernels.ops.transforms import check_order
from grade_kernels.reference import GumbelSTEEmbedding

__all__ = ["by_reference", "fake", "kernel"]


def kernel(draw: Draw) -> tuple[Embedded[torch.Tensor], Kept]:
    """The table of passes of this package's docstring."""
    backend, head, tau, ids, eps = backends.get(draw.backend), draw.head.canonical(), draw.tau, draw.ids, draw.eps
    if checks.reads_values(tau):
        checks.check_tau_values(tau)
    if ids is not None and checks.reads_values(ids):
        checks.check_ids_values(ids, head.weight.shape[0])
    rows = head.hidden.shape[0]
    relaxed_sum = torch.zeros_like(tau)
    support, untempered = (Support.empty(rows, head.hidden) for _ in range(2))
    embedded = None
    noise, given = _with_given(backend, head, draw)
    if draw.estimator == "soft":
        sample, relaxed_sum, embedded = _soft_lookup(backend, head, draw._replace(noise=noise))
    elif draw.wants_support and (draw.estimator == "ste" or (eps == 0 and noise.posterior is None)):
        sample, relaxed_sum, support = backend.head_scores(head, tau, noise, eps)
    else:
        sample = backend.head_sample(head, noise) if given is None else given
        if draw.wants_support and eps > 0 and draw.estimator != RAO:
            sums, support = backend.head_softmax(head, tau, draw.noise, eps)
            relaxed_sum = sums.total
            if draw.estimator == "reinmax":
                _, untempered = backend.head_softmax(head, torch.ones_like(tau), draw.noise, eps)
    if checks.reads_values(head.hidden):
        checks.check_head_rows((sample.ids < 0) | sample.score_max.isnan())
    ids = sample.ids if ids is None else ids.clone()
    chosen = backend.head_logits_at(head, torch.arange(rows, device=ids.device), ids)
    if draw.estimator == RAO:
        if checks.reads_values(chosen):
            checks.check_given_logits(chosen, "ids")
        if draw.wants_support and eps > 0:
            normaliser = log_normaliser(sample.logit_max, sample.logit_sum, chosen)
            noises = (posterior_draw(noise, ids, m, normaliser) for m in range(draw.draws))
            support = Support.joined([backend.head_scores(head, tau, given, eps)[2] for given in noises])
    if embedded is None:
        embedded = tables.look_up(draw.tables, ids, sample.score_max - sample.score_max)
    statistics = torch.stack(Statistics(sample.score_max, sample.logit_max, sample.logit_sum, relaxed_sum, chosen))
    return Embedded(embedded, ids, chosen_logprobs(sample, chosen)), Kept(statistics, support, untempered)


def _with_given(backend: Backend, head: Head, draw: Draw) -> tuple[Noise, Sample | None]:
    """The noise, of which backends learn the given tokens' scores if there are any; then the sample, if no pass makes it.

    The logits' log-sum-exp takes a pass of its own where the tokens' log-probabilities are not known, or where the
    relaxation's pass, which would find it as well, does not run.
    """
    given, tau = draw.noise.posterior, draw.tau
    if given is None:
        return draw.noise, None
    checks.check_posterior_values(draw.noise, len(head.weight))
    chosen = backend.head_logits_at(head, torch.arange(len(tau), device=tau.device), given.ids)
    relaxes, sums, normaliser = draw.estimator == "soft" or (draw.estimator == "ste" and draw.wants_support), None, None
    if given.logprobs is None or not relaxes:
        sums, _ = backend.head_softmax(head, torch.ones_like(tau), draw.noise, 0.0)
        normaliser = sums.logit_max + sums.total.log()
    score_max = winning_scores(draw.noise, chosen, normaliser)
    if normaliser is not None:
        score_max = score_max + (normaliser - normaliser)  # NaN in a row without a distribution
    if checks.reads_values(chosen):
        if normaliser is not None:
            checks.check_head_rows(~normaliser.isfinite())
        checks.check_given_logits(chosen)
    noise = draw.noise.won_with(score_max)
    if relaxes or sums is None:
        return noise, None
    return noise, Sample(given.ids.clone(), score_max, sums.logit_max, sums.total)


def _soft_lookup(backend: Backend, head: Head, draw: Draw) -> tuple[Sample, torch.Tensor, torch.Tensor]:
    """`softmax((l + g) / tau) @ [E_1 E_2 ...]`, accumulated over chunks of the vocabulary as attention is over keys."""
    tau, rows = draw.tau, len(draw.tau)
    score_max, total, untempered = torch.full_like(tau, -torch.inf), torch.zeros_like(tau), LogSumExp(rows, tau)
    ids = torch.full((rows,), -1, dtype=torch.int64, device=tau.device)
    given = draw.noise.posterior
    if given is not None and given.score_max is not None:  # nothing will exceed it
        ids, score_max = given.ids.clone(), given.score_max
    sums = [torch.zeros(rows, table.shape[1], dtype=tau.dtype, device=tau.device) for table in draw.tables]
    dtype = tables.weights_dtype(draw.tables, tau.dtype)
    scratch = Scratch(rows, dtype, tau.device)
    for columns, logits in backend.head_chunks(head):
        noise = draw.noise.at(columns)
        if given is None:
            part = backend.sample(logits, noise, True)
            chunk_max = logits.amax(dim=1)
            # A chunk may be masked throughout; only a NaN or +inf in it makes the row bad.
            bad = chunk_max.isnan() | (chunk_max == torch.inf)
            best = torch.where(bad, torch.nan, torch.where(chunk_max == -torch.inf, -torch.inf, part.score_max))
            ids = torch.where(best > score_max, part.ids + columns.start, ids)
            raised = torch.where(best.isnan() | score_max.isnan(), torch.nan, torch.maximum(best, score_max))
            untempered.merge(chunk_max, part.logit_sum)
        else:
            raised = score_max
            untempered.update(logits)
        pivot = torch.where(raised == -torch.inf, 0.0, raised)
        scale = ((score_max - pivot) / tau).exp()
        score_max = raised
        weights = scratch(logits.shape[1])
        of_chunk = Rows.of(logits, tau, noise)
        _, mass = backend.softmax(of_chunk, pivot, normalize=False, dtype=dtype, out=weights.unsqueeze(2))
        total = total * scale + mass
        for acc, table in zip(sums, draw.tables, strict=True):
            acc.mul_(scale[:, None]).add_(backend.weighted_sum(weights, table[columns]))
    embedded = [(acc / total[:, None]).to(table.dtype) for acc, table in zip(sums, draw.tables, strict=True)]
    score_max = torch.where(score_max.isfinite() & untempered.max.isfinite(), score_max, torch.nan)
    sample = Sample(ids, score_max, untempered.max, untempered.total)
    return sample, total, tables.joined(embedded, draw.tables)


def fake(draw: Draw) -> tuple[Embedded[torch.Tensor], Kept]:
    """Results without data; a support's size depends on values where there is one."""
    rows, tau = draw.head.hidden.shape[0], draw.tau
    sparse = draw.wants_support and draw.eps > 0 and draw.estimator != "soft"
    found = Embedded(tables.empty(rows, draw.tables), tau.new_empty(rows, dtype=torch.int64), tau.new_empty(rows))
    support, untempered = (
        fake_support(rows * draw.draws if sparse else rows, tau, sparse),
        fake_support(rows, tau, sparse and draw.estimator == "reinmax"),
    )
    return found, Kept(tau.new_empty(len(Statistics._fields), rows), support, untempered)


def by_reference(draw: Draw) -> GumbelSTEEmbedding[tuple[torch.Tensor, ...]]:
    """`reference.linear_gumbel_ste`, whose gradient is exact at every eps."""
    hidden, weight, bias, softcap = draw.head
    check_order(draw.estimator)
    checks.check_for_reference(None, draw.tau, draw.ids, weight.shape[0])
    check_reference_rows(draw.head, noise=looked_at(draw.noise, draw.ids, draw.estimator), ids=draw.ids)
    return reference.linear_gumbel_ste(
        hidden, weight, tuple(draw.tables), draw.tau.unsqueeze(-1), bias=bias, logit_softcap=softcap,
        estimator=draw.estimator, noise=draw.noise.public_of(draw.tau.shape), ids=draw.ids, draws=draw.draws,
    )  # fmt: skip
