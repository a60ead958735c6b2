"""What the tests of the operations through the LM head share: problems, the truth by formula, eager PyTorch."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch._C._profiler import RecordScope
from torch.autograd import profiler as autograd_profiler

import grade_kernels as gk
from tests.support.by_formula import by_formula
from tests.support.helpers import compute_dtype, flat_on_cpu, randn, resize, truth_noise

Tensor = torch.Tensor


class Problem(NamedTuple):
    """Arguments of one call of `linear_gumbel_ste` and the gradients that come from above; all constants."""

    hidden: Tensor  # [..., H]
    lm_head: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    tables: tuple[Tensor, ...]  # [V, D]
    tau: float | Tensor
    softcap: float | None
    estimator: str
    noise: gk.GumbelNoise | gk.PosteriorNoise
    ids: Tensor | None
    upstream: tuple[Tensor, ...]  # [..., D], like the embeddings
    dlogprobs: Tensor  # [...]


class Answer(NamedTuple):
    """What comes back: results, and a gradient for each tensor (None where there is none)."""

    embedding: tuple[Tensor, ...]
    ids: Tensor
    logprobs: Tensor
    hidden: Tensor | None
    lm_head: Tensor | None
    bias: Tensor | None
    tables: tuple[Tensor | None, ...]
    tau: Tensor | None


GRADIENTS = ("hidden", "lm_head", "bias", "tables", "tau")


def problem(
    shape: tuple[int, ...] = (3,),
    vocab: int = 17,
    features: int = 5,
    *,
    dtype: torch.dtype = torch.float32,
    table_dtypes: tuple[torch.dtype, ...] = (torch.float32,),
    bias: bool = False,
    mask: bool = False,
    softcap: float | None = None,
    estimator: str = "ste",
    tau: Any = 0.7,
    given: bool = False,
    scale: float = 1.0,
    device: str = "cpu",
    seed: int = 1,
    noise: gk.GumbelNoise | None = None,
) -> Problem:
    """A problem whose logits have a standard deviation near 2 * scale; tau may be `row` for one value per row."""
    rows = math.prod(shape)
    hidden = randn(*shape, features, dtype=dtype, device=device, seed=seed)
    lm_head = (randn(vocab, features, seed=seed + 1, dtype=torch.float64) * 2 * scale / features**0.5).to(device, dtype)
    b = None
    if bias or mask:
        b = randn(vocab, dtype=dtype, device=device, seed=seed + 2)
    if mask and b is not None:
        b[torch.arange(vocab, device=device) % 3 == 1] = -math.inf
    tables = tuple(randn(vocab, 3 + i, dtype=t, device=device, seed=seed + 3 + i) for i, t in enumerate(table_dtypes))
    upstream = tuple(
        randn(*shape, t.shape[1], dtype=t.dtype, device=device, seed=seed + 20 + i) for i, t in enumerate(tables)
    )
    dlogprobs = randn(rows, dtype=compute_dtype(dtype), device=device, seed=seed + 30).reshape(shape)
    ids = (torch.arange(rows, device=device) * 3 % vocab).reshape(shape) if given else None
    if given and mask and ids is not None:
        ids = torch.where(ids % 3 == 1, 0, ids)
    if isinstance(tau, str):
        tau = (0.5 + torch.arange(rows, device=device) % 4 * 0.4).reshape(shape)
        tau = tau.to(compute_dtype(dtype))
    noise = gk.GumbelNoise(seed, vocab_start=vocab + 1) if noise is None else noise
    return Problem(hidden, lm_head, b, tables, tau, softcap, estimator, noise, ids, upstream, dlogprobs)


def everything(p: Problem) -> tuple[str, ...]:
    """All gradients that a problem has."""
    absent = {"bias": p.bias is None, "tau": not isinstance(p.tau, Tensor)}
    return tuple(name for name in GRADIENTS if not absent.get(name, False))


def run(p: Problem, eps: float = 0.0, wanted: tuple[str, ...] | None = None, **kwargs: Any) -> Answer:
    """The operation and its gradients, of `wanted` tensors only."""
    wanted = everything(p) if wanted is None else wanted

    def maybe(name: str, x: Any) -> Any:
        return x.detach().requires_grad_() if name in wanted and isinstance(x, Tensor) else x  # strides and all

    hidden, lm_head, bias, tau = (maybe(n, x) for n, x in (("hidden", p.hidden), ("lm_head", p.lm_head),
                                                           ("bias", p.bias), ("tau", p.tau)))  # fmt: skip
    tables = tuple(maybe("tables", table) for table in p.tables)
    out = gk.linear_gumbel_ste(
        hidden, lm_head, tables, tau, bias=bias, logit_softcap=p.softcap, estimator=p.estimator, noise=p.noise,
        ids=p.ids, eps=eps, **kwargs,
    )  # fmt: skip
    loss(p, out).backward()
    return Answer(
        tuple(x.detach() for x in out.embedding), out.ids, out.logprobs.detach(),
        hidden.grad, lm_head.grad, None if bias is None else bias.grad, tuple(table.grad for table in tables),
        tau.grad if isinstance(tau, Tensor) else None,
    )  # fmt: skip


def loss(p: Problem, out: Any) -> Tensor:
    total = (out.logprobs * p.dlogprobs).sum()
    for e, de in zip(out.embedding, p.upstream, strict=True):
        total = total + (e * de).sum().to(total.dtype)
    return total


def capped(x: Tensor, softcap: float | None) -> Tensor:
    """Softcap, which leaves a masked token masked."""
    return x if softcap is None else torch.where(x == -math.inf, x, softcap * torch.tanh(x / softcap))


def flat(p: Problem) -> Problem:
    """With one leading dimension, tau a vector, on the CPU."""
    rows = p.dlogprobs.numel()
    tau = p.tau if isinstance(p.tau, Tensor) else torch.tensor(p.tau, dtype=torch.float64)
    tau = (tau.expand(rows) if tau.dim() == 0 else tau.reshape(rows)).cpu()
    return Problem(
        p.hidden.cpu().reshape(rows, p.hidden.shape[-1]), p.lm_head.cpu(), None if p.bias is None else p.bias.cpu(),
        tuple(t.cpu() for t in p.tables), tau, p.softcap, p.estimator,
        flat_on_cpu(p.noise),
        None if p.ids is None else p.ids.cpu().reshape(rows),
        tuple(d.cpu().reshape(rows, d.shape[-1]) for d in p.upstream), p.dlogprobs.cpu().reshape(rows),
    )  # fmt: skip


def widened(p: Problem) -> Problem:
    """In float64."""
    return p._replace(
        hidden=p.hidden.double(), lm_head=p.lm_head.double(), bias=None if p.bias is None else p.bias.double(),
        tables=tuple(t.double() for t in p.tables), tau=p.tau.double() if isinstance(p.tau, Tensor) else p.tau,
        upstream=tuple(d.double() for d in p.upstream), dlogprobs=p.dlogprobs.double(),
    )  # fmt: skip


def logits_of(p: Problem) -> Tensor:
    """Logits `[N, V]` of a flat problem in its dtype, as eager PyTorch computes them."""
    raw = F.linear(p.hidden, p.lm_head, None if p.bias is None else p.bias.to(p.hidden.dtype))
    return capped(raw, p.softcap)


def by_hand(p: Problem, ids: Tensor) -> Answer:
    """Materialised logits and the published formulas, in the problem's dtypes: float64 is the truth."""
    shape, p = p.dlogprobs.shape, flat(p)
    ids = ids.cpu().reshape(-1)
    logits = logits_of(p)
    rows, vocab = logits.shape
    g = truth_noise(p.noise, rows, vocab, logits)
    if rows == 0:
        g = g.reshape(0, vocab)
    out = by_formula(logits, p.tables, p.tau, g, ids, p.estimator, p.upstream, p.dlogprobs)
    slope = torch.ones_like(logits) if p.softcap is None else 1 - (logits / p.softcap) ** 2
    dl = torch.where(logits == -math.inf, 0.0, out.dlogits * slope)
    tau = out.dtau.reshape(shape)
    return Answer(
        tuple(e.reshape(*shape, e.shape[-1]) for e in out.embedding), ids.reshape(shape), out.logprobs.reshape(shape),
        (dl @ p.lm_head).reshape(*shape, p.lm_head.shape[1]), dl.T @ p.hidden,
        None if p.bias is None else dl.sum(0).to(p.bias.dtype), out.dtables, tau,
    )  # fmt: skip


def scores_of(p: Problem) -> Tensor:
    """`l + g` `[N, V]` in float64 on the CPU."""
    p = widened(flat(p))
    logits = logits_of(p)
    return logits + truth_noise(p.noise, *logits.shape, logits)


def close(
    ours: Tensor | None, theirs: Tensor | None, truth: Tensor | None, what: str, slim: float, unit: float
) -> None:
    """The tolerance rule over a whole tensor: |truth - ours| <= |truth - PyTorch| + slim * (largest entry).

    `unit` is the epsilon of the arithmetic; one rounding to the tensor's own dtype is allowed on top.
    """
    assert (ours is None) == (truth is None), f"{what}: there must {'not ' if truth is None else ''}be one"
    if ours is None or truth is None or theirs is None:
        return
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)} instead of {tuple(truth.shape)}"
    own = torch.finfo(ours.dtype).eps
    if ours.numel() == 0:
        return
    ours, theirs, truth = (x.detach().double().cpu() for x in (ours, theirs, truth))
    for value in (-math.inf, math.inf):
        assert torch.equal(ours == value, truth == value), f"{what}: infinities differ"
    finite = truth.isfinite()
    ours, theirs, truth = (torch.where(finite, x, 0.0) for x in (ours, theirs, truth))
    assert ours.isfinite().all(), f"{what}: not finite"
    error, reference = (truth - ours).abs().max(), (truth - theirs).abs().max()
    scale = max(1.0, float(truth.abs().max()))
    allowed = reference + (slim * unit + own) * scale
    assert error <= allowed, f"{what}: error {error:.3e}, PyTorch {reference:.3e}, allowed {allowed:.3e}"


def assert_answer(ours: Answer, theirs: Answer, truth: Answer, wanted: tuple[str, ...], slim: float, unit: float,
                  what: str = "") -> None:  # fmt: skip
    """All results and the wanted gradients by the tolerance rule; the other gradients must not exist."""
    for i, parts in enumerate(zip(ours.embedding, theirs.embedding, truth.embedding, strict=True)):
        close(*parts, f"{what} embedding[{i}]", slim, unit)
    close(ours.logprobs, theirs.logprobs, truth.logprobs, f"{what} logprobs", slim, unit)
    for name in GRADIENTS:
        several = name == "tables"
        columns = (getattr(a, name) if several else (getattr(a, name),) for a in (ours, theirs, truth))
        for i, (a, b, c) in enumerate(zip(*columns, strict=True)):
            if name not in wanted:
                assert a is None, f"{what}: a gradient of {name}[{i}] that nobody asked for"
                continue
            if name == "tau" and a is not None and a.dim() == 0:
                b, c = b.sum(), c.sum()
            close(a, b, c, f"{what} d {name}[{i}]", slim * (1 + (name in ("tau", "lm_head", "bias")) * 3), unit)


def small_chunks(monkeypatch: pytest.MonkeyPatch, elements: int = 1, gather: int = 64) -> None:
    """Chunks of the least width, and gathers in many pieces."""
    resize(monkeypatch, chunk=elements, head_chunk=elements, gather=gather)


def tiny_capacity(monkeypatch: pytest.MonkeyPatch, capacity: int) -> None:
    """A support buffer that holds `capacity` entries a row."""
    resize(monkeypatch, support=capacity)


@contextmanager
def allocations() -> Iterator[list[tuple[int, int]]]:
    """(bytes, total bytes allocated after it) of everything the CPU allocator gives or takes, kernels' included."""
    found: list[tuple[int, int]] = []
    # To record each operation as well would take several times as long as all operations do.
    memory_alone = functools.partial(autograd_profiler._enable_profiler, scopes={RecordScope.USER_SCOPE})
    with (
        mock.patch.object(autograd_profiler, "_enable_profiler", memory_alone),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        yield found
    live = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            found.append((event.nbytes(), live))
