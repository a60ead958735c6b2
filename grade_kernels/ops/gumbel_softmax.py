"""`gumbel_softmax` and `gumbel_ste`: relaxed and straight-through samples over the whole vocabulary."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from grade_kernels import backends, reference
from grade_kernels.noise import GumbelNoise
from grade_kernels.ops import checks
from grade_kernels.ops.registry import define, once_differentiable, public
from grade_kernels.ops.transforms import differentiable_gradients, records_gradients, serving, without_wrappers

__all__ = ["gumbel_softmax", "gumbel_ste"]


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
    seed, row_ids, vocab_start = checks.canonical_noise(noise, num_rows, logits.device)
    row_tau = checks.canonical_tau(tau, logits.shape, logits.device, checks.compute_dtype(logits.dtype), dim)
    backend = serving(backends.select(logits.device, logits.dtype), logits, row_tau)
    if backend == "reference":
        if checks.reads_values_here(logits):
            rows = without_wrappers(_rows(logits.detach(), dim))
            checks.check_rows(rows, checks.bad_rows(rows))
            checks.check_tau_values(without_wrappers(row_tau))
        noise = GumbelNoise(seed, row_ids, vocab_start=vocab_start)
        kept_tau = row_tau.view(moved.shape[:-1]).unsqueeze(dim)
        return reference.gumbel_softmax(logits, kept_tau, hard, dim=dim, noise=noise)
    return _gumbel_softmax(logits, row_tau, seed, row_ids, vocab_start, dim, hard, backend)[0]


@public
def gumbel_ste(
    logits: torch.Tensor, tau: float | torch.Tensor = 1.0, dim: int = -1, *, noise: GumbelNoise | None = None
) -> torch.Tensor:
    """One-hot sample of the logits' shape with straight-through backward: `gumbel_softmax(hard=True)`.

    Arguments, errors and source as in `gumbel_softmax`.
    """
    return gumbel_softmax(logits, tau, hard=True, dim=dim, noise=noise)


# The operations take logits of any shape, with V at dim, so that what is saved for backward is what the caller holds,
# never a copy that the kernels' layout needs.


def _rows(x: torch.Tensor, dim: int) -> torch.Tensor:
    """`[N, V]` of a tensor with V at dim; a copy where no view exists."""
    moved = x.movedim(dim, -1)
    return moved.reshape(-1, moved.shape[-1])


def _like(rows: torch.Tensor, x: torch.Tensor, dim: int) -> torch.Tensor:
    """The inverse of `_rows`: of the shape of x, and contiguous, as the results of `torch.softmax` are."""
    if dim in (-1, x.dim() - 1):
        return rows.view(x.shape)
    return rows.view(x.movedim(dim, -1).shape).movedim(-1, dim).clone(memory_format=torch.contiguous_format)


def _kernel(
    logits: torch.Tensor,
    tau: torch.Tensor,
    seed: torch.Tensor,
    row_ids: torch.Tensor | None,
    vocab_start: int,
    dim: int,
    hard: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    implementation = backends.module(backend)
    given, logits = logits, _rows(logits, dim)
    if checks.reads_values(tau):
        checks.check_tau_values(tau)
    sample = implementation.sample(logits, seed, row_ids, vocab_start, False)
    if checks.reads_values(logits):
        checks.check_rows(logits, (sample.ids < 0) | sample.score_max.isnan())
    if hard:
        y = implementation.one_hot(sample, logits.shape[1], logits.dtype)
    else:
        y, _ = implementation.softmax(logits, tau, seed, row_ids, vocab_start, sample.score_max, True, logits.dtype)
    return _like(y, given, dim), sample.score_max


def _fake_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake(
    logits: torch.Tensor,
    tau: torch.Tensor,
    seed: torch.Tensor,
    row_ids: torch.Tensor | None,
    vocab_start: int,
    dim: int,
    hard: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        _fake_like(logits),
        torch.empty(tau.shape, dtype=tau.dtype, device=logits.device),
    )


def _backward_kernel(
    dy: torch.Tensor,
    logits: torch.Tensor,
    tau: torch.Tensor,
    seed: torch.Tensor,
    row_ids: torch.Tensor | None,
    vocab_start: int,
    dim: int,
    score_max: torch.Tensor,
    needs_dtau: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    empty = score_max.new_empty(0)
    sample = backends.Sample(empty, score_max, empty, empty)
    rows = _rows(logits, dim)
    dlogits = torch.empty(rows.shape, dtype=logits.dtype, device=logits.device)
    dtau = backends.module(backend).softmax_backward(
        _rows(dy, dim), rows, tau, seed, row_ids, vocab_start, "ste", sample, None, needs_dtau, dlogits
    )
    return _like(dlogits, logits, dim), dtau


def _backward_fake(
    dy: torch.Tensor,
    logits: torch.Tensor,
    tau: torch.Tensor,
    seed: torch.Tensor,
    row_ids: torch.Tensor | None,
    vocab_start: int,
    dim: int,
    score_max: torch.Tensor,
    needs_dtau: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _fake_like(logits), torch.empty_like(score_max)


_gumbel_softmax = define(
    "gumbel_softmax(Tensor logits, Tensor tau, Tensor seed, Tensor? row_ids, SymInt vocab_start, int dim, "
    "bool hard, str backend) -> (Tensor, Tensor)",
    _kernel,
    _fake,
)
_gumbel_softmax_backward = define(
    "gumbel_softmax_backward(Tensor dy, Tensor logits, Tensor tau, Tensor seed, Tensor? row_ids, SymInt vocab_start, "
    "int dim, Tensor score_max, bool needs_dtau, str backend) -> (Tensor, Tensor)",
    _backward_kernel,
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, tau, seed, row_ids, ctx.vocab_start, ctx.dim, ctx.hard, ctx.backend = inputs
    ctx.save_for_backward(logits, tau, seed, row_ids, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: torch.Tensor | None, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if dy is None:
        return (None,) * 8
    logits, tau, seed, row_ids, score_max = ctx.saved_tensors
    if records_gradients():

        def forward(logits: torch.Tensor, tau: torch.Tensor) -> tuple[torch.Tensor]:
            noise = GumbelNoise(seed, row_ids, vocab_start=ctx.vocab_start)
            kept_tau = tau.view(logits.movedim(ctx.dim, -1).shape[:-1]).unsqueeze(ctx.dim)
            return (reference.gumbel_softmax(logits, kept_tau, ctx.hard, dim=ctx.dim, noise=noise),)

        return *differentiable_gradients(forward, (logits, tau), ctx.needs_input_grad[:2], (dy,)), *(None,) * 6
    dlogits, dtau = _gumbel_softmax_backward(
        dy, logits, tau, seed, row_ids, ctx.vocab_start, ctx.dim, score_max, ctx.needs_input_grad[1], ctx.backend
    )
    return dlogits, dtau if ctx.needs_input_grad[1] else None, *(None,) * 6


torch.library.register_autograd("grade_kernels::gumbel_softmax", _backward, setup_context=_setup_context)
once_differentiable("gumbel_softmax_backward")
