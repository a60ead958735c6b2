"""`gumbel_sample`: an exact categorical sample by the Gumbel-max trick."""

from typing import NamedTuple

import torch

from grade_kernels import backends, reference
from grade_kernels.backends import Noise
from grade_kernels.noise import GumbelNoise
from grade_kernels.ops import checks
from grade_kernels.ops.registry import answered_by, operation, public

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
    drawn = checks.canonical_noise(noise, rows.shape[0], logits.device)
    backend = backends.select(logits.device, logits.dtype)
    return _draw(_Draw(rows, drawn, backend)).view(moved.shape[:-1])


class _Draw(NamedTuple):
    logits: torch.Tensor  # [N, V]
    noise: Noise
    backend: str


class _Drawn(NamedTuple):
    ids: torch.Tensor  # [N]


def _kernel(draw: _Draw) -> _Drawn:
    sample = backends.get(draw.backend).sample(draw.logits, draw.noise, False)
    if checks.reads_values(draw.logits):
        checks.check_rows(draw.logits, (sample.ids < 0) | sample.score_max.isnan())
    return _Drawn(sample.ids)


def _fake(draw: _Draw) -> _Drawn:
    return _Drawn(draw.logits.new_empty(draw.logits.shape[0], dtype=torch.int64))


def _by_reference(draw: _Draw) -> torch.Tensor:
    checks.check_for_reference(draw.logits)
    return reference.gumbel_sample(draw.logits, noise=draw.noise.public())


_gumbel_sample = operation("gumbel_sample", _Draw, _Drawn, kernel=_kernel, fake=_fake)


@answered_by(_by_reference)
def _draw(draw: _Draw) -> torch.Tensor:
    return _gumbel_sample(draw).ids
