"""What must not matter to the operations through the head: chunks, batch, order of rows, sizes, a second run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import grade_kernels as gk
from tests.support.helpers import ESTIMATORS, leaf, noise_of, resize
from tests.support.problems import (
    Answer,
    Problem,
    assert_answer,
    by_hand,
    everything,
    problem,
    run,
    small_chunks,
    tiny_capacity,
    widened,
)

pytestmark = pytest.mark.usefixtures("poison")
EPSES = pytest.mark.parametrize("eps", [0.0, 2**-4])
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)
few_interpreted = pytest.mark.takes_long(
    "a second in the interpreter; soft and reinmax together make every pass that ste and st do",
    lambda interpreted, estimator: interpreted and estimator in ("ste", "st"),
)


def pairs(a: Answer, b: Answer) -> Any:
    for name in Answer._fields:
        x, y = getattr(a, name), getattr(b, name)
        for u, v in zip(*((z if isinstance(z, tuple) else (z,)) for z in (x, y)), strict=True):
            if u is not None or v is not None:
                yield name, u, v


def assert_close(a: Answer, b: Answer, tolerance: float = 2e-5) -> None:
    for name, x, y in pairs(a, b):
        if x.dtype == torch.int64:
            assert torch.equal(x, y), name
        else:
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def statistics(
    p: Problem, eps: float, ids: torch.Tensor | None = None, noise: gk.GumbelNoise | None = None, seed: int = 11
) -> list[torch.Tensor]:
    """Values and gradients of the three statistics of a problem's head (its reference: a sine of it)."""
    if ids is None:
        ids = torch.arange(p.dlogprobs.numel(), device=p.hidden.device).reshape(p.dlogprobs.shape) % p.lm_head.shape[0]
    found = []
    for kind in ("logprobs", "kl", "entropy"):
        torch.manual_seed(seed)
        inputs = [leaf(x) for x in (p.hidden, p.lm_head, p.bias) if x is not None]
        common: dict[str, Any] = {"bias": inputs[2] if p.bias is not None else None, "logit_softcap": p.softcap,
                                  "temperature": 0.8, "eps": eps, "noise": noise}  # fmt: skip
        if kind == "logprobs":
            value = gk.linear_logprobs(*inputs[:2], ids, **common)
        elif kind == "kl":
            value = gk.linear_kl(*inputs[:2], p.hidden.sin(), p.lm_head.cos(), ref_bias=p.bias, **common)
        else:
            value = gk.linear_entropy(*inputs[:2], **common)
        found += [value.detach(), *torch.autograd.grad((value * p.dlogprobs).sum(), inputs)]
    return found


def both(p: Problem, eps: float) -> list[torch.Tensor]:
    """Everything that all operations return and send back."""
    answer = run(p, eps)
    return [x for _, x, _ in pairs(answer, answer)] + statistics(p, eps)


@EPSES
@few_interpreted
@every_estimator
def test_chunks(backend: str, device: str, estimator: str, eps: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk, or many with ragged ends and gathers in pieces: the same to rounding; in float64 to 1e-12."""
    for dtype in (torch.float32, torch.float64) if backend in ("torch", "reference") else (torch.float32,):
        n = 2 if backend == "triton" else 5
        p = problem((n,), 1031 if backend != "triton" else 301, 7, dtype=dtype, table_dtypes=(dtype, dtype), bias=True,
                    softcap=5.0, tau="row", estimator=estimator, device=device)  # fmt: skip
        whole = both(p, eps)
        with pytest.MonkeyPatch.context() as patch:
            small_chunks(patch)
            resize(patch, tile_buffer=1)
            chunked = both(p, eps)
        tolerance = 5e-5 if dtype == torch.float32 else 1e-11
        for i, (a, b) in enumerate(zip(whole, chunked, strict=True)):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, i=i: f"result {i}: {m}")


@EPSES
@few_interpreted
@every_estimator
def test_batch_split_and_row_order(backend: str, device: str, interpreted: bool, estimator: str, eps: float) -> None:
    """With row identities a row's results do not depend on its neighbours, and summed gradients add up."""
    n = 4 if interpreted else 33
    p = problem((n,), 131, 7, bias=True, tau="row", estimator=estimator, device=device,
                noise=noise_of(3, n, device))  # fmt: skip
    whole = run(p, eps)
    order = torch.arange(n, device=device).flip(0)

    def rows(index: torch.Tensor) -> Problem:
        return p._replace(
            hidden=p.hidden[index], tau=p.tau[index], upstream=tuple(d[index] for d in p.upstream),
            dlogprobs=p.dlogprobs[index], noise=gk.GumbelNoise(p.noise.seed, p.noise.row_ids[index]),
        )  # fmt: skip

    parts = [run(rows(index), eps) for index in (order[:1], order[1 : n // 2], order[n // 2 :])]

    def joined(name: str) -> torch.Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    assert torch.equal(joined("ids"), whole.ids[order])
    for name in ("logprobs", "hidden", "tau"):
        torch.testing.assert_close(joined(name), getattr(whole, name)[order], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(torch.cat([x.embedding[0] for x in parts]), whole.embedding[0][order])
    for name in ("lm_head", "bias"):
        torch.testing.assert_close(sum(getattr(x, name) for x in parts), getattr(whole, name), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(sum(x.tables[0] for x in parts), whole.tables[0], rtol=2e-5, atol=2e-5)


@EPSES
def test_statistics_of_a_row_do_not_depend_on_its_place(backend: str, device: str, eps: float) -> None:
    """With a noise, the entries that backward visits belong to seed and row identity, not to torch's generator."""
    n = 4
    p = problem((n,), 131, 7, bias=True, device=device, noise=noise_of(3, n, device))
    order = torch.arange(n, device=device).flip(0)
    flipped = p._replace(
        hidden=p.hidden[order], dlogprobs=p.dlogprobs[order], noise=gk.GumbelNoise(p.noise.seed, p.noise.row_ids[order])
    )
    ids = torch.arange(n, device=device)
    whole = statistics(p, eps, ids=ids, noise=p.noise)
    moved = statistics(flipped, eps, ids=ids[order], noise=flipped.noise, seed=12)
    for i, (a, b) in enumerate(zip(whole, moved, strict=True)):
        expected = a[order] if len(a) == n else a
        torch.testing.assert_close(b, expected, rtol=2e-5, atol=2e-5, msg=lambda m, i=i: f"result {i}: {m}")


@pytest.mark.uncollect_if(lambda interpreted, vocab: interpreted and vocab not in (1, 127), "slow in the interpreter")
@EPSES
@every_estimator
@pytest.mark.parametrize("vocab", [1, 2, 17, 127, 1031])
def test_sizes(backend: str, device: str, interpreted: bool, estimator: str, vocab: int, eps: float) -> None:
    """No row, one row, many; vocabularies below a tile and prime; odd widths. Exact where nothing is rounded."""
    for n, features in ((0, 7), (1, 1), (5, 67), (33, 7)) if not interpreted else ((0, 7), (3, 1)):
        p = problem((n,), vocab, features, bias=True, tau="row", estimator=estimator, device=device)
        answer = run(p, eps)
        assert answer.ids.shape == (n,)
        assert ((answer.ids >= 0) & (answer.ids < vocab)).all()
        for name, x, _ in pairs(answer, answer):
            assert x.isfinite().all(), name
        if n == 0:
            assert all((x == 0).all() for x in (answer.lm_head, answer.bias, *answer.tables))
        if eps == 0:
            truth, theirs = by_hand(widened(p), answer.ids), by_hand(p, answer.ids)
            assert_answer(answer, theirs, truth, everything(p), 24.0, 2**-23, f"N={n} H={features}")
        for x in statistics(p, eps):
            assert x.isfinite().all()
        if vocab == 1:
            assert n == 0 or answer.logprobs.abs().max() <= 1e-6
            # Of dY in all, a few roundings of the logit, which forward and backward may take by other products.
            size = sum(float((d.abs() @ table.abs().T).sum()) for d, table in zip(p.upstream, p.tables, strict=True))
            assert (answer.bias.abs() <= 1e-5 + 1e-6 * size).all(), "one token has probability 1 whatever its logit"


@EPSES
@few_interpreted
@every_estimator
def test_two_runs_are_equal(backend: str, device: str, interpreted: bool, estimator: str, eps: float) -> None:
    """Bit for bit, forward and backward, on every thread; many rows hit the same tokens."""
    n = 3 if interpreted else 257
    p = problem((n,), 67 if interpreted else 523, 33, bias=True, tau="row", estimator=estimator, device=device)
    first = both(p, eps)
    for _ in range(1 if interpreted else 3):
        for i, (a, b) in enumerate(zip(first, both(p, eps), strict=True)):
            assert torch.equal(a, b), f"result {i}"


def test_seed_decides(backend: str, device: str) -> None:
    """Without noise each call draws a seed; torch.manual_seed repeats it, gradients included."""
    p = problem((8,), 131, 7, scale=0.1, device=device)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        hidden = leaf(p.hidden)
        out = gk.linear_gumbel_ste(hidden, p.lm_head, p.tables[0], eps=2**-4)
        out.embedding.sum().backward()
        ids, _ = gk.linear_gumbel_sample(p.hidden, p.lm_head)
        h = leaf(p.hidden)
        gk.linear_entropy(h, p.lm_head, eps=0.25).sum().backward()
        runs.append((out.ids, ids, hidden.grad, h.grad))
    for a, b, c in zip(*runs, strict=True):
        assert torch.equal(a, b)
        assert backend == "reference" or not torch.equal(a, c)
    assert not torch.equal(runs[0][0], runs[0][1]), "two calls drew the same noise"


@pytest.mark.uncollect_if(lambda backend: backend == "reference", "the reference collects no support")
@pytest.mark.parametrize("capacity", [0, 1, 3])
@few_interpreted
@every_estimator
def test_overflow_takes_the_dense_path(
    backend: str, device: str, estimator: str, capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows whose support does not fit are exact; the others keep their support."""
    p = problem((5,), 131, 7, bias=True, tau="row", estimator=estimator, device=device, softcap=6.0,
                table_dtypes=(torch.float32, torch.float32))  # fmt: skip
    # Two rows are so peaked that one entry is their support.
    hidden = p.hidden.clone()
    hidden[1] = hidden[3] = 0
    bias = p.bias.clone()
    bias[40] = 0.5
    p = p._replace(hidden=hidden, bias=bias)
    rounded, exact = run(p, 2**-6), run(p, 0.0)
    tiny_capacity(monkeypatch, capacity)
    ours = run(p, 2**-6)
    fits = torch.zeros(5, dtype=torch.bool, device=device)
    for row in range(5):
        near = [torch.allclose(ours.hidden[row], x.hidden[row], rtol=2e-5, atol=2e-5) for x in (exact, rounded)]
        assert any(near), f"row {row} is neither exact nor what it was with room"
        fits[row] = not near[0]
    assert not fits.all()
    if capacity == 0:
        assert_close(ours, exact)
    for x in statistics(p, 2**-6):
        assert x.isfinite().all()


@pytest.mark.uncollect_if(lambda backend: backend == "reference", "the reference collects no support")
@few_interpreted
@every_estimator
def test_rows_with_and_without_overflow(
    backend: str, device: str, estimator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mixture: peaked rows fit in the buffer, flat ones do not; gradients of shared tensors are the sum of both."""
    p = problem((6,), 200, 8, estimator=estimator, tau=0.5, device=device, scale=0.02,
                noise=noise_of(3, 6, device))  # fmt: skip
    hidden = p.hidden.clone()
    hidden[::2] = p.lm_head[7] / p.lm_head[7].norm() ** 2 * 60  # token 7 wins by far
    p = p._replace(hidden=hidden)
    eps = 2**-4
    roomy, exact = run(p, eps), run(p, 0.0)
    tiny_capacity(monkeypatch, 4)
    ours = run(p, eps)
    peaked, flat = torch.arange(0, 6, 2, device=device), torch.arange(1, 6, 2, device=device)
    assert not torch.allclose(roomy.hidden[flat], exact.hidden[flat], rtol=1e-3, atol=1e-4), "nothing was rounded"
    torch.testing.assert_close(ours.hidden[flat], exact.hidden[flat], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(ours.hidden[peaked], roomy.hidden[peaked], rtol=2e-5, atol=2e-5)

    def part(index: torch.Tensor, eps: float) -> Answer:
        return run(
            p._replace(hidden=p.hidden[index], upstream=tuple(d[index] for d in p.upstream),
                       dlogprobs=p.dlogprobs[index], noise=gk.GumbelNoise(p.noise.seed, p.noise.row_ids[index])),
            eps,
        )  # fmt: skip

    sparse, dense = part(peaked, eps), part(flat, 0.0)
    summed = sparse.lm_head + dense.lm_head
    others = torch.arange(200, device=device) != 7
    torch.testing.assert_close(ours.lm_head[others], summed[others], rtol=2e-5, atol=2e-5)
    # Token 7's is what rounding leaves of nearly nothing, times hidden states in the hundreds.
    torch.testing.assert_close(ours.lm_head[7], summed[7], rtol=2e-5, atol=float(2e-4 * hidden.abs().max()))
    torch.testing.assert_close(ours.tables[0], sparse.tables[0] + dense.tables[0], rtol=2e-5, atol=2e-5)


@pytest.mark.uncollect_if(lambda backend: backend == "reference", "the reference collects no support")
def test_overflow_of_statistics(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem((4,), 131, 7, bias=True, softcap=4.0, device=device)
    exact = statistics(p, 0.0)
    tiny_capacity(monkeypatch, 0)
    for a, b in zip(statistics(p, 2**-5), exact, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_coarse_eps_keeps_what_is_certain(backend: str, device: str) -> None:
    """Where every p is 0 or at least eps nothing is rounded: eps and exact gradients agree."""
    p = problem((4,), 9, 3, bias=True, tau=1.0, scale=0.01, device=device, estimator="st")
    bias = torch.full((9,), -math.inf, device=device)
    bias[:4] = 0.0
    p = p._replace(bias=bias)
    exact = run(p, 0.0)
    for eps in (0.2, 1e-38, 1e-60):  # also where float32 has no such number
        assert_close(run(p, eps), exact)
        for a, b in zip(statistics(p, eps), statistics(p, 0.0), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.uncollect_if(lambda backend: backend in ("reference", "torch"), "compared with itself")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@every_estimator
def test_backends_agree_on_the_rounding(
    backend: str, device: str, interpreted: bool, estimator: str, dtype: torch.dtype
) -> None:
    """Gradients with eps are a function of the noise, hence the same on every backend (torch's, in float64, here)."""
    n = 2 if interpreted else 9
    p = problem((n,), 67, 5, bias=True, tau="row", estimator=estimator, dtype=dtype, device=device)
    # Multiples of 1/8 and short sums: logits are the same in every dtype.
    p = p._replace(hidden=(p.hidden * 4).round() / 4, lm_head=(p.lm_head * 4).round() / 4, bias=p.bias.round())
    ours = run(p, 2**-4)
    with gk.use_backend("torch"):
        truth = run(widened(p), 2**-4)
    assert torch.equal(ours.ids, truth.ids)
    tolerance = max(2e-5, 2 * torch.finfo(dtype).eps)
    for name, a, b in pairs(ours, truth):
        scale = max(1.0, float(b.abs().max())) if b.dtype.is_floating_point else 1.0
        assert (a.double() - b.double()).abs().max() <= tolerance * scale, name
