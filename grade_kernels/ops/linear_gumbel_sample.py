"""`linear_gumbel_sample`: sample through the LM head without its logits; for rollouts."""

from __future__ import annotations

import torch

from grade_kernels import backends, reference
from grade_kernels.backends import Sample
from grade_kernels.noise import GumbelNoise
from grade_kernels.ops import checks
from grade_kernels.ops.head import check_head, check_reference_rows, make_head, select_backend
from grade_kernels.ops.registry import define, public
from grade_kernels.ops.transforms import serving

__all__ = ["linear_gumbel_sample"]


@public
def linear_gumbel_sample(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_softcap: float | None = None,
    noise: GumbelNoise | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row from `softmax(l)`, `l = softcap(hidden @ lm_head.T + bias)`, without graph.

    Args:
        hidden: `[..., H]`, float32, bfloat16, float16 or float64.
        lm_head: `[V, H]`, hidden's dtype.
        bias: `[V]`, optional; -inf masks a token.
        logit_softcap: c in `c * tanh(l / c)`, optional.
        noise: which noise to use. None draws a fresh seed from torch's default generator.

    Returns:
        ids int64 `[...]`, and their log-probabilities `[...]`, float32 (float64 for float64).

    Raises:
        TypeError: a tensor of a wrong type, hidden and lm_head of different dtypes, noise that is no GumbelNoise.
        ValueError: shapes that do not match (with both numbers), logit_softcap not positive, row_ids of the wrong
            length, tensors on different devices; on CPU a row without a distribution.
    """
    hidden, lm_head, bias = check_head(hidden, lm_head, bias, logit_softcap)
    batch = hidden.shape[:-1]
    rows = hidden.detach().reshape(-1, hidden.shape[-1])
    seed, row_ids, vocab_start = checks.canonical_noise(noise, rows.shape[0], hidden.device)
    backend = select_backend(serving(backends.select(hidden.device, hidden.dtype)), hidden.dtype)
    if backend == "reference":
        check_reference_rows(hidden, lm_head, bias, logit_softcap)
        noise = GumbelNoise(seed, row_ids, vocab_start=vocab_start)
        return reference.linear_gumbel_sample(hidden, lm_head, bias=bias, logit_softcap=logit_softcap, noise=noise)
    bias = None if bias is None else bias.detach()
    ids, logprobs = _linear_gumbel_sample(
        rows, lm_head.detach(), bias, logit_softcap, seed, row_ids, vocab_start, backend
    )
    return ids.view(batch), logprobs.view(batch)


def chosen_logprobs(sample: Sample, chosen: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of tokens whose logits are `chosen`; NaN in a row without a distribution."""
    return (chosen - sample.logit_max) - sample.logit_sum.log() + (sample.score_max - sample.score_max)


def _kernel(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    seed: torch.Tensor,
    row_ids: torch.Tensor | None,
    vocab_start: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    implementation = backends.module(backend)
    head = make_head(hidden, lm_head, bias, softcap)
    sample = implementation.head_sample(head, seed, row_ids, vocab_start)
    if checks.reads_values(hidden):
        checks.check_head_rows((sample.ids < 0) | sample.score_max.isnan())
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    return sample.ids, chosen_logprobs(sample, implementation.head_logits_at(head, rows, sample.ids))


def _fake(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    seed: torch.Tensor,
    row_ids: torch.Tensor | None,
    vocab_start: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = hidden.shape[0]
    return (
        hidden.new_empty(rows, dtype=torch.int64),
        hidden.new_empty(rows, dtype=checks.compute_dtype(hidden.dtype)),
    )


_linear_gumbel_sample = define(
    "linear_gumbel_sample(Tensor hidden, Tensor lm_head, Tensor? bias, float? softcap, Tensor seed, Tensor? row_ids, "
    "SymInt vocab_start, str backend) -> (Tensor, Tensor)",
    _kernel,
    _fake,
)
