"""Every operation, dense and obvious: the specification that all backends are tested against.

Plain differentiable PyTorch. Run it on float64 logits for the truth. Narrower logits compute in float32, as everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from typing_extensions import NamedTuple  # typing's is generic from Python 3.11 only; torch brings this one

from grade_kernels.noise import GumbelNoise

__all__ = [
    "GumbelSTEEmbedding",
    "gumbel_sample",
    "gumbel_softmax",
    "gumbel_ste",
    "gumbel_ste_embedding",
    "head_logits",
    "linear_entropy",
    "linear_gumbel_sample",
    "linear_gumbel_ste",
    "linear_kl",
    "linear_logprobs",
]


P = ParamSpec("P")
T = TypeVar("T")
# A table gives a tensor, a tuple of them a tuple.
Embedding = TypeVar("Embedding", torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor | tuple[torch.Tensor, ...])


class GumbelSTEEmbedding(NamedTuple, Generic[Embedding]):
    """Result of `gumbel_ste_embedding`."""

    embedding: Embedding  # [..., D], one for each table
    ids: torch.Tensor  # [...] int64, the sampled tokens
    logprobs: torch.Tensor  # [...], log softmax(logits)[ids], untempered


def _outside_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """Arithmetic of the specification is its own, whatever the surroundings would cast it to."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return run


def _widen(logits: torch.Tensor) -> torch.Tensor:
    """Logits in compute precision; a masked one (-inf) is a constant and gets gradient exactly 0."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.where(wide == -torch.inf, -torch.inf, wide)


def _scores(logits: torch.Tensor, noise: GumbelNoise | None) -> torch.Tensor:
    """`l + g` for `[..., V]` logits in compute precision."""
    noise = GumbelNoise.from_generator() if noise is None else noise
    logits = _widen(logits)
    rows, vocab = logits[..., 0].numel(), logits.shape[-1]
    return logits + noise.dense(rows, vocab, dtype=logits.dtype).view(logits.shape).to(logits.device)


def _column(tau: float | torch.Tensor, logits: torch.Tensor) -> float | torch.Tensor:
    """Tau with a trailing dimension to divide `[..., V]` by, in compute precision."""
    if not isinstance(tau, torch.Tensor) or tau.dim() == 0:
        return tau
    return tau.reshape(logits.shape[:-1]).unsqueeze(-1).to(_widen(logits).dtype)


def _temper(scores: torch.Tensor, tau: float | torch.Tensor) -> torch.Tensor:
    """`scores / tau`, where a masked score (-inf, or so low that it becomes so) sends no gradient to tau (0 * inf is NaN)."""
    scores = scores - scores.detach().amax(-1, keepdim=True)  # softmax does not see it, and a quotient may overflow
    masked = scores / (tau.detach() if isinstance(tau, torch.Tensor) else tau) == -torch.inf
    return torch.where(masked, -torch.inf, torch.where(masked, 0.0, scores) / tau)


def _jacobian(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`J(p) x = p * (x - p . x)`, the (symmetric) Jacobian of softmax at probabilities p, applied to x."""
    return p * (x - (p * x).sum(-1, keepdim=True))


@_outside_autocast
def gumbel_sample(logits: torch.Tensor, dim: int = -1, *, noise: GumbelNoise | None = None) -> torch.Tensor:
    """`argmax(l + g)`."""
    return _scores(logits.detach().movedim(dim, -1), noise).argmax(-1)


@_outside_autocast
def gumbel_softmax(
    logits: torch.Tensor,
    tau: float | torch.Tensor = 1.0,
    hard: bool = False,
    eps: float = 1e-10,
    dim: int = -1,
    *,
    noise: GumbelNoise | None = None,
) -> torch.Tensor:
    """`softmax((l + g) / tau)`, or with `hard` its one-hot argmax with the same gradient (straight-through)."""
    moved = logits.movedim(dim, -1)
    scores = _scores(moved, noise)
    y = _temper(scores, _column(tau, moved)).softmax(-1)
    if hard:
        # Written so that the forward value is exactly one-hot.
        y = F.one_hot(scores.argmax(-1), scores.shape[-1]).to(y.dtype) + (y - y.detach())
    return y.to(logits.dtype).movedim(-1, dim)


def gumbel_ste(
    logits: torch.Tensor, tau: float | torch.Tensor = 1.0, dim: int = -1, *, noise: GumbelNoise | None = None
) -> torch.Tensor:
    """`gumbel_softmax(hard=True)`."""
    return gumbel_softmax(logits, tau, hard=True, dim=dim, noise=noise)


@_outside_autocast
def gumbel_ste_embedding(
    logits: torch.Tensor,
    embedding: Embedding,
    tau: float | torch.Tensor = 1.0,
    *,
    estimator: str = "ste",
    noise: GumbelNoise | None = None,
    ids: torch.Tensor | None = None,
) -> GumbelSTEEmbedding[Embedding]:
    """Embedding of a sampled token, `y @ E`, with one of four relaxations (see `ops.gumbel_ste_embedding`)."""
    scores = _scores(logits, noise)
    wide, tau = _widen(logits), _column(tau, logits)
    ids = scores.argmax(-1) if ids is None else ids.clone()
    one_hot = F.one_hot(ids, wide.shape[-1]).to(wide.dtype)
    # The straight-through surrogates are linear around the logits; a masked token has no neighbourhood.
    step = torch.where(wide == -torch.inf, 0.0, wide - wide.detach())
    if estimator == "soft":
        y = _temper(scores, tau).softmax(-1)
    elif estimator == "ste":
        soft = _temper(scores, tau).softmax(-1)
        y = one_hot + (soft - soft.detach())
    elif estimator == "st":
        soft = _temper(wide, tau).softmax(-1)
        y = one_hot + (soft - soft.detach())
    elif estimator == "reinmax":
        step = step + 0.0 * tau  # a tensor tau has a gradient, which is zero
        middle = (one_hot + _temper(wide, tau).softmax(-1)) / 2
        y = one_hot + 2 * _jacobian(middle.detach(), step) - _jacobian(wide.softmax(-1).detach(), step) / 2
    else:
        raise ValueError(f"estimator must be 'ste', 'soft', 'st' or 'reinmax', got {estimator!r}")
    tables: tuple[torch.Tensor, ...] = (embedding,) if isinstance(embedding, torch.Tensor) else tuple(embedding)
    embedded = []
    for table in tables:
        dtype = torch.promote_types(y.dtype, table.dtype)
        embedded.append((y.to(dtype) @ table.to(dtype)).to(table.dtype))
    logprobs = wide.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    result: Any = embedded[0] if isinstance(embedding, torch.Tensor) else tuple(embedded)
    return GumbelSTEEmbedding(result, ids, logprobs)


# ---- Operations through the LM head -------------------------------------------------------------------------------


def head_logits(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    bias: torch.Tensor | None = None,
    logit_softcap: float | None = None,
    temperature: float | torch.Tensor = 1.0,
) -> torch.Tensor:
    """Logits `[..., V]` of a head in compute precision: `softcap(hidden @ lm_head.T + bias) / temperature`."""
    dtype = torch.float64 if torch.float64 in (hidden.dtype, lm_head.dtype) else torch.float32
    logits = hidden.to(dtype) @ lm_head.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    masked = logits == -torch.inf
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    logits = torch.where(masked, -torch.inf, logits)  # a constant, whose gradient is exactly 0
    return logits / temperature


def _expectation(logp: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`sum p x` over the tokens that have any probability."""
    possible = logp > -torch.inf
    return torch.where(possible, logp.exp() * torch.where(possible, x, 0.0), 0.0).sum(-1)


@_outside_autocast
def linear_gumbel_ste(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    embedding: Embedding,
    tau: float | torch.Tensor = 1.0,
    *,
    bias: torch.Tensor | None = None,
    logit_softcap: float | None = None,
    estimator: str = "ste",
    noise: GumbelNoise | None = None,
    ids: torch.Tensor | None = None,
    eps: float = 2**-11,
) -> GumbelSTEEmbedding[Embedding]:
    """`gumbel_ste_embedding` of the head's logits. The reference's gradient is exact at every eps."""
    logits = head_logits(hidden, lm_head, bias, logit_softcap)
    return gumbel_ste_embedding(logits, embedding, tau, estimator=estimator, noise=noise, ids=ids)


@_outside_autocast
def linear_gumbel_sample(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_softcap: float | None = None,
    noise: GumbelNoise | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`argmax(l + g)` and its log-probability."""
    logits = head_logits(hidden.detach(), lm_head.detach(), bias, logit_softcap)
    ids = gumbel_sample(logits, noise=noise)
    return ids, logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1).detach()


@_outside_autocast
def linear_logprobs(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_softcap: float | None = None,
    temperature: float | torch.Tensor = 1.0,
    eps: float = 2**-11,
    noise: GumbelNoise | None = None,
) -> torch.Tensor:
    """`log softmax(l / temperature)[ids]`."""
    logits = head_logits(hidden, lm_head, bias, logit_softcap, temperature)
    return logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


@_outside_autocast
def linear_kl(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_lm_head: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ref_bias: torch.Tensor | None = None,
    logit_softcap: float | None = None,
    temperature: float | torch.Tensor = 1.0,
    eps: float = 2**-11,
    noise: GumbelNoise | None = None,
) -> torch.Tensor:
    """`sum p (log p - log q)` of the policy p and the reference q, whose tensors are constants."""
    logp = head_logits(hidden, lm_head, bias, logit_softcap, temperature).log_softmax(-1)
    ref = head_logits(ref_hidden, ref_lm_head, ref_bias, logit_softcap, temperature)
    return _expectation(logp, logp - ref.detach().log_softmax(-1).to(logp.dtype))


@_outside_autocast
def linear_entropy(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_softcap: float | None = None,
    temperature: float | torch.Tensor = 1.0,
    eps: float = 2**-11,
    noise: GumbelNoise | None = None,
) -> torch.Tensor:
    """`-sum p log p`."""
    logp = head_logits(hidden, lm_head, bias, logit_softcap, temperature).log_softmax(-1)
    return -_expectation(logp, logp)
