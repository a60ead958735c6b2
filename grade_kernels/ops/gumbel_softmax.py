"""`gumbel_softmax` and `gumbel_ste`: relaxed and straight-through samples over the whole vocabulary."""

import math
import warnings
from typing import Any, Generic, TypeVar

import torch
from typing_extensions import NamedTuple

from grade_kernels import backends, reference
from grade_kernels.backends import Backend, GradientRule, Noise, Rows, Sample
from grade_kernels.backends.layouts import flat
from grade_kernels.dtypes import compute_dtype
from grade_kernels.noise import GumbelNoise, PosteriorNoise, fresh_number
from grade_kernels.ops import checks
from grade_kernels.ops.differentiable import differentiable, plain_apply
from grade_kernels.ops.eager import ORDINARY, undisturbed
from grade_kernels.ops.posterior import relaxed_rows
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
    noise: GumbelNoise | PosteriorNoise | None = None,
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
        noise: which noise to use. None draws a fresh seed from torch's default generator. Noise of given tokens
            (`GumbelNoise.given`) has ids of the logits' shape without `dim`; with `hard` the result is their one-hot.

    Returns:
        A contiguous tensor of the logits' shape and dtype.

    Raises:
        TypeError: logits that are no floating tensor, tau that is no number, noise that is no GumbelNoise.
        ValueError: an empty vocabulary; given tokens of a wrong shape, out of range or masked, or log-probabilities of
            them that are none; tau not positive and finite, of a wrong shape, or of one that PyTorch would broadcast to a
            value per token (`[4]` for logits `[4, 4]`); row_ids of the wrong length; tensors on different
            devices; on CPU a row of NaN, +inf or only -inf.
        IndexError: dim out of range.

    Source: Jang, Gu, Poole: Categorical reparameterization with Gumbel-softmax. ICLR 2017.
    """
    if eps != 1e-10:
        warnings.warn("`eps` parameter is deprecated and has no effect.", stacklevel=2)
    if isinstance(logits, torch.Tensor) and logits.dim() == 0:
        return gumbel_softmax(logits.reshape(1), tau, hard, dim=dim, noise=noise).reshape(())
    dim = checks.check_logits(logits, dim)
    y, noise = _one_step(logits, tau, hard, dim, noise)
    if y is not None:
        return y
    device = logits.device
    # The batch's shape takes a microsecond, so it is computed only where it is looked at.
    batch = logits.movedim(dim, -1).shape[:-1] if isinstance(noise, PosteriorNoise) else None
    drawn = checks.canonical_noise(noise, logits.numel() // logits.size(dim), device, batch)
    row_tau = checks.canonical_tau(tau, logits.shape, device, compute_dtype(logits.dtype), dim)
    backend = backends.select(device, logits.dtype)
    return _relax(_Draw(logits, row_tau, isinstance(tau, torch.Tensor), drawn, dim, hard, backend))


@public
def gumbel_ste(
    logits: torch.Tensor,
    tau: float | torch.Tensor = 1.0,
    dim: int = -1,
    *,
    noise: GumbelNoise | PosteriorNoise | None = None,
) -> torch.Tensor:
    """One-hot sample of the logits' shape with straight-through backward: `gumbel_softmax(hard=True)`.

    Arguments, errors and source as in `gumbel_softmax`.
    """
    return gumbel_softmax(logits, tau, hard=True, dim=dim, noise=noise)


def _planes(x: torch.Tensor, dim: int) -> torch.Tensor:
    """`[A, V, B]` of a tensor with V at dim, as `Rows` has it; a copy where no view exists."""
    if x.dim() == 2 and dim in (-1, 1):
        return x.unsqueeze(2)
    dim %= x.dim()
    return x.reshape(math.prod(x.shape[:dim]), x.shape[dim], math.prod(x.shape[dim + 1 :]))


# If the operation took rows, it would save for backward what may be a copy of the logits. So it takes the caller's logits,
# of any shape and with V at dim.


class _Draw(NamedTuple):
    logits: torch.Tensor  # any shape, V at dim
    tau: torch.Tensor  # [N]
    checks_tau: bool  # its values are the caller's, not those of a number that was checked
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


def _rows(draw: _Draw) -> Rows:
    return Rows(_planes(draw.logits, draw.dim), draw.tau, draw.noise)


def _kernel(draw: _Draw) -> tuple[_Drawn[torch.Tensor], _Kept]:
    backend, rows = backends.get(draw.backend), _rows(draw)
    if draw.checks_tau and checks.reads_values(draw.tau):
        checks.check_tau_values(draw.tau)
    rows = relaxed_rows(backend, rows)
    y = backend.blank(draw.logits, rows.logits.shape[1], draw.hard)
    score_max = backend.gumbel_softmax(rows, draw.hard, _planes(y, draw.dim))
    if checks.reads_values(draw.logits) and checks.holds_nan(score_max):
        checks.check_rows(flat(rows.logits), score_max.isnan())
    return _Drawn(y), _Kept(score_max)


def _fake(draw: _Draw) -> tuple[_Drawn[torch.Tensor], _Kept]:
    y = torch.empty(draw.logits.shape, dtype=draw.logits.dtype, device=draw.logits.device)
    score_max = torch.empty(draw.tau.shape, dtype=draw.tau.dtype, device=draw.logits.device)
    return _Drawn(y), _Kept(score_max)


def _by_reference(draw: _Draw) -> torch.Tensor:
    checks.check_for_reference(flat(_planes(draw.logits.detach(), draw.dim)), draw.tau, noise=draw.noise)
    return _reference_of(draw)


def _reference_of(draw: _Draw) -> torch.Tensor:
    batch = draw.logits.movedim(draw.dim, -1).shape[:-1]
    tau = draw.tau.view(batch).unsqueeze(draw.dim)
    return reference.gumbel_softmax(draw.logits, tau, draw.hard, dim=draw.dim, noise=draw.noise.public_of(batch))


def _backward(
    draw: _Draw, kept: _Kept, arrived: _Drawn[torch.Tensor], wanted: _Gradients[bool]
) -> _Gradients[torch.Tensor]:
    empty, rows = kept.score_max.new_empty(0), _rows(draw)
    dlogits = torch.empty_like(draw.logits, memory_format=torch.contiguous_format)
    dtau = backends.get(draw.backend).softmax_backward(
        _planes(arrived.y, draw.dim),
        rows._replace(noise=rows.noise.won_with(kept.score_max)),
        Sample(empty, kept.score_max, empty, empty),
        GradientRule("ste", needs_dtau=wanted.tau),
        _planes(dlogits, draw.dim),
    )
    return _Gradients(dlogits, dtau)


_gumbel_softmax = differentiable(
    "gumbel_softmax", _Draw, _Drawn, _Kept, _Gradients,
    kernel=_kernel, fake=_fake, backward=_backward, reference=lambda draw, _: _Drawn(_reference_of(draw)),
)  # fmt: skip


@answered_by(_by_reference)
def _relax(draw: _Draw) -> torch.Tensor:
    return _gumbel_softmax(draw).y


# For a few small rows all of the above takes longer than the kernels. Most calls give logits and numbers, and nothing
# looks at them on their way. A backend may serve these in one step. What it declines goes through the operation.


def _one_step(
    logits: torch.Tensor,
    tau: float | torch.Tensor,
    hard: bool,
    dim: int,
    noise: GumbelNoise | PosteriorNoise | None,
) -> tuple[torch.Tensor | None, GumbelNoise | PosteriorNoise | None]:
    """The result, or None where the call is not plain or the backend declines it; and the noise that it draws."""
    if (
        not undisturbed()
        or type(logits) not in ORDINARY
        or not logits.is_cpu
        or not (type(tau) is float or (type(tau) is int and 0 < tau < 2**63))
        or type(hard) is not bool
        or (backend := backends.selected("cpu")) is None
    ):
        return None, noise
    if noise is None:
        seed = fresh_number()
    elif (
        type(noise) is GumbelNoise
        and noise.row_ids is None
        and noise.vocab_start == 0
        and type(noise.seed) in ORDINARY
        and noise.seed.is_cpu
    ):
        seed = int(noise.seed)
    else:
        return None, noise
    if logits.requires_grad and torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        y = _apply_node(logits, (dim, tau, seed, hard, backend))
    else:
        y, _ = backend.relax_at(logits, dim, tau, seed, hard, False)
    return y, noise if y is not None else noise or GumbelNoise(seed)


class _StepNode(torch.autograd.Function):
    """What the graph holds of such a call: logits and one number per row, beside numbers."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits: torch.Tensor, step: tuple[int, float, int, bool, Backend]
    ) -> torch.Tensor | None:
        dim, tau, seed, hard, backend = ctx.step = step
        y, score_max = backend.relax_at(logits, dim, tau, seed, hard, True)
        ctx.save_for_backward(logits, score_max)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:  # type: ignore[override]
        if dy is None:
            return None, None
        logits, score_max = ctx.saved_tensors
        dim, tau, seed, hard, backend = ctx.step
        dlogits = None
        if not torch.is_grad_enabled() and undisturbed() and type(dy) in ORDINARY and type(logits) in ORDINARY:
            dlogits = backend.relax_at_backward(dy, logits, dim, tau, seed, score_max)
        if dlogits is None:
            noise = Noise(torch.tensor(seed, dtype=torch.int64, device="cpu"), None, 0)
            draw = _Draw(logits, torch.full_like(score_max, tau), False, noise, dim, hard, backend.name)
            (dlogits,) = _gumbel_softmax.gradients(draw, _Kept(score_max), _Drawn(dy), [True, False])
        return dlogits, None


_apply_node = plain_apply(type("gumbel_softmax", (_StepNode,), {}))  # the node is named after it
