"""The operations through an LM head, and the ways to do the same in PyTorch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import grade_kernels as gk
from benchmarks import rivals
from benchmarks.harness import OURS, Case, Contestants, compiled

TAU = 1.0
ENTROPY = 3.5  # nats, of the logits' softmax
SEED = 20260101
CHUNK = 4096  # columns of the chunked bare product
# Logits of 20 in bfloat16 are off by up to 0.06, and so are their weights.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


def deviation(vocab: int) -> float:
    """Standard deviation at which `vocab` normal logits have the entropy above (by their quantiles, not by a draw)."""
    normal = torch.special.ndtri((torch.arange(vocab, dtype=torch.float64) + 0.5) / vocab)
    low, high = 0.0, 20.0
    for _ in range(30):
        middle = (low + high) / 2
        peaked = torch.special.entr((middle * normal).softmax(0)).sum() < ENTROPY
        low, high = (low, middle) if peaked else (middle, high)
    return low


class Inputs:
    """Hidden states that need a gradient, a frozen head and a frozen table; for KL a reference of the same kind."""

    def __init__(self, case: Case) -> None:
        assert case.H is not None
        generator = torch.Generator(case.device).manual_seed(1)

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=case.device).mul_(scale).to(case.torch_dtype)

        self.hidden = normal(case.N, case.H).requires_grad_()
        spread = deviation(case.V) / case.H**0.5
        self.head = normal(case.V, case.H, scale=spread)
        self.table = None if case.D is None else normal(case.V, case.D)
        self.upstream = normal(case.N, case.D or 1)
        self.ids = torch.randint(0, case.V, (case.N,), generator=generator, device=case.device)
        if case.op == "linear_kl":
            self.ref_hidden, self.ref_head = normal(case.N, case.H), normal(case.V, case.H, scale=spread)

    def at(self, rows: torch.Tensor) -> Inputs:
        """Some of the rows, in float64, in which the reference then computes."""
        some = copy.copy(self)
        some.table = None if self.table is None else self.table.double()
        some.hidden = self.hidden.detach()[rows].double().requires_grad_()
        some.upstream, some.ids = self.upstream[rows].double(), self.ids[rows]
        if hasattr(self, "ref_hidden"):
            some.ref_hidden = self.ref_hidden[rows].double()
        return some


@functools.lru_cache(maxsize=1)
def inputs(case: Case) -> Inputs:
    """Those that a case and its checks share; `build` lets go of those of the case before."""
    return Inputs(case)


def ways(device: str) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """Ours by its ways through a head on a device: what a call takes by itself, then each by name, as a context."""
    backend = gk.backends.select(torch.device(device), torch.bfloat16)
    found: dict[str, Callable[[], AbstractContextManager[Any]]] = {OURS: nullcontext}
    for way in gk.backends.HEAD_WAYS:
        if backend in ("triton", "cuda") and way != "auto":
            found[f"{OURS} {way}"] = partial(gk.use_backend, f"{backend}:{way}")
    return found


def _ours(op: str, x: Inputs, library: Any = gk, **options: Any) -> torch.Tensor:
    """The operation of `grade_kernels` or of `grade_kernels.reference`."""
    if op.startswith("linear_gumbel_ste"):
        assert x.table is not None
        if op.endswith("eps=0"):
            options["eps"] = 0.0
        if op.endswith("soft"):
            options["estimator"] = "soft"
        return library.linear_gumbel_ste(x.hidden, x.head, x.table, TAU, **options).embedding
    if op == "linear_gumbel_sample":
        return library.linear_gumbel_sample(x.hidden, x.head, **options)[0]
    if op == "linear_kl":
        return library.linear_kl(x.hidden, x.head, x.ref_hidden, x.ref_head, **options)
    return library.linear_logprobs(x.hidden, x.head, x.ids, **options)


def _theirs(op: str) -> Callable[[Inputs], torch.Tensor]:
    def embed(x: Inputs) -> torch.Tensor:
        return F.gumbel_softmax(x.hidden @ x.head.T, TAU, hard=not op.endswith("soft")) @ x.table

    def sample(x: Inputs) -> torch.Tensor:
        return F.gumbel_softmax(x.hidden @ x.head.T, TAU, hard=True)

    def kl(x: Inputs) -> torch.Tensor:
        logp = (x.hidden @ x.head.T).log_softmax(-1)
        return (logp.exp() * (logp - (x.ref_hidden @ x.ref_head.T).log_softmax(-1))).sum(-1)

    def logprobs(x: Inputs) -> torch.Tensor:
        return -F.cross_entropy(x.hidden @ x.head.T, x.ids, reduction="none")

    if op.startswith("linear_gumbel_ste"):
        return embed
    return {"linear_gumbel_sample": sample, "linear_kl": kl, "linear_logprobs": logprobs}[op]


def _step(case: Case, function: Callable[[], torch.Tensor], x: Inputs) -> tuple[torch.Tensor, ...]:
    if case.pass_ == "forward":
        with torch.no_grad():
            return (function(),)
    y = function()
    upstream = x.upstream if y.dim() == 2 else torch.ones_like(y)
    return y, *torch.autograd.grad(y, x.hidden, upstream)


def _backward_alone(x: Inputs) -> Callable[[], tuple[torch.Tensor, ...]]:
    y = _ours("linear_gumbel_ste", x, noise=gk.GumbelNoise(SEED))
    return lambda: torch.autograd.grad(y, x.hidden, x.upstream, retain_graph=True)


def _products(case: Case, x: Inputs) -> Contestants:
    """The bare matrix product that no method can avoid (two for KL): whole, and by chunks into one buffer."""
    pairs = [(x.hidden.detach(), x.head)]
    if case.op == "linear_kl":
        pairs.append((x.ref_hidden, x.ref_head))
    width = min(CHUNK, case.V)
    buffer = torch.empty(case.N, width, dtype=case.torch_dtype, device=case.device)
    flipped = torch.empty(width, case.N, dtype=case.torch_dtype, device=case.device)

    def chunks(hidden: torch.Tensor, head: torch.Tensor) -> None:
        for part in head.split(width):
            torch.mm(hidden, part.T, out=buffer if len(part) == width else None)

    def flipped_chunks(hidden: torch.Tensor, head: torch.Tensor) -> None:
        columns = hidden.T.contiguous()
        for part in head.split(width):
            torch.mm(part, columns, out=flipped if len(part) == width else None)

    return {
        "gemm": lambda: [hidden @ head.T for hidden, head in pairs],
        "gemm chunks": lambda: [chunks(*pair) for pair in pairs],
        "gemm flipped chunks": lambda: [flipped_chunks(*pair) for pair in pairs],
    }


def build(case: Case) -> Contestants:
    """Ours in each of its ways, the bare product, eager and compiled PyTorch, and what other libraries have."""
    inputs.cache_clear()
    x = inputs(case)
    if case.pass_ == "backward":
        return {OURS: _backward_alone(x)}
    theirs = _theirs(case.op)
    squeezed = compiled(theirs)

    def by(way: Callable[[], AbstractContextManager[Any]]) -> tuple[torch.Tensor, ...]:
        with way():
            return _step(case, lambda: _ours(case.op, x), x)

    contestants: Contestants = {name: partial(by, way) for name, way in ways(case.device).items()}
    contestants |= _products(case, x)
    contestants["eager"] = lambda: _step(case, lambda: theirs(x), x)
    contestants["compiled"] = lambda: _step(case, lambda: squeezed(x), x)
    present, _ = rivals.of(case.op, case.device)
    return contestants | {name: lambda work=work: _step(case, lambda: work(x), x) for name, work in present.items()}


def checks(case: Case, contestants: Contestants) -> dict[str, Callable[[], None]]:
    """By contestant what must hold before it is timed, but for the first: our other ways, and other libraries."""
    others: dict[str, Callable[[], None]] = {}
    for name, way in ways(case.device).items():
        if name != OURS:
            others[name] = partial(check, case, way)
    present, _ = rivals.of(case.op, case.device)
    return others | {name: partial(check_rival, case, contestants[name]) for name in present}


def _some_rows(case: Case) -> torch.Tensor:
    return torch.tensor(sorted({0, case.N // 2, case.N - 1}), device=case.device)


def check(case: Case, way: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
    """Compare ours, in one of its ways, with the reference in float64, on the first row, one in the middle and the last.

    Narrow logits may change which token wins, so the reference is given ours, whose score must be the best but for
    their rounding. With a stochastic support the gradient is random, so it is compared at `eps=0`.

    Raises:
        AssertionError: a sample, value or gradient differs.
    """
    x, rows = inputs(case), _some_rows(case)
    if case.pass_ == "backward":
        case = replace(case, pass_="forward+backward")
    some = x.at(rows)
    options: dict[str, Any] = {} if case.op == "linear_gumbel_sample" else {"eps": 0.0}
    given: dict[str, Any] = {}
    if "gumbel" in case.op:
        options["noise"], given["noise"] = gk.GumbelNoise(SEED), gk.GumbelNoise(SEED, rows)
        with way():
            ids = gk.linear_gumbel_sample(x.hidden, x.head, noise=options["noise"])[0][rows]
        logits = gk.reference.head_logits(some.hidden.detach(), x.head)
        scores = logits + given["noise"].dense(len(rows), case.V, dtype=torch.float64).to(logits.device)
        slack = 2.0 * torch.finfo(case.torch_dtype).eps * logits.abs().amax(-1)
        best = scores.gather(-1, ids[:, None])[:, 0] >= scores.amax(-1) - slack
        assert best.all(), f"{case}: another sample than the reference's"
        if case.op == "linear_gumbel_sample":
            return
        given["ids"] = ids
    with way():
        full = _step(case, lambda: _ours(case.op, x, **options), x)
    truth = _step(case, lambda: _ours(case.op, some, gk.reference, **(options | given)), some)
    _agree(case, [part.detach()[rows] for part in full], truth)


def check_rival(case: Case, work: Callable[[], tuple[torch.Tensor, ...]]) -> None:
    """Compare what is going to be timed with the reference in float64, on the same rows.

    Of a sum, each row's gradient is compared; its value, with the sum of ours, which has been found right.

    Raises:
        AssertionError: a value or gradient differs.
    """
    x, rows = inputs(case), _some_rows(case)
    some = x.at(rows)
    value, *gradients = _step(case, lambda: _ours(case.op, some, gk.reference), some)
    found, *slopes = work()
    if found.dim() == 0:
        value = _ours(case.op, x).sum()
    else:
        found = found[rows]
    _agree(case, [found, *(slope[rows] for slope in slopes)], [value, *gradients])


def _agree(case: Case, found: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> None:
    for what, mine, expected in zip(("output", "gradient"), found, truth, strict=False):
        mine, expected = mine.detach().double(), expected.detach().double()
        error = (mine - expected).norm() / expected.norm()
        assert error <= TOLERANCE[case.dtype], f"{case}: relative error of the {what} is {error:.1e}"
