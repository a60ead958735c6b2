"""Every operation, dense and obvious: the specification that all backends are tested against.

Plain differentiable PyTorch. Run it on float64 logits for the truth. Narrower logits compute in float32, as everywhere.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from typing_extensions import NamedTuple  # typing's is generic from Python 3.11 only; torch brings this one

from grade_kernels.arguments import check_local
from grade_kernels.noise import GumbelNoise, PosteriorNoise

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
    """Result of `gumbel_ste_embedding` and `linear_gumbel_ste`."""

    embedding: Embedding  # [..., D], one for each table
    ids: torch.Tensor  # [...] int64, the sampled tokens
    logprobs: torch.Tensor  # [...], log softmax(logits)[ids], untempered


def _specification(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: tensors that are parts of distributed ones are refused, and autocast does not change the arithmetic."""
    names = tuple(inspect.signature(function).parameters)

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        for name, value in (*zip(names, args, strict=False), *kwargs.items()):
            check_local(name, value)
            if isinstance(value, (tuple, list)):
                for i, table in enumerate(value):
                    check_local(f"{name}[{i}]", table)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return run


def _widen(logits: torch.Tensor) -> torch.Tensor:
    """Logits in compute precision; a masked one (-inf) is a constant and gets gradient exactly 0."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.where(wide == -torch.inf, -torch.inf, wide)


def _scores(logits: torch.Tensor, noise: GumbelNoise | PosteriorNoise | None) -> torch.Tensor:
    """`l + g` for `[..., V]` logits in compute precision."""
    noise = GumbelNoise.from_generator() if noise is None else noise
    logits = _widen(logits)
    if isinstance(noise, PosteriorNoise):
        return logits + noise.dense(logits)
    rows, vocab = logits[..., 0].numel(), logits.shape[-1]
    return logits + noise.dense(rows, vocab, dtype=logits.dtype).view(logits.shape).to(logits.device)


def tau_of_rows(tau: torch.Tensor, shape: Sequence[int], dim: int = -1) -> torch.Tensor:
    """Tau of each row, of the logits' shape without the vocabulary's dimension.

    Tau may broadcast against the logits, as it would in `(logits + g) / tau`, as long as it has one value per row: its
    size at `dim` is 1, or it does not reach as far as `dim`. So `[1]` serves any logits, and `[H, 1]` those of shape
    `[B, H, V]`. A shape that does not broadcast may list the rows: the logits' shape without `dim`, the same with a last
    1, or flat.

    Args:
        tau: one value or one per row.
        shape: the logits' shape.
        dim: the vocabulary's dimension in it.

    Raises:
        ValueError: any other shape. One that broadcasts to a value per token is refused even if it has an entry per row:
            `[4]` for logits `[4, 4]` would be a value per token in PyTorch. `[4, 1]` says what is meant.
    """
    logits_shape, given = tuple(shape), tuple(tau.shape)
    dim = dim % len(logits_shape)
    batch = logits_shape[:dim] + logits_shape[dim + 1 :]
    missing = len(logits_shape) - len(given)
    padded = (1,) * missing + given
    broadcasts = missing >= 0 and all(n == 1 or n == m for n, m in zip(padded, logits_shape, strict=True))
    if broadcasts and padded[dim] == 1:
        return tau.reshape(padded[:dim] + padded[dim + 1 :]).expand(batch)
    if not broadcasts and given in (batch, (*batch, 1), (math.prod(batch),)):
        return tau.reshape(batch)
    kept = (*logits_shape[:dim], 1, *logits_shape[dim + 1 :])
    why = f", which against logits of shape {logits_shape} is a value per token" if broadcasts else ""
    raise ValueError(
        f"tau must be a number or have one value per row: shape {batch}, or one that broadcasts to {kept}; "
        f"got shape {given}{why}"
    )


def _column(tau: float | torch.Tensor, logits: torch.Tensor, dim: int = -1) -> float | torch.Tensor:
    """Tau to divide `[..., V]` by, in compute precision, for logits that have V at dim."""
    if not isinstance(tau, torch.Tensor) or tau.dim() == 0:
        return tau
    return tau_of_rows(tau, logits.shape, dim).unsqueeze(-1).to(_widen(logits).dtype)


def ignored_rows(
    ids: torch.Tensor | None, ignore_index: int | None, x: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """Which rows `[...]` are ignored, ids of which none is `ignore_index`, and x `[..., K]` with zeros in those rows.

    Zeros, since the row's own values may be anything, NaN included, and nothing must come of them. With a head's bias such
    a row's logits are the bias, which may mask token 0. So the row's id is the bias's most likely token.
    """
    if ids is None or ignore_index is None:
        return None, ids, x
    ignored = ids == ignore_index
    token: int | torch.Tensor = 0 if bias is None else bias.detach().argmax()
    return ignored, torch.where(ignored, token, ids), torch.where(ignored.unsqueeze(-1), 0.0, x)


def _temper(scores: torch.Tensor, tau: float | torch.Tensor) -> torch.Tensor:
    """`scores / tau`, where a masked score (-inf, or so low that it becomes so) sends no gradient to tau (0 * inf is NaN)."""
    scores = scores - scores.detach().amax(-1, keepdim=True)  # softmax does not see it, and a quotient may overflow
    masked = scores / (tau.detach() if isinstance(tau, torch.Tensor) else tau) == -torch.inf
    return torch.where(masked, -torch.inf, torch.where(masked, 0.0, scores) / tau)


def _one_hot(ids: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`F.one_hot` of ids `[...]` in the shape and dtype of `like` `[..., V]`; that one reads values, which vmap forbids."""
    return (ids.unsqueeze(-1) == torch.arange(like.shape[-1], device=like.device)).to(like.dtype)


def _jacobian(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`J(p) x = p * (x - p . x)`, the (symmetric) Jacobian of softmax at probabilities p, applied to x."""
    return p * (x - (p * x).sum(-1, keepdim=True))


@_specification
def gumbel_sample(logits: torch.Tensor, dim: int = -1, *, noise: GumbelNoise | None = None) -> torch.Tensor:
    """`argmax(l + g)`."""
    if logits.dim() == 0:
        return gumbel_sample(logits.reshape(1), dim, noise=noise)
    return _scores(logits.detach().movedim(dim, -1), noise).argmax(-1)


@_specification
def gumbel_softmax(
    logits: torch.Tensor,
    tau: float | torch.Tensor = 1.0,
    hard: bool = False,
    eps: float = 1e-10,
    dim: int = -1,
    *,
    noise: GumbelNoise | PosteriorNoise | None = None,
) -> torch.Tensor:
    """`softmax((l + g) / tau)`, or with `hard` its one-hot argmax with the same gradient (straight-through)."""
    if logits.dim() == 0:
        return gumbel_softmax(logits.reshape(1), tau, hard, dim=dim, noise=noise).reshape(())
    moved = logits.movedim(dim, -1)
    scores = _scores(moved, noise)
    y = _temper(scores, _column(tau, logits, dim)).softmax(-1)
    if hard:
        ids = noise.ids if isinstance(noise, PosteriorNoise) else scores.argmax(-1)
        # Written so that the forward value is exactly one-hot.
        y = _one_hot(ids, scores) + (y - y.detach())
    # In the layout of torch.softmax, where a view would do for other dimensions of size 1 as well.
    return y.to(logits.dtype).movedim(-1, dim).clone(memory_format=torch.contiguous_format)


def gumbel_ste(
    logits: torch.Tensor,
    tau: float | torch.Tensor = 1.0,
    dim: int = -1,
    *,
    noise: GumbelNoise | PosteriorNoise | None = None,
) -> torch.Tensor:
    """`gumbel_softmax(hard=True)`."""
    return gumbel_softmax(logits, tau, hard=True, dim=dim, noise=noise)


@_specification
def gumbel_ste_embedding(
    logits: torch.Tensor,
    embedding: Embedding,
    tau: float | torch.Tensor = 1.0,
    *,
    estimator: str = "ste",
    draws: int = 1,
    noise: GumbelNoise | PosteriorNoise | None = None,
    ids: torch.Tensor | None = None,
    ignore_index: int | None = None,
) -> GumbelSTEEmbedding[Embedding]:
    """Embedding of a sampled token, `y @ E`, with one of five relaxations (see `ops.gumbel_ste_embedding`)."""
    noise = GumbelNoise.from_generator() if noise is None else noise
    if isinstance(noise, PosteriorNoise):
        ids = noise.ids
    given = ids
    ignored, ids, logits = ignored_rows(ids, ignore_index, logits)
    if ignored is not None and ids is not None and isinstance(noise, PosteriorNoise):
        noise = noise.ignoring(ignored, ids)
    scores = _scores(logits, noise)
    wide, tau = _widen(logits), _column(tau, logits)
    ids = scores.argmax(-1) if ids is None else ids.clone()
    one_hot = _one_hot(ids, wide)
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
    elif estimator == "gumbel_rao":
        y, prior = one_hot, noise.noise if isinstance(noise, PosteriorNoise) else noise
        for m in range(draws):
            soft = _temper(wide + PosteriorNoise(prior, ids, None, m).dense(wide), tau).softmax(-1)
            y = y + (soft - soft.detach()) / draws
    else:
        raise ValueError(f"estimator must be 'ste', 'soft', 'st', 'reinmax' or 'gumbel_rao', got {estimator!r}")
    tables: tuple[torch.Tensor, ...] = (embedding,) if isinstance(embedding, torch.Tensor) else tuple(embedding)
    embedded = []
    for table in tables:
        dtype = torch.promote_types(y.dtype, table.dtype)
        embedded.append((y.to(dtype) @ table.to(dtype)).to(table.dtype))
    logprobs = wide.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    if ignored is not None and given is not None:
        embedded = [torch.where(ignored.unsqueeze(-1), 0.0, e) for e in embedded]
        ids, logprobs = given.clone(), torch.where(ignored, 0.0, logprobs)
    result: Any = embedded[0] if isinstance(embedding, torch.Tensor) else tuple(embedded)
    return GumbelSTEEmbedding(result, ids, logprobs)


# ---- Operations through the LM head -------------------------------------------------------------------------------


@_specification
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


@_specification
def linear_gumbel_ste(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    embedding: Embedding,
    tau: float | torch.Tensor = 1.0,
    *,
    bias: torch.Tensor | None = None,
    logit_softcap: float | None = None,
    estimator: str = "ste",
    draws: int = 1,
    noise: GumbelNoise | PosteriorNoise | None = None,
    ids: torch.Tensor | None = None,
    ignore_index: int | None = None,
    eps: float = 2**-11,
) -> GumbelSTEEmbedding[Embedding]:
    """`gumbel_ste_embedding` of the head's logits. The reference's gradient is exact at every eps."""
    _, _, hidden = ignored_rows(noise.ids if isinstance(noise, PosteriorNoise) else ids, ignore_index, hidden)
    logits = head_logits(hidden, lm_head, bias, logit_softcap)
    return gumbel_ste_embedding(
        logits, embedding, tau, estimator=estimator, draws=draws, noise=noise, ids=ids, ignore_index=ignore_index
    )


@_specification
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


@_specification
def linear_logprobs(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_softcap: float | None = None,
    temperature: float | torch.Tensor = 1.0,
    ignore_index: int | None = None,
    eps: float = 2**-11,
    noise: GumbelNoise | None = None,
) -> torch.Tensor:
    """`log softmax(l / temperature)[ids]`, and 0 where ids are `ignore_index`."""
    ignored, chosen, hidden = ignored_rows(ids, ignore_index, hidden)
    assert chosen is not None
    logits = head_logits(hidden, lm_head, bias, logit_softcap, temperature)
    logprobs = logits.log_softmax(-1).gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    return logprobs if ignored is None else torch.where(ignored, 0.0, logprobs)


@_specification
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


@_specification
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
