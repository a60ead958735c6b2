"""`gumbel_softmax` and `gumbel_ste`: relaxed and straight-through samples over the whole vocabulary."""

from __future__ import annotations

import warnings
from typing import Generic, TypeVar

import torch
from typing_extensions import NamedTuple

from grade_kernels import backends, reference
from grade_kernels.backends import Noise, Sample
from grade_kernels.dtypes import compute_dtype
from grade_kernels.noise import GumbelNoise
from grade_kernels.ops import checks
from grade_kernels.ops.differentiable import differentiable
from grade_kernels.ops.registry import answered_by, public

__all__ = ["gumbel_softmax", "gumbel_ste"]

T = TypeVar("T")


@public
def gumbel_softmax(
    logits: torch.Tensor,
    tau: float | torch.Tensor = 1.0,
    hard: bool = False,
    eps: float = 1e-10,
    dim: int = -1,
    *,
    noise: GumbelNoise | None = None,
) -> torch.Tensor:
    """Sample from the Gumbel-softmax distribution; a drop-in for `torch.nn.functional.gumbel_softmax`.

    Computes `y = softmax((logits + g) / tau)`. With `hard` the result is exactly `one_hot(argmax(logits + g))` and the
    gradient is that of y (straight-through). Saved for backward: the inputs and one number per row. Under transforms of
    `torch.func` and for forward-mode and second derivatives, `grade_kernels.reference` serves the call.

    Args:
        logits: `[..., V]` (V at `dim`), float32, float64, bfloat16 or float16. -inf masks a token. A 0-d tensor is one
            token.
        tau: temperature: a positive number, or a tensor with one value for all rows or one per row: of the logits' shape
            without `dim`, or one that broadcasts to the logits with size 1 at `dim`. It receives its gradient.
        hard: return the one-hot sample.
        eps: without effect, as in PyTorch.
        dim: the vocabulary's dimension.
        noise: which noise to use. None draws a fresh seed from torch's default generator.

    Returns:
        A contiguous tensor of the logits' shape and dtype.

    Raises:
        TypeError: logits that are no floating tensor, tau that is no number, noise that is no GumbelNoise.
        ValueError: an empty vocabulary; tau not positive and finite, of a wrong shape, or of one that PyTorch would
            broadcast to a value per token (`[4]` for logits `[4, 4]`); row_ids of the wrong length;
            tensors on different devices; on CPU a row of NaN, +inf or only -inf.
        IndexError: dim out of range.

    Source: Jang, Gu, Poole: Categorical reparameterization with Gumbel-softmax. ICLR 2017.
    """
    if eps != 1e-10:
        warnings.warn("`eps` parameter is deprecated and has no effect.", stacklevel=2)
    if isinstance(logits, torch.Tensor) and logits.dim() == 0:
        return gumbel_softmax(logits.reshape(1), tau, hard, dim=dim, noise=noise).reshape(())
    dim = checks.check_logits(logits, dim)
    moved = logits.movedim(dim, -1)
    num_rows = logits.numel() // moved.shape[-1]
    drawn = checks.canonical_noise(noise, num_rows, logits.device)
    row_tau = checks.canonical_tau(tau, logits.shape, logits.device, compute_dtype(logits.dtype), dim)
    backend = backends.select(logits.device, logits.dtype)
    return _relax(_Draw(logits, row_tau, drawn, dim, hard, backend))


@public
def gumbel_ste(
    logits: torch.Tensor, tau: float | torch.Tensor = 1.0, dim: int = -1, *, noise: GumbelNoise | None = None
) -> torch.Tensor:
    """One-hot sample of the logits' shape with straight-through backward: `gumbel_softmax(hard=True)`.

    Arguments, errors and source as in `gumbel_softmax`.
    """
    return gumbel_softmax(logits, tau, hard=True, dim=dim, noise=noise)


# Kernels take `[N, V]`, which may need a copy of the logits. If the operation took those, the copy would be saved for
# backward. So the operation takes the caller's logits, of any shape and with V at dim.


def _rows(x: torch.Tensor, dim: int) -> torch.Tensor:
    """`[N, V]` of a tensor with V at dim; a copy where no view exists."""
    moved = x.movedim(dim, -1)
    return moved.reshape(-1, moved.shape[-1])


def _like(rows: torch.Tensor, x: torch.Tensor, dim: int) -> torch.Tensor:
    """The inverse of `_rows`: of the shape of x, and contiguous, as the results of `torch.softmax` are."""
    if dim in (-1, x.dim() - 1):
        return rows.view(x.shape)
    return rows.view(x.movedim(dim, -1).shape).movedim(-1, dim).clone(memory_format=torch.contiguous_format)


class _Draw(NamedTuple):
    logits: torch.Tensor  # any shape, V at dim
    tau: torch.Tensor  # [N]
    noise: Noise
    dim: int
    hard: bool
    backend: str


class _Drawn(NamedTuple, Generic[T]):
    y: T  # like logits


class _Kept(NamedTuple):
    score_max: torch.Tensor  # [N]


class _Gradients(NamedTuple, Generic[T]):
    logits: T
    tau: T


def _kernel(draw: _Draw) -> tuple[_Drawn[torch.Tensor], _Kept]:
    backend, logits = backends.get(draw.backend), _rows(draw.logits, draw.dim)
    if checks.reads_values(draw.tau):
        checks.check_tau_values(draw.tau)
    sample = backend.sample(logits, draw.noise, False)
    if checks.reads_values(logits):
        checks.check_rows(logits, (sample.ids < 0) | sample.score_max.isnan())
    if draw.hard:
        y = backend.one_hot(sample, logits.shape[1], logits.dtype)
    else:
        y, _ = backend.softmax(logits, draw.tau, draw.noise, sample.score_max, normalize=True, dtype=logits.dtype)
    return _Drawn(_like(y, draw.logits, draw.dim)), _Kept(sample.score_max)


def _fake(draw: _Draw) -> tuple[_Drawn[torch.Tensor], _Kept]:
    y = torch.empty(draw.logits.shape, dtype=draw.logits.dtype, device=draw.logits.device)
    score_max = torch.empty(draw.tau.shape, dtype=draw.tau.dtype, device=draw.logits.device)
    return _Drawn(y), _Kept(score_max)


def _by_reference(draw: _Draw) -> torch.Tensor:
    checks.check_for_reference(_rows(draw.logits.detach(), draw.dim), draw.tau)
    return _reference_of(draw)


def _reference_of(draw: _Draw) -> torch.Tensor:
    tau = draw.tau.view(draw.logits.movedim(draw.dim, -1).shape[:-1]).unsqueeze(draw.dim)
    return reference.gumbel_softmax(draw.logits, tau, draw.hard, dim=draw.dim, noise=draw.noise.public())


def _backward(
    draw: _Draw, kept: _Kept, arrived: _Drawn[torch.Tensor], wanted: _Gradients[bool]
) -> _Gradients[torch.Tensor]:
    empty, rows = kept.score_max.new_empty(0), _rows(draw.logits, draw.dim)
    dlogits = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    dtau = backends.get(draw.backend).softmax_backward(
        _rows(arrived.y, draw.dim), rows, draw.tau, draw.noise, Sample(empty, kept.score_max, empty, empty),
        estimator="ste", dlogprobs=None, needs_dtau=wanted.tau, out=dlogits,
    )  # fmt: skip
    return _Gradients(_like(dlogits, draw.logits, draw.dim), dtau)


_gumbel_softmax = differentiable(
    "gumbel_softmax", _Draw, _Drawn, _Kept, _Gradients,
    kernel=_kernel, fake=_fake, backward=_backward, reference=lambda draw, _: _Drawn(_reference_of(draw)),
)  # fmt: skip


@answered_by(_by_reference)
def _relax(draw: _Draw) -> torch.Tensor:
    return _gumbel_softmax(draw).y
