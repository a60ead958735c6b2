"""`gumbel_softmax` on many rows of few tokens, at any place of a tensor: gates, routers, learned masks.

Kernels take many such rows at once. So what one row holds, and where it lies, must not matter to the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import scipy.stats
import torch
import torch.nn.functional as F

import grade_kernels as gk
from tests.support.helpers import DTYPES, grads, leaf, raises, randn
from tests.support.problems import allocations

Tensor = torch.Tensor
CHANCE = 1e-6  # how often a test of a distribution would fail by chance, were the seed not fixed

many_rows = pytest.mark.uncollect_if(lambda interpreted: interpreted, "the interpreter has no time for many rows")


@pytest.mark.uncollect_if(lambda interpreted, vocab: interpreted and vocab > 3, "a narrow row is one tile")
@pytest.mark.parametrize("vocab", range(2, 9))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tau", [0.05, 10.0])
@pytest.mark.parametrize("dim", [0, -1])
def test_one_open_token(
    backend: str, device: str, interpreted: bool, vocab: int, dtype: torch.dtype, tau: float, dim: int
) -> None:
    """It gets the whole weight, and no gradient, whatever arrives at the masked ones; NaN lies beside the rows."""
    rows = 3 if interpreted else 37
    open_token = torch.arange(rows, device=device) % vocab
    wide = torch.full((rows, vocab + 3), math.nan, dtype=dtype, device=device)
    logits = wide[:, 1 : 1 + vocab].fill_(-math.inf)
    logits[torch.arange(rows, device=device), open_token] = randn(rows, dtype=dtype, device=device) * 100
    expected = F.one_hot(open_token, vocab).to(dtype)
    # In plain PyTorch 0 times NaN is NaN, in PyTorch's own function as well.
    dy = torch.where(expected == 1, 3.0, 7.0 if backend in ("torch", "reference") else math.nan).to(dtype)
    if dim == 0:
        logits, expected, dy = logits.T, expected.T, dy.T
    for hard in (False, True):
        x = logits.detach().requires_grad_()
        y = gk.gumbel_softmax(x, tau, hard, dim=dim)
        assert torch.equal(y, expected)
        assert (torch.autograd.grad(y, x, dy)[0] == 0).all()


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(("shape", "dim"), [((0, 3), 1), ((3, 0), 0), ((2, 0, 5), 2), ((0, 7, 3), 1), ((3, 7, 0), 1),
                                            ((0, 1), 1), ((1, 0), 0), ((0, 0, 200), 2)])  # fmt: skip
def test_no_rows(backend: str, device: str, shape: tuple[int, ...], dim: int, hard: bool) -> None:
    x = torch.zeros(shape, device=device, requires_grad=True)
    tau = torch.ones([size for i, size in enumerate(shape) if i != dim], device=device, requires_grad=True)
    y = gk.gumbel_softmax(x, tau, hard, dim=dim)
    assert y.shape == shape
    assert y.stride() == F.gumbel_softmax(x, dim=dim).stride()
    y.sum().backward()
    assert x.grad.shape == shape
    assert tau.grad.shape == tau.shape


@pytest.mark.uncollect_if(lambda backend: backend == "reference", "compared with itself")
@pytest.mark.uncollect_if(lambda interpreted, vocab: interpreted and vocab not in (3, 8), "a narrow row is one tile")
@pytest.mark.parametrize("vocab", [1, 2, 3, 5, 8, 17])
@pytest.mark.parametrize("start", [1, 2**31 - 2, -1], ids=["shard", "half", "end"])
@pytest.mark.parametrize("dim", [0, 1])
def test_identities_at_their_limits(backend: str, device: str, vocab: int, start: int, dim: int) -> None:
    """Rows of any 64-bit identity, and the last tokens below 2^32."""
    row_ids = torch.tensor([-1, -(2**63), 2**63 - 1, 2**32, -(2**32), 2**31], device=device)
    noise = gk.GumbelNoise(-7, row_ids, vocab_start=start if start > 0 else 2**32 - vocab)
    logits = torch.zeros(6, vocab, device=device)
    for hard in (False, True):
        y = gk.gumbel_softmax(logits if dim == 1 else logits.T, 0.7, hard, dim=dim, noise=noise)
        truth = gk.reference.gumbel_softmax(logits.double(), 0.7, hard, noise=noise)
        torch.testing.assert_close(y if dim == 1 else y.T, truth.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.uncollect_if(lambda interpreted, vocab: interpreted and vocab != 3, "a narrow row is one tile")
@pytest.mark.parametrize("vocab", [1, 2, 3, 6, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_width_and_layout_do_not_change_the_token(
    backend: str, device: str, interpreted: bool, vocab: int, dtype: torch.dtype
) -> None:
    """A row among masked tokens, transposed, strided, misaligned or repeated is the row."""
    a, b = (2, 1) if interpreted else (5, 7)
    x = randn(a, vocab, b, dtype=dtype, device=device)
    noise = gk.GumbelNoise(11, vocab_start=1)
    token = gk.gumbel_softmax(x, 0.5, True, dim=1, noise=noise)

    def padded(width: int) -> Tensor:
        rest = x.new_full((a, width - vocab, b), -math.inf)
        y = gk.gumbel_softmax(torch.cat([x, rest], 1), 0.5, True, dim=1, noise=noise)
        assert (y[:, vocab:] == 0).all()
        return y[:, :vocab]

    layouts: dict[str, Callable[[], Tensor]] = {
        "tokens last": lambda: gk.gumbel_softmax(x.movedim(1, 2).contiguous(), 0.5, True, noise=noise).movedim(2, 1),
        "tokens first": lambda: gk.gumbel_softmax(x.movedim(1, 0).contiguous(), 0.5, True, dim=0, noise=noise).movedim(
            0, 1
        ),
        "every other": lambda: gk.gumbel_softmax(x.repeat_interleave(2, 1)[:, ::2], 0.5, True, dim=-2, noise=noise),
        "misaligned": lambda: gk.gumbel_softmax(
            torch.cat([x.new_full((1,), math.nan), x.flatten()])[1:].view(x.shape), 0.5, True, dim=1, noise=noise
        ),
        "of nine": lambda: padded(9),
        "of 65": lambda: padded(65),
        "of 200": lambda: padded(200),
    }
    for name, drawn in layouts.items():
        assert torch.equal(drawn(), token), name
    row = x[:1, :, :1]
    copies = gk.gumbel_softmax(row.expand(a, vocab, b), 0.5, True, dim=1, noise=noise)
    assert torch.equal(copies, gk.gumbel_softmax(row.repeat(a, 1, b), 0.5, True, dim=1, noise=noise))


@many_rows
@pytest.mark.parametrize("vocab", [2, 3, 6])
@pytest.mark.parametrize("dim", [0, 1])
def test_tokens_follow_their_distribution(backend: str, device: str, interpreted: bool, vocab: int, dim: int) -> None:
    """Chi-squared over many rows of the same logits, which every row draws with noise of its own."""
    rows = 40_000
    logits = torch.linspace(-1.0, 1.0, vocab, device=device)
    x = logits.expand(rows, vocab) if dim == 1 else logits[:, None].expand(vocab, rows)
    counts = gk.gumbel_softmax(x, 0.3, True, dim=dim, noise=gk.GumbelNoise(101)).sum(1 - dim)
    expected = logits.double().softmax(0) * rows
    assert scipy.stats.chisquare(counts.double().cpu(), expected.cpu()).pvalue > CHANCE


@many_rows
@pytest.mark.parametrize("tau", [0.1, 2.0])
def test_weights_of_two_tokens_follow_their_distribution(
    backend: str, device: str, interpreted: bool, tau: float
) -> None:
    """The difference of two Gumbel variables is logistic: of the weights' log-odds, times tau, less those of the logits."""
    rows, odds = 40_000, 0.8
    x = torch.tensor([odds, 0.0], dtype=torch.float64, device=device).expand(rows, 2)
    y = gk.gumbel_softmax(x, tau, noise=gk.GumbelNoise(102)).cpu()
    found = scipy.stats.logistic.cdf(tau * (y[:, 0].log() - y[:, 1].log()) - odds)
    counts = torch.histc(torch.from_numpy(found), 20, 0.0, 1.0)
    assert scipy.stats.chisquare(counts).pvalue > CHANCE


@pytest.mark.cover(3)  # kernels are chosen by dtype and width
@pytest.mark.uncollect_if(lambda interpreted, vocab: interpreted and vocab != 8, "a narrow row is one tile")
@pytest.mark.parametrize("vocab", [2, 8, 65])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", ["max", "min", "tiny", "subnormal"])
def test_logits_at_the_ends_of_a_dtype(
    backend: str, device: str, interpreted: bool, vocab: int, dtype: torch.dtype, value: str
) -> None:
    """Weights are finite and sum to 1, one wins, and of tokens that noise can not tell apart the first does."""
    info = torch.finfo(dtype)
    number = {"max": info.max, "min": info.min, "tiny": info.tiny, "subnormal": info.tiny * info.eps}[value]
    x = torch.full((3 if interpreted else 21, vocab), number, dtype=dtype, device=device)
    for tau in (0.05, 10.0):
        logits = leaf(x)
        y = gk.gumbel_softmax(logits, tau)
        (dx,) = grads(y.sum(), logits)
        assert y.isfinite().all()
        assert dx.isfinite().all()
        torch.testing.assert_close(y.double().sum(-1), torch.ones(len(x), dtype=torch.float64, device=device),
                                   rtol=0, atol=vocab * info.eps)  # fmt: skip
        one = gk.gumbel_softmax(x, tau, True)
        assert torch.equal(one.sort(-1).values[:, -2:], one.new_tensor([0.0, 1.0]).expand(len(x), 2))
        if abs(number) > 1e30:
            assert (one[:, 0] == 1).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dim", [0, 1])
def test_bad_rows_are_named(backend: str, device: str, interpreted: bool, value: float, dim: int) -> None:
    rows = 4 if interpreted else 50
    x = torch.zeros(rows, 3, device=device)
    if value == -math.inf:
        x[rows - 2] = value
    else:
        x[rows - 2, 2] = value
    for hard in (False, True):
        with raises(ValueError, f"row {rows - 2} "):
            gk.gumbel_softmax(x if dim == 1 else x.T, 1.0, hard, dim=dim)


@pytest.mark.parametrize("vocab", [2, 6, 33])
@pytest.mark.parametrize("dim", [0, 1])
def test_gradients_that_are_repeated(backend: str, device: str, rows: int, vocab: int, dim: int) -> None:
    """Upstream gradients of stride 0 along either dimension or both, and hooks that see and change them."""
    x = randn(*((rows, vocab) if dim == 1 else (vocab, rows)), device=device)
    noise, seen = gk.GumbelNoise(5), []
    for dy in (randn(1, x.shape[1], seed=1, device=device), randn(x.shape[0], 1, seed=2, device=device)):
        found = []
        for upstream in (dy.expand(x.shape), dy.expand(x.shape).contiguous()):
            z = leaf(x)
            z.register_hook(lambda gradient: seen.append(gradient.stride()) or 2 * gradient)
            gk.gumbel_softmax(z, 0.5, dim=dim, noise=noise).backward(upstream)
            found.append(z.grad)
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert set(seen) == {x.stride()}
    z = leaf(x)
    gk.gumbel_softmax(z, 0.5, dim=dim, noise=noise).sum().backward()
    assert z.grad.abs().max() < 1e-5


@pytest.mark.uncollect_if(lambda backend, interpreted: backend != "cpu", "other backends have no threads of their own")
@pytest.mark.parametrize("vocab", [2, 3, 8])
@pytest.mark.parametrize("dim", [0, 1])
def test_threads_do_not_change_a_bit(backend: str, device: str, interpreted: bool, vocab: int, dim: int) -> None:
    shape = (100_003, vocab) if dim == 1 else (vocab, 100_003)
    x, dy = randn(*shape), randn(*shape, seed=1)
    tau = (torch.rand(100_003, generator=torch.Generator().manual_seed(2)) + 0.1).unsqueeze(dim)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            z, t = leaf(x), leaf(tau)
            y = gk.gumbel_softmax(z, t, dim=dim, noise=gk.GumbelNoise(9))
            found.append((y, *torch.autograd.grad(y, (z, t), dy)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, more) for one, more in zip(*found, strict=True))


@pytest.mark.takes_long("gigabytes; fewer rows take the same path")
@pytest.mark.uncollect_if(lambda backend, device: backend != "cpu", "the account is that of the CPU allocator")
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
def test_ten_million_rows(backend: str, device: str, dim: int, hard: bool) -> None:
    """A few numbers a row beside the result, and the values of rows alone."""
    rows = 10**7
    x = randn(*((rows, 2) if dim == 1 else (2, rows))).requires_grad_()
    with allocations() as found:
        y = gk.gumbel_softmax(x, 0.5, hard, dim=dim, noise=gk.GumbelNoise(3))
        (dx,) = torch.autograd.grad(y, x, torch.ones((), device=device).expand(y.shape))
    assert max(level for _, level in found) < (8 + 8 + 20) * rows, "a result, a gradient, and five numbers"
    assert dx.abs().max() < 1e-6
    some = torch.tensor([0, 1, 12345, rows // 2 + 1, rows - 1])
    alone = x.detach().movedim(dim, 1)[some].double()
    truth = gk.reference.gumbel_softmax(alone, 0.5, hard, noise=gk.GumbelNoise(3, some))
    torch.testing.assert_close(y.detach().movedim(dim, 1)[some].double(), truth, rtol=1e-6, atol=1e-6)
    share = y.detach().select(dim, 0).mean(dtype=torch.float64)
    assert abs(share - 0.5) < 5 * 0.5 / rows**0.5 + 1e-3  # logits are random, too
