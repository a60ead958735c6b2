"""`gumbel_sample`: an exact categorical sample by the Gumbel-max trick."""

from __future__ import annotations

import torch

from grade_kernels import backends, reference
from grade_kernels.noise import GumbelNoise
from grade_kernels.ops import checks
from grade_kernels.ops.registry import define, public
from grade_kernels.ops.transforms import serving, without_wrappers

__all__ = ["gumbel_sample"]


@public
def gumbel_sample(logits: torch.Tensor, dim: int = -1, *, noise: GumbelNoise | None = None) -> torch.Tensor:
    """Draw one token per row from `softmax(logits)`, as `argmax(logits + g)` with Gumbel noise g.

    Args:
        logits: `[..., V]` (V at `dim`), float32, float64, bfloat16 or float16. -inf masks a token. A 0-d tensor is one
            token, as for `torch.argmax`.
        dim: the vocabulary's dimension.
        noise: which noise to use. None draws a fresh seed from torch's default generator.

    Returns:
        int64 ids of the logits' shape without `dim`. No gradient.

    Raises:
        TypeError: logits that are no floating tensor; noise that is no GumbelNoise.
        ValueError: an empty vocabulary; row_ids of the wrong length; on CPU a row of NaN, +inf or only -inf.
        IndexError: dim out of range.

    Source: Maddison, Tarlow, Minka: A* sampling. NeurIPS 2014.
    """
    if isinstance(logits, torch.Tensor) and logits.dim() == 0:
        return gumbel_sample(logits.reshape(1), dim, noise=noise)
    dim = checks.check_logits(logits, dim)
    moved = logits.detach()
    if dim != -1:
        moved = moved.movedim(dim, -1)
    rows = moved.reshape(-1, moved.shape[-1])
    seed, row_ids, vocab_start = checks.canonical_noise(noise, rows.shape[0], logits.device)
    backend = serving(backends.select(logits.device, logits.dtype))
    if backend == "reference":
        noise = GumbelNoise(seed, row_ids, vocab_start=vocab_start)
        if checks.reads_values_here(rows):
            rows = without_wrappers(rows)
            checks.check_rows(rows, checks.bad_rows(rows))
        return reference.gumbel_sample(logits, dim, noise=noise)
    return _gumbel_sample(rows, seed, row_ids, vocab_start, backend).view(moved.shape[:-1])


def _kernel(
    logits: torch.Tensor, seed: torch.Tensor, row_ids: torch.Tensor | None, vocab_start: int, backend: str
) -> torch.Tensor:
    sample = backends.module(backend).sample(logits, seed, row_ids, vocab_start, False)
    if checks.reads_values(logits):
        checks.check_rows(logits, (sample.ids < 0) | sample.score_max.isnan())
    return sample.ids


def _fake(
    logits: torch.Tensor, seed: torch.Tensor, row_ids: torch.Tensor | None, vocab_start: int, backend: str
) -> torch.Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


_gumbel_sample = define(
    "gumbel_sample(Tensor logits, Tensor seed, Tensor? row_ids, SymInt vocab_start, str backend) -> Tensor",
    _kernel,
    _fake,
)
