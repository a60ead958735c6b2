"""`gumbel_softmax` and `gumbel_ste` on every backend: values and gradients against float64, PyTorch and each other."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import grade_kernels as gk
from tests.support.helpers import (
    DTYPES,
    LAYOUTS,
    ODD_VOCABS,
    assert_accurate,
    compute_dtype,
    grads,
    injected_noise,
    leaf,
    masked,
    noise_given,
    noise_of,
    randn,
    resize,
    row_taus,
    truth_noise,
)

pytestmark = pytest.mark.usefixtures("poison")


def plain(logits: torch.Tensor, g: torch.Tensor, tau: Any) -> torch.Tensor:
    """The softmax of F.gumbel_softmax, in the dtype of its arguments; tau per row or a number."""
    tau = tau[..., None] if isinstance(tau, torch.Tensor) and tau.dim() else tau
    return ((logits + g) / tau).softmax(-1)


class Case:
    """One call's results and gradients: ours, PyTorch's in the same dtype, and the float64 truth."""

    def __init__(
        self, logits: torch.Tensor, tau: torch.Tensor, noise: gk.GumbelNoise | gk.PosteriorNoise, hard: bool = False
    ) -> None:
        rows, vocab = logits.shape
        dy = randn(rows, vocab, dtype=logits.dtype, device=logits.device.type, seed=8)
        g = truth_noise(noise, rows, vocab, logits)
        x, t = leaf(logits), leaf(tau)
        self.y = gk.gumbel_softmax(x, t[:, None], hard, noise=noise)
        self.dlogits, self.dtau = grads((self.y * dy).sum(), x, t)
        x, t = leaf(logits.cpu()), leaf(tau.cpu().to(logits.dtype))
        self.torch_y = plain(x, g.to(logits.dtype), t)
        self.torch_dlogits, self.torch_dtau = grads((self.torch_y * dy.cpu()).sum(), x, t)
        x, t = leaf(logits.cpu().double()), leaf(tau.cpu().double())
        self.true_y = plain(x.masked_fill(x == -math.inf, -1e300), g, t)
        self.true_dlogits, self.true_dtau = grads((self.true_y * dy.cpu().double()).sum(), x, t)
        with torch.no_grad():
            # What cancels: p * dy against p * (p . dy), and in dtau those against each other over the vocabulary.
            self.terms = self.true_y * dy.cpu().double().abs() / t[:, None]
            z = torch.where(x == -math.inf, 0.0, x + g).abs()
            self.tau_terms = (self.terms * z).sum(1) / t

    def check(self) -> None:
        # PyTorch sends NaN to tau through a masked logit: no excuse for us.
        self.torch_dtau = torch.where(self.torch_dtau.isfinite(), self.torch_dtau, self.true_dtau.to(self.dtau.dtype))
        assert_accurate(self.y, self.torch_y, self.true_y, "y", terms=self.true_y * 4)
        assert_accurate(self.dlogits, self.torch_dlogits, self.true_dlogits, "dlogits", terms=self.terms)
        # One number a row: the rows' errors are compared as a whole, since a single one may be nought by luck.
        theirs = self.torch_dtau.to(self.dtau.dtype)
        assert_accurate(self.dtau, theirs, self.true_dtau, "dtau", terms=self.tau_terms)


@pytest.mark.parametrize("known", [False, True], ids=["", "known logprobs"])
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("vocab", ODD_VOCABS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_of_given_tokens(
    backend: str, device: str, rows: int, dtype: torch.dtype, vocab: int, hard: bool, known: bool
) -> None:
    """A soft sample by the formula, and a hard one exactly the one-hot of the given token, with the soft one's gradient."""
    logits, tau = masked(randn(rows, vocab, dtype=dtype, device=device) * 2), row_taus(rows, dtype, device)
    noise = noise_given(noise_of(3, rows, device, vocab_start=vocab + 1), logits, known=known)
    case = Case(logits, tau, noise, hard)
    if hard:
        assert torch.equal(case.y, F.one_hot(noise.ids, vocab).to(dtype))
        case.y = gk.gumbel_softmax(logits, tau[:, None], noise=noise)
    case.check()


@pytest.mark.parametrize("dim", [0, 1, -2, -1])
def test_noise_of_given_tokens_in_any_dimension(backend: str, device: str, interpreted: bool, dim: int) -> None:
    x = leaf(randn(*((2, 1, 3) if interpreted else (3, 4, 7)), dtype=torch.float64, device=device))
    moved = x.detach().movedim(dim, -1)
    noise = noise_given(noise_of(), moved, known=True)
    g = truth_noise(noise, moved[..., 0].numel(), moved.shape[-1], moved.reshape(-1, moved.shape[-1]))
    truth = ((moved + g.view(moved.shape).to(device)) / 0.7).softmax(-1).movedim(-1, dim)
    torch.testing.assert_close(gk.gumbel_softmax(x, 0.7, dim=dim, noise=noise), truth, rtol=1e-10, atol=1e-13)
    hard = gk.gumbel_ste(x, 0.7, dim=dim, noise=noise)
    assert torch.equal(hard.detach().movedim(dim, -1), F.one_hot(noise.ids, moved.shape[-1]).double())
    dy = randn(*x.shape, dtype=torch.float64, device=device, seed=4)
    dx = truth * (dy - (truth * dy).sum(dim, keepdim=True)) / 0.7
    torch.testing.assert_close(grads((hard * dy).sum(), x)[0], dx, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("mask", [False, True], ids=["open", "masked"])
@pytest.mark.parametrize("vocab", ODD_VOCABS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_soft(backend: str, device: str, rows: int, dtype: torch.dtype, vocab: int, mask: bool) -> None:
    logits = randn(rows, vocab, dtype=dtype, device=device) * 2
    logits = masked(logits) if mask else logits
    case = Case(logits, row_taus(rows, dtype, device), noise_of(3, rows, device, vocab_start=vocab + 1))
    case.check()
    assert case.y.dtype == case.dlogits.dtype == dtype
    assert (case.y[logits == -math.inf] == 0).all()
    assert (case.dlogits[logits == -math.inf] == 0).all()


@pytest.mark.parametrize("mask", [False, True], ids=["open", "masked"])
@pytest.mark.parametrize("vocab", [1, 3, 127, 1031])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hard(backend: str, device: str, rows: int, dtype: torch.dtype, vocab: int, mask: bool) -> None:
    """Exactly one-hot at the sampled token, and the gradient of soft to the last bit."""
    logits = randn(rows, vocab, dtype=dtype, device=device) * 2
    logits = masked(logits) if mask else logits
    tau, noise = row_taus(rows, dtype, device), noise_of(3, rows, device)
    soft, hard = Case(logits, tau, noise), Case(logits, tau, noise, hard=True)
    ids = gk.gumbel_sample(logits, noise=noise)
    assert hard.y.dtype == dtype
    assert torch.equal(hard.y, F.one_hot(ids, vocab).to(dtype))
    assert torch.equal(gk.gumbel_ste(logits, tau, noise=noise), hard.y)
    if backend == "reference":  # autograd's own rounding
        torch.testing.assert_close(hard.dlogits, soft.dlogits)
        torch.testing.assert_close(hard.dtau, soft.dtau)
    else:
        assert torch.equal(hard.dlogits, soft.dlogits)
        assert torch.equal(hard.dtau, soft.dtau)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_results_are_rounded_once(backend: str, device: str, rows: int, dtype: torch.dtype) -> None:
    """A narrow result is the float32 result of equal inputs, rounded: at most the odd entry near a tie differs."""
    logits, noise = randn(rows, 1000, dtype=dtype, device=device), noise_of()
    for tau in (0.5, 2.0):
        wide = gk.gumbel_softmax(logits.float(), tau, noise=noise).to(dtype)
        assert (gk.gumbel_softmax(logits, tau, noise=noise) != wide).float().mean() < 0.005


def test_many_rows(backend: str, device: str, interpreted: bool) -> None:
    rows, vocab = (11, 131) if interpreted else (131, 261)
    tau = torch.linspace(0.25, 2.0, rows, device=device)
    Case(randn(rows, vocab, device=device), tau, noise_of(3, rows, device)).check()


def test_large_vocabulary(backend: str, device: str, interpreted: bool) -> None:
    vocab = 151937 if backend == "cpu" or device == "cuda" else 9001
    for dtype in (torch.bfloat16,) if interpreted else (torch.float32, torch.bfloat16):
        logits = randn(2, vocab, device=device, dtype=dtype) * 3
        Case(logits, row_taus(2, dtype, device), gk.GumbelNoise(11)).check()


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_pytorch_with_our_noise_injected(
    backend: str, device: str, interpreted: bool, dtype: torch.dtype, hard: bool
) -> None:
    """F.gumbel_softmax and we: same values, same gradient, in any dimension."""
    tolerance: dict[str, Any] = (
        {"rtol": 1e-10, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 1e-6}
    )
    shape = (2, 1, 3) if interpreted else (3, 4, 29)
    for dim in (-1, 0, 1):
        x, y = (leaf(randn(*shape, dtype=dtype, device=device)) for _ in range(2))
        dy = randn(*shape, dtype=dtype, device=device, seed=4)
        moved = x.movedim(dim, -1)
        noise = gk.GumbelNoise(7)
        g = truth_noise(noise, moved[..., 0].numel(), moved.shape[-1]).view(moved.shape).movedim(-1, dim).to(device)
        with injected_noise(g):
            theirs = F.gumbel_softmax(y, 0.7, hard, dim=dim)
        ours = gk.gumbel_softmax(x, 0.7, hard, dim=dim, noise=noise)
        torch.testing.assert_close(ours, theirs, **tolerance)
        torch.testing.assert_close(grads((ours * dy).sum(), x), grads((theirs * dy).sum(), y), **tolerance)


def test_hard_gradients_can_be_told_from_zero(backend: str, device: str) -> None:
    x = leaf(randn(2, 9, device=device))
    assert (grads((gk.gumbel_ste(x, noise=noise_of()) * torch.arange(9.0, device=device)).sum(), x)[0] != 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(backend: str, device: str, rows: int, layout: str, dtype: torch.dtype) -> None:
    """Logits and upstream gradient of any layout give what contiguous ones give, to the last bit."""
    logits = randn(rows, 131, dtype=dtype, device=device)
    dy = randn(rows, 131, dtype=dtype, device=device, seed=4)

    def run(lay: Any, lay_dy: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x = lay(logits).detach().requires_grad_()
        y = gk.gumbel_softmax(x, 0.5, noise=gk.GumbelNoise(5))
        (dx,) = torch.autograd.grad(
            y, x, lay_dy(dy).view(y.shape) if lay is LAYOUTS["leading dimensions"] else lay_dy(dy)
        )
        assert y.shape == dx.shape == x.shape
        return y.reshape(logits.shape), dx.reshape(logits.shape)

    expected = run(lambda x: x, lambda x: x)
    plainly = LAYOUTS["leading dimensions"]
    for lay, lay_dy in ((LAYOUTS[layout], lambda x: x), (lambda x: x, LAYOUTS[layout]), (LAYOUTS[layout],) * 2):
        if lay_dy is plainly:
            continue
        for ours, theirs in zip(run(lay, lay_dy), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-7)


@pytest.mark.cover(1)
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("layout", ["plain", "channels last", "transposed", "every second", "part", "repeated"])
@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1, -2])
def test_layout_of_the_result(backend: str, device: str, dim: int, layout: str, hard: bool) -> None:
    """Strides are PyTorch's, of the result and of the gradient, so that the same views are possible."""
    x = randn(2, 3 if dim == 2 else 8, 4, 1, device=device)
    x = {
        "plain": lambda x: x,
        "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
        "every second": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
        "part": lambda x: F.pad(x, (1, 2, 0, 0, 3, 0))[:, 3:, :, 1:-2],
        "repeated": lambda x: x[:, :, :1].expand(x.shape),
    }[layout](x)
    results = []
    for where in (F, gk):
        leaf_x = x.detach().requires_grad_()
        y = where.gumbel_softmax(leaf_x, 0.5, hard, dim=dim)
        (gradient,) = torch.autograd.grad(y.square().sum(), leaf_x, retain_graph=True)
        y.square().sum().backward()
        results.append((y, gradient, leaf_x.grad))
    for theirs, ours in list(zip(*results, strict=True))[: 1 if backend == "reference" else None]:
        assert ours.stride() == theirs.stride()
    assert results[1][0].view(2, -1).shape == (2, x[0].numel())


@pytest.mark.uncollect_if(lambda backend: backend == "reference", "no operation of its own")
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_layout_of_the_fake_result(backend: str, device: str, dim: int) -> None:
    """What torch.compile plans with is what comes: in strides, and for a batch of none."""
    for shape in ((2, 3, 4), (2, 3, 1), (1, 3, 4), (0, 3, 4), (4, 3, 0)):
        x = torch.zeros(shape, device=device).transpose(1, 2)
        if x.shape[dim] == 0:
            continue
        tau = torch.ones(x.numel() // x.shape[dim], device=device)
        noise = (torch.tensor(1), None, 0, None, None, None, None)  # no given tokens
        args = (tau, True, *noise, dim, False, backend)
        real = torch.ops.grade_kernels.gumbel_softmax(x, *args)[0]
        fake = torch.ops.grade_kernels.gumbel_softmax(x.to("meta"), tau.to("meta"), *args[1:])[0]
        assert real.stride() == fake.stride() == torch.empty(x.shape).stride()


def test_expanded_logits_and_gradients(backend: str, device: str, rows: int) -> None:
    """Stride 0 on both sides: one row of logits for many draws, a sum's gradient."""
    row = leaf(randn(1, 37, device=device))
    weights = randn(37, device=device, seed=4)
    y = gk.gumbel_softmax(row.expand(rows, 37), 0.5, noise=gk.GumbelNoise(5))
    (ours,) = torch.autograd.grad(y, row, weights.expand(rows, 37))
    repeated = row.detach().repeat(rows, 1).requires_grad_()
    y = gk.gumbel_softmax(repeated, 0.5, noise=gk.GumbelNoise(5))
    (theirs,) = torch.autograd.grad(y, repeated, weights.repeat(rows, 1))
    torch.testing.assert_close(ours[0], theirs.sum(0))
    y = gk.gumbel_softmax(repeated, 0.5, noise=gk.GumbelNoise(5))
    assert grads(y.sum(), repeated)[0].abs().max() < 1e-6  # the sum is 1 whatever the logits


@pytest.mark.cover(1)
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
@pytest.mark.parametrize("hard", [False, True])
def test_dims(backend: str, device: str, interpreted: bool, dim: int, hard: bool) -> None:
    shape = (2, 3, 1 if dim in (0, -3) else 2) if interpreted else (2, 3, 5)
    logits = randn(*shape, dtype=torch.float64, device=device)
    dy = randn(*shape, dtype=torch.float64, device=device, seed=4)
    x, z = leaf(logits), leaf(logits.movedim(dim, -1).contiguous())
    tau = torch.rand(z.shape[:-1], dtype=torch.float64, device=device) + 0.5
    y = gk.gumbel_softmax(x, tau, hard, dim=dim, noise=gk.GumbelNoise(2))
    expected = gk.gumbel_softmax(z, tau, hard, noise=gk.GumbelNoise(2))
    torch.testing.assert_close(y, expected.movedim(-1, dim))
    (dx,), (dz,) = grads((y * dy).sum(), x), grads((expected * dy.movedim(dim, -1)).sum(), z)
    torch.testing.assert_close(dx, dz.movedim(-1, dim))
    assert torch.equal(gk.gumbel_ste(x, tau, dim, noise=gk.GumbelNoise(2)).argmax(dim), y.argmax(dim))


@pytest.mark.cover(1)
@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 1, 7), (2, 3, 2, 7), (0, 7), (2, 0, 7), (0, 0, 7), (0, 1)])
@pytest.mark.parametrize("hard", [False, True])
def test_leading_shapes(backend: str, device: str, shape: tuple[int, ...], hard: bool) -> None:
    x, tau = leaf(randn(*shape, device=device)), leaf(torch.ones(shape[:-1], device=device))
    y = gk.gumbel_softmax(x, tau, hard, noise=gk.GumbelNoise(2))
    assert y.shape == shape
    assert y.dtype == torch.float32
    dx, dtau = torch.autograd.grad((y * torch.arange(shape[-1], device=device)).sum(), (x, tau))
    assert dx.shape == shape
    assert dtau.shape == shape[:-1]
    if x.numel():
        flat = gk.gumbel_softmax(x.view(-1, shape[-1]), 1.0, hard, noise=gk.GumbelNoise(2))
        assert torch.equal(y, flat.view(shape))


@pytest.mark.parametrize("shape", [(0, 70000), (2, 70000, 0), (0, 70000, 2)])
@pytest.mark.parametrize("hard", [False, True])
def test_no_rows_of_a_large_vocabulary(backend: str, device: str, shape: tuple[int, ...], hard: bool) -> None:
    """Whose identities are none, either."""
    noise = gk.GumbelNoise(2, torch.zeros(0, dtype=torch.int64, device=device))
    x = leaf(randn(*shape, device=device))
    y = gk.gumbel_softmax(x, 0.7, hard, dim=1, noise=noise)
    assert y.shape == grads(y.sum(), x)[0].shape == shape


# --- tau


@pytest.mark.cover(1)
@pytest.mark.parametrize("hard", [False, True])
def test_forms_of_tau(backend: str, device: str, interpreted: bool, hard: bool) -> None:
    """A number, 0-d tensors of several dtypes, and one value per row as [2, 3], [2, 3, 1] and [6]: the same result."""
    logits = randn(2, 3, 17, device=device)
    expected = gk.gumbel_softmax(logits, 0.5, hard, noise=noise_of())
    per_row = torch.full((2, 3), 0.5, device=device)
    forms: list[Any] = [torch.tensor(0.5, dtype=dtype, device=device) for dtype in DTYPES]
    forms += [
        per_row,
        per_row[..., None],
        per_row.flatten(),
        per_row.double(),
        per_row.bfloat16(),
        per_row.T.contiguous().T,
    ]
    for tau in forms[:: 3 if interpreted else 1]:
        assert torch.equal(gk.gumbel_softmax(logits, tau, hard, noise=noise_of()), expected)
    one = gk.gumbel_softmax(logits, 1.0, hard, noise=noise_of())
    for tau in (1, torch.tensor(1, device=device), torch.ones(2, 3, dtype=torch.int64, device=device)):
        assert torch.equal(gk.gumbel_softmax(logits, tau, hard, noise=noise_of()), one)
    if not hard:
        assert not torch.equal(one, expected)


# Logits' shape, dim, tau's shape: one value per row in each, by broadcasting unless the last word says otherwise.
TAUS = [
    ((3, 5), -1, (1,)), ((3, 5), -1, (1, 1)), ((3, 5), -1, (3, 1)), ((3, 5), -1, (3,)), ((4, 4), -1, (4, 1)),
    ((4, 4), 0, (4,)), ((4, 4), 0, (1, 4)), ((2, 3, 5), -1, (3, 1)), ((2, 3, 5), -1, (1, 3, 1)),
    ((2, 3, 5), -1, (2, 1, 1)), ((2, 3, 5), -1, (6,)), ((3, 3, 5), -1, (3, 1)), ((2, 3, 5), 1, (5,)),
    ((2, 3, 5), 1, (1, 5)), ((2, 3, 5), 1, (2, 1, 5)), ((2, 3, 5), 1, (2, 1, 1)), ((2, 3, 5), 1, (2, 5)),
    ((2, 3, 5), -2, (1, 1, 1)), ((2, 3, 5), 0, (3, 5)), ((2, 3, 5), 0, (3, 1)), ((2, 3, 5), 0, (1, 3, 5)),
    ((5,), 0, (1,)), ((5,), -1, ()), ((1, 1, 5), -1, (1, 1)), ((3, 1), -1, (1,)),
]  # fmt: skip


@pytest.mark.cover(1)
@pytest.mark.parametrize(("shape", "dim", "given"), TAUS)
def test_tau_that_broadcasts(
    backend: str, device: str, shape: tuple[int, ...], dim: int, given: tuple[int, ...]
) -> None:
    """What has one value per row is taken, as PyTorch would broadcast it, and a gradient comes back in its shape."""
    x, dy = (randn(*shape, dtype=torch.float64, device=device, seed=seed) for seed in (0, 4))
    tau = leaf(0.5 + torch.arange(math.prod(given), dtype=torch.float64, device=device).view(given) / 8)
    moved = x.movedim(dim, -1)
    g = truth_noise(noise_of(), moved[..., 0].numel(), moved.shape[-1]).view(moved.shape).movedim(-1, dim).to(device)
    kept = (*moved.shape[:-1], 1)
    theirs = tau
    if given in (kept[:-1], (math.prod(kept),)) and (len(given) == 0 or shape[-len(given) :] != given):
        theirs = tau.reshape(kept).movedim(-1, dim)  # a list of the rows
    expected = ((x + g) / theirs).softmax(dim)
    (dtau,) = torch.autograd.grad((expected * dy).sum(), tau, retain_graph=True)
    assert dtau.abs().max() > 1e-4 or shape[dim] == 1
    for where in (gk, gk.reference):
        y = where.gumbel_softmax(x, tau, dim=dim, noise=noise_of())
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(grads((y * dy).sum(), tau)[0], dtau)
        torch.testing.assert_close(grads((where.gumbel_ste(x, tau, dim, noise=noise_of()) * dy).sum(), tau)[0], dtau)
    if dim != -1:
        return
    table = randn(shape[-1], 2, dtype=torch.float64, device=device, seed=6)
    head = torch.eye(shape[-1], dtype=torch.float64, device=device)
    (dtau,) = grads((((x + g) / theirs).softmax(dim) @ table).square().sum(), tau)
    for where in (gk, gk.reference):
        out = where.gumbel_ste_embedding(x, table, tau, estimator="soft", noise=noise_of())
        torch.testing.assert_close(grads(out.embedding.square().sum(), tau)[0], dtau)
        out = where.linear_gumbel_ste(x, head, table, tau, estimator="soft", noise=noise_of(), eps=0.0)
        torch.testing.assert_close(grads(out.embedding.square().sum(), tau)[0], dtau)


@pytest.mark.parametrize("dtype", DTYPES)
def test_learned_temperature(backend: str, device: str, rows: int, dtype: torch.dtype) -> None:
    """`Parameter(torch.ones(1))`, the usual one, in any dtype: the gradient of a 0-d tau."""
    logits, dy = randn(rows, 17, device=device), randn(rows, 17, device=device, seed=4)
    found = []
    for shape in ((), (1,), (1, 1)):
        tau = torch.nn.Parameter(torch.ones(shape, dtype=dtype, device=device))
        (gk.gumbel_softmax(logits, tau, noise=noise_of()) * dy).sum().backward()
        assert tau.grad is not None
        assert tau.grad.shape == shape
        assert tau.grad.dtype == dtype
        found.append(tau.grad.item())
    tolerance = {torch.bfloat16: 0.05, torch.float16: 0.01}.get(dtype, 1e-5)
    assert found[1:] == pytest.approx([found[0]] * 2, rel=tolerance)
    assert abs(found[0]) > 1e-3


@pytest.mark.parametrize("hard", [False, True])
def test_gradient_of_shared_tau(backend: str, device: str, rows: int, hard: bool) -> None:
    """A 0-d tau gets the sum over rows, in its own dtype and shape; a row's tau gets its row's alone."""
    logits, dy = randn(rows, 17, device=device), randn(rows, 17, device=device, seed=4)
    per_row = leaf(torch.full((rows, 1), 0.5, device=device))
    (expected,) = grads((gk.gumbel_softmax(logits, per_row, hard, noise=noise_of()) * dy).sum(), per_row)
    assert (expected.abs() > 1e-4).all()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        tau = leaf(torch.tensor(0.5, dtype=dtype, device=device))
        (ours,) = grads((gk.gumbel_softmax(logits, tau, hard, noise=noise_of()) * dy).sum(), tau)
        assert ours.dtype == dtype
        torch.testing.assert_close(
            ours, expected.sum().to(dtype), rtol=1e-5 if dtype != torch.bfloat16 else 1e-2, atol=0
        )


@pytest.mark.parametrize("tau", [1e-4, 1e-2, 50.0, 1e4])
def test_extreme_tau(backend: str, device: str, rows: int, tau: float) -> None:
    logits = leaf(randn(rows, 127, device=device))
    y = gk.gumbel_softmax(logits, tau, noise=noise_of())
    dlogits = grads((y * randn(rows, 127, device=device, seed=4)).sum(), logits)[0]
    assert y.isfinite().all()
    assert dlogits.isfinite().all()
    torch.testing.assert_close(y.sum(-1), torch.ones(rows, device=device))
    if tau < 1:
        assert (y.max(-1).values > 0.99).float().mean() > 0.5
    else:
        assert y.max() < 0.012


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hard", [False, True])
def test_extreme_logits(backend: str, device: str, dtype: torch.dtype, hard: bool) -> None:
    """Huge logits and masks made of the lowest finite number: everything finite, masked tokens exactly zero."""
    info = torch.finfo(dtype)
    big = 1e4
    rows = [[0.5, info.min, -1.0, info.min], [big, big - 64, -big, 0.0], [-big, -big, -big, -big], [0, 0, 0, -math.inf]]
    rows += [[info.max, info.min, 0.0, 0.0], [info.min] * 4]  # what is divided by tau is beyond the range
    logits = leaf(torch.tensor(rows, dtype=dtype, device=device))
    tau = leaf(torch.full((6,), 0.5, dtype=compute_dtype(dtype), device=device))
    y = gk.gumbel_softmax(logits, tau, hard, noise=noise_of())
    dlogits, dtau = grads((y * torch.arange(4, device=device)).sum(), logits, tau)
    assert y.isfinite().all()
    assert dlogits.isfinite().all()
    assert (y[0, [1, 3]] == 0).all()
    assert (dlogits[0, [1, 3]] == 0).all()
    assert y[3, 3] == dlogits[3, 3] == 0
    assert y[1, 0] == y[4, 0] == 1
    if backend != "reference":  # the reference's own test says so of it
        assert dtau.isfinite().all()


# --- differentiation


@pytest.mark.parametrize("what", ["logits", "row tau", "shared tau", "masked"])
def test_gradcheck(backend: str, device: str, interpreted: bool, what: str) -> None:
    logits = randn(2, 5, dtype=torch.float64, device=device)
    shared = what == "shared tau"
    tau = torch.tensor(0.8, dtype=torch.float64) if shared else torch.tensor([0.6, 1.4], dtype=torch.float64)
    tau = tau.to(device).requires_grad_(what != "logits")
    hidden = torch.zeros(2, 5, dtype=torch.bool, device=device)
    hidden[:, 3] = what == "masked"

    def f(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return gk.gumbel_softmax(x.masked_fill(hidden, -math.inf), t, noise=noise_of())

    assert torch.autograd.gradcheck(f, (logits.requires_grad_(), tau), fast_mode=interpreted)


def test_only_what_is_asked_for(backend: str, device: str) -> None:
    """Gradients of logits alone, of tau alone, of neither; a result that no loss uses."""
    logits, tau = randn(2, 9, device=device), torch.tensor(0.7, device=device)
    weights = torch.arange(9.0, device=device)
    x, t = leaf(logits), leaf(tau)
    both = grads((gk.gumbel_softmax(x, t, noise=noise_of()) * weights).sum(), x, t)
    x = leaf(logits)
    assert torch.equal(grads((gk.gumbel_softmax(x, tau, noise=noise_of()) * weights).sum(), x)[0], both[0])
    t = leaf(tau)
    torch.testing.assert_close(grads((gk.gumbel_softmax(logits, t, noise=noise_of()) * weights).sum(), t)[0], both[1])
    assert not gk.gumbel_softmax(logits, tau, noise=noise_of()).requires_grad
    with torch.no_grad():
        assert not gk.gumbel_softmax(x, t, noise=noise_of()).requires_grad
    used, unused = (gk.gumbel_softmax(x, t, noise=noise_of(seed)) for seed in (1, 2))
    assert grads((used * weights).sum() + 0 * unused.sum(), x)[0].isfinite().all()


def test_second_derivatives_are_right_or_refused(backend: str, device: str) -> None:
    """PyTorch's gumbel_softmax differentiates twice. Ours need not, but must not return a wrong number silently."""
    x = leaf(randn(2, 5, dtype=torch.float64, device=device))

    def f(x: torch.Tensor) -> torch.Tensor:
        return gk.gumbel_softmax(x, 0.8, noise=noise_of())

    def penalised(f: Any, x: torch.Tensor) -> torch.Tensor:
        """Gradient of a loss plus its gradient's square: the first term hides that the second's may be missing."""
        loss = (f(x) ** 2).sum()
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(loss + (first**2).sum(), x)[0]

    g = truth_noise(noise_of(), 2, 5).to(device)
    try:
        ours = penalised(f, x)
    except (RuntimeError, NotImplementedError):
        return
    torch.testing.assert_close(ours, penalised(lambda x: ((x + g) / 0.8).softmax(-1), leaf(x)))


@pytest.mark.uncollect_if(
    lambda backend: backend == "reference", "the reference is plain autograd, which saves what it likes"
)
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("layout", ["rows", "dim 0", "dim 1 of 3", "sliced"])
def test_saved_for_backward(backend: str, device: str, hard: bool, layout: str) -> None:
    """Inputs and O(rows) numbers: nothing of the size of the logits but the caller's own memory."""
    rows, vocab = 6, 500
    shape, dim = {"rows": ((rows, vocab), -1), "dim 0": ((vocab, rows), 0), "dim 1 of 3": ((2, vocab, 3), 1),
                  "sliced": ((2, 3, vocab), -1)}[layout]  # fmt: skip
    x = leaf(randn(*shape, device=device)) if layout != "sliced" else leaf(randn(2, 6, vocab, device=device))[:, ::2]
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = gk.gumbel_softmax(x, leaf(torch.tensor(0.5, device=device)), hard, dim=dim, noise=noise_of())
    assert y.grad_fn is not None
    assert saved
    own = {x.untyped_storage().data_ptr()}
    others = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    extra = sum(size for pointer, size in others.items() if pointer not in own)
    assert extra <= 64 * rows, f"{extra} bytes saved beside the logits"


@pytest.mark.parametrize("hard", [False, True])
def test_two_runs_are_bitwise_equal(backend: str, device: str, interpreted: bool, hard: bool) -> None:
    rows, vocab = (3, 1031) if interpreted else (64 if backend == "cpu" else 16, 3001)
    logits, dy = randn(rows, vocab, device=device), randn(rows, vocab, device=device, seed=4)

    def run() -> tuple[torch.Tensor, ...]:
        x, tau = leaf(logits), leaf(torch.tensor(0.5, device=device))
        y = gk.gumbel_softmax(x, tau, hard, noise=gk.GumbelNoise(5))
        return (y, *grads((y * dy).sum(), x, tau))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_noise_follows_rows_and_shards(backend: str, device: str, rows: int) -> None:
    """Permuted rows: permuted results. A shard's softmax, rescaled by the whole's mass on it, is the whole's slice."""
    logits, noise = randn(rows, 67, device=device), noise_of(3, rows, device)
    assert noise.row_ids is not None
    y = gk.gumbel_softmax(logits, 0.5, noise=noise)
    flipped = gk.gumbel_softmax(logits.flip(0), 0.5, noise=gk.GumbelNoise(3, noise.row_ids.flip(0)))
    torch.testing.assert_close(flipped.flip(0), y, rtol=1e-6, atol=0)
    for low, high in ((0, 33), (33, 67), (66, 67), (1, 6)):
        shard = gk.GumbelNoise(3, noise.row_ids, vocab_start=low)
        part = gk.gumbel_softmax(logits[:, low:high], 0.5, noise=shard)
        torch.testing.assert_close(part * y[:, low:high].sum(1, keepdim=True), y[:, low:high], rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_chunks_of_the_torch_backend(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Sums over 17 chunks are as accurate as over one."""
    resize(monkeypatch, chunk=1)
    with gk.use_backend("torch"):
        Case(masked(randn(3, 4099, dtype=dtype)), row_taus(3, dtype, "cpu"), noise_of(3, 3)).check()
        # The first 256 tokens, a whole chunk, may be masked.
        logits = randn(3, 600, dtype=dtype)
        logits[:, :300] = -math.inf
        Case(logits, row_taus(3, dtype, "cpu"), noise_of(3, 3)).check()


@pytest.mark.parametrize("hard", [False, True])
def test_no_noise_given(backend: str, device: str, hard: bool) -> None:
    logits = torch.zeros(2, 100, device=device)
    torch.manual_seed(5)
    first, second = (gk.gumbel_softmax(logits, hard=hard) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(gk.gumbel_softmax(logits, hard=hard), first)
    assert torch.equal(gk.gumbel_softmax(logits, hard=hard), second)
    assert not torch.equal(first, second)


def test_drop_in_for_pytorch(backend: str, device: str) -> None:
    """Positional arguments in PyTorch's order, defaults, and its word on eps."""
    logits = randn(2, 3, 5, device=device)
    torch.manual_seed(5)
    positional = gk.gumbel_softmax(logits, 0.5, True, 1e-10, 1)
    torch.manual_seed(5)
    assert torch.equal(gk.gumbel_softmax(logits, tau=0.5, hard=True, dim=1), positional)
    assert torch.equal(positional.sum(1), torch.ones(2, 5, device=device))
    with pytest.warns(UserWarning, match="eps"):
        gk.gumbel_softmax(logits, eps=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gk.gumbel_softmax(logits)


def test_every_allocation_is_written(backend: str, device: str, rows: int) -> None:
    """With the allocator itself filling new memory with NaN, C++ extensions included, results stay what they are."""

    def run() -> tuple[torch.Tensor, ...]:
        x, tau = leaf(masked(randn(rows, 517, device=device))), leaf(torch.tensor(0.5, device=device))
        soft, hard = (gk.gumbel_softmax(x, tau, h, noise=gk.GumbelNoise(5)) for h in (False, True))
        return (soft, hard, *grads(((soft + hard) * torch.arange(517, device=device)).sum(), x, tau))

    before = run()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        after = run()
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
