"""Posterior noise in operations: the given tokens' scores, from which everything else follows."""

from __future__ import annotations

import torch

from grade_kernels.backends import Backend, Noise, Posterior, Rows, Sample
from grade_kernels.backends.layouts import flat
from grade_kernels.estimators import RAO
from grade_kernels.ops import checks

__all__ = ["log_normaliser", "looked_at", "posterior_draw", "relaxed_rows", "sampled_rows", "winning_scores"]


def winning_scores(noise: Noise, chosen: torch.Tensor, normaliser: torch.Tensor | None) -> torch.Tensor:
    """Scores `[N]` of given tokens, `T = logsumexp(l) - log E`; NaN where such a token is masked.

    Args:
        noise: whose posterior has the tokens.
        chosen: `[N]` compute, their logits.
        normaliser: `[N]`, `logsumexp(l)`. None: their log-probabilities are known.
    """
    given = noise.posterior
    assert given is not None
    if given.logprobs is not None:
        normaliser = chosen - given.logprobs.to(chosen.dtype)
    assert normaliser is not None
    return (normaliser - noise.log_exponential_at_ids(chosen.dtype)) + (chosen - chosen)


def log_normaliser(logit_max: torch.Tensor, logit_sum: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """`logsumexp(l)` `[N]` from a sample's statistics; NaN where the logit of the returned token, `chosen` `[N]`, is -inf."""
    return logit_max + logit_sum.log() + (chosen - chosen)


def posterior_draw(noise: Noise, ids: torch.Tensor, draw: int, normaliser: torch.Tensor) -> Noise:
    """A draw of posterior noise given these tokens `[N]`, for logits with this log-sum-exp `[N]`."""
    noise = noise._replace(posterior=Posterior(ids, None, draw))
    return noise.won_with(normaliser - noise.log_exponential_at_ids(normaliser.dtype))


def looked_at(noise: Noise, ids: torch.Tensor | None, estimator: str) -> Noise:
    """The noise whose tokens must not be masked: with `gumbel_rao` given ids are such tokens, too."""
    return noise if ids is None or estimator != RAO else noise._replace(posterior=Posterior(ids, None, 0))


def _chosen(rows: Rows) -> torch.Tensor:
    """The given tokens' logits, in compute precision."""
    given, (a, _, b) = rows.noise.posterior, rows.logits.shape
    assert given is not None
    return rows.logits.gather(1, given.ids.view(a, 1, b)).reshape(-1).to(rows.tau.dtype)


def _settled(rows: Rows, bad: torch.Tensor, normaliser: torch.Tensor | None) -> torch.Tensor:
    """Given tokens' scores; bad rows, and given tokens that are masked, raise or get NaN."""
    chosen = _chosen(rows)
    if checks.reads_values(rows.logits):
        checks.check_rows(flat(rows.logits), bad)
        checks.check_given_logits(chosen)
    return winning_scores(rows.noise, chosen, normaliser).masked_fill_(bad, torch.nan)


def relaxed_rows(backend: Backend, rows: Rows) -> Rows:
    """The rows as a backend relaxes them: where tokens are given, with their scores."""
    given = rows.noise.posterior
    if given is None:
        return rows
    checks.check_posterior_values(rows.noise, rows.logits.shape[1])
    if given.logprobs is not None:
        score_max = _settled(rows, ~rows.logits.amax(1).reshape(-1).isfinite(), None)
    else:
        score_max = sampled_rows(backend, rows).score_max
    return rows._replace(noise=rows.noise.won_with(score_max))


def sampled_rows(backend: Backend, rows: Rows) -> Sample:
    """The sample of rows, drawn or given, with the statistics of their logits. A row without a distribution raises."""
    logits, noise = flat(rows.logits), rows.noise
    if noise.posterior is not None:
        checks.check_posterior_values(noise, logits.shape[1])
    drawn = backend.sample(logits, noise.prior(), True)
    bad = (drawn.ids < 0) | drawn.score_max.isnan()
    if noise.posterior is None:
        if checks.reads_values(logits):
            checks.check_rows(logits, bad)
        return drawn
    score_max = _settled(rows, bad, drawn.logit_max + drawn.logit_sum.log())
    return drawn._replace(ids=noise.posterior.ids.clone(), score_max=score_max)
