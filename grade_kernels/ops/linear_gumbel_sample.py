"""`linear_gumbel_sample`: sample through the LM head without its logits; for rollouts."""

from typing import NamedTuple

import torch

from grade_kernels import backends, reference
from grade_kernels.backends import Head, Noise, Sample
from grade_kernels.dtypes import compute_dtype
from grade_kernels.noise import GumbelNoise
from grade_kernels.ops import checks
from grade_kernels.ops.head import check_head, check_reference_rows
from grade_kernels.ops.registry import answered_by, operation, public

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
    drawn = checks.canonical_noise(noise, rows.shape[0], hidden.device)
    backend = backends.select(hidden.device, hidden.dtype, head=True)
    bias = None if bias is None else bias.detach()
    head = Head(rows, lm_head.detach(), bias, logit_softcap)
    ids, logprobs = _draw(_Draw(head, drawn, backend))
    return ids.view(batch), logprobs.view(batch)


class _Draw(NamedTuple):
    head: Head
    noise: Noise
    backend: str


class _Drawn(NamedTuple):
    ids: torch.Tensor  # [N]
    logprobs: torch.Tensor  # [N]


def chosen_logprobs(sample: Sample, chosen: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of tokens whose logits are `chosen`; NaN in a row without a distribution."""
    return (chosen - sample.logit_max) - sample.logit_sum.log() + (sample.score_max - sample.score_max)


def _kernel(draw: _Draw) -> _Drawn:
    backend, head = backends.get(draw.backend), draw.head.canonical()
    sample = backend.head_sample(head, draw.noise)
    if checks.reads_values(head.hidden):
        checks.check_head_rows((sample.ids < 0) | sample.score_max.isnan())
    rows = torch.arange(len(head.hidden), device=head.hidden.device)
    return _Drawn(sample.ids, chosen_logprobs(sample, backend.head_logits_at(head, rows, sample.ids)))


def _fake(draw: _Draw) -> _Drawn:
    hidden = draw.head.hidden
    ids = hidden.new_empty(len(hidden), dtype=torch.int64)
    return _Drawn(ids, hidden.new_empty(len(hidden), dtype=compute_dtype(hidden.dtype)))


def _by_reference(draw: _Draw) -> _Drawn:
    check_reference_rows(draw.head)
    hidden, weight, bias, softcap = draw.head
    noise = draw.noise.public()
    return _Drawn(*reference.linear_gumbel_sample(hidden, weight, bias=bias, logit_softcap=softcap, noise=noise))


_linear_gumbel_sample = operation("linear_gumbel_sample", _Draw, _Drawn, kernel=_kernel, fake=_fake)


@answered_by(_by_reference)
def _draw(draw: _Draw) -> _Drawn:
    return _linear_gumbel_sample(draw)
