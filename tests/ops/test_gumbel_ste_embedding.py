"""`gumbel_ste_embedding` on every backend: four estimators, tables of several dtypes, given ids, log-probabilities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import grade_kernels as gk
from tests.support.by_formula import by_formula
from tests.support.helpers import (
    DTYPES,
    ESTIMATORS,
    LAYOUTS,
    ODD_VOCABS,
    assert_accurate,
    assert_same_ids,
    compute_dtype,
    grads,
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


def check(
    logits: torch.Tensor,
    tables: tuple[torch.Tensor, ...],
    tau: torch.Tensor,
    noise: gk.GumbelNoise | gk.PosteriorNoise,
    estimator: str,
    ids: torch.Tensor | None = None,
) -> None:
    """One call with all gradients against the formulas in float64, by the tolerance rule."""
    rows, vocab = logits.shape
    device = logits.device.type
    des = tuple(randn(rows, t.shape[1], dtype=t.dtype, device=device, seed=20 + i) for i, t in enumerate(tables))
    dlogprobs = randn(rows, dtype=compute_dtype(logits.dtype), device=device, seed=30)
    x, t, tabs = leaf(logits), leaf(tau), tuple(leaf(table) for table in tables)

    # A column, because `[rows]` has a second reading where there are as many tokens as rows, and is refused.
    out = gk.gumbel_ste_embedding(x, tabs, t[:, None], estimator=estimator, noise=noise, ids=ids)
    loss = (out.logprobs * dlogprobs).sum()
    for e, de in zip(out.embedding, des, strict=True):
        loss = loss + (e * de).sum().to(loss.dtype)
    dx, dt, *dtables = grads(loss, x, t, *tabs)

    g = truth_noise(noise, rows, vocab, logits)
    cpu = (logits.cpu(), tuple(table.cpu() for table in tables), tau.cpu())
    des = tuple(de.cpu() for de in des)
    theirs = by_formula(*cpu, g, out.ids.cpu(), estimator, des, dlogprobs.cpu())
    double = (cpu[0].double(), tuple(table.double() for table in cpu[1]), cpu[2].double())
    wide_des = tuple(de.double() for de in des)
    truth = by_formula(*double, g, out.ids.cpu(), estimator, wide_des, dlogprobs.cpu().double())
    # What cancels in the gradients: the same formulas with every product positive.
    absolute = sum(de.abs() @ table.abs().T for de, table in zip(wide_des, double[1], strict=True))
    if estimator in ("soft", "ste"):
        p = ((double[0] + g) / double[2][:, None]).softmax(-1)
    else:
        p = ((double[0]) / double[2][:, None]).softmax(-1)
    if estimator == "reinmax":
        p = p + F.one_hot(out.ids.cpu(), vocab) + double[0].softmax(-1)
    terms = p * absolute / double[2].clamp(max=1.0)[:, None] + dlogprobs.cpu().double().abs()[:, None]
    scores = torch.where(double[0] == -math.inf, 0.0, double[0].abs() + g.abs())

    wide = compute_dtype(logits.dtype)
    if isinstance(noise, gk.PosteriorNoise):
        ids = noise.ids
    if ids is None:
        assert_same_ids(out.ids, double[0] + g, logits.dtype)
    else:
        assert torch.equal(out.ids, ids)
    assert isinstance(out.embedding, tuple)
    weights = p if estimator == "soft" else 0 * p  # a looked-up row is no sum
    for i in range(len(tables)):
        assert_accurate(out.embedding[i], theirs.embedding[i], truth.embedding[i], f"embedding[{i}]",
                        terms=weights @ double[1][i].abs() * 4, compute=wide)  # fmt: skip
        assert_accurate(dtables[i], theirs.dtables[i], truth.dtables[i], f"dtables[{i}]",
                        terms=weights.T @ wide_des[i].abs() * 4, compute=wide)  # fmt: skip
        if estimator != "soft":
            assert torch.equal(out.embedding[i], tables[i][out.ids]), "a looked-up row is a copy"
    assert_accurate(out.logprobs[:, None], theirs.logprobs[:, None], truth.logprobs[:, None], "logprobs",
                    terms=scores.amax(1, keepdim=True), compute=wide)  # fmt: skip
    assert_accurate(dx, theirs.dlogits, truth.dlogits, "dlogits", terms=terms, compute=wide)
    assert (dx[logits == -math.inf] == 0).all()
    # One number a row: the rows' errors are compared as a whole, since a single one of PyTorch's may be nought by luck.
    assert_accurate(dt, theirs.dtau, truth.dtau, "dtau", terms=(terms * scores).sum(1) / double[2], compute=wide)


@pytest.mark.parametrize("mask", [False, True], ids=["open", "masked"])
@pytest.mark.parametrize("vocab", ODD_VOCABS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_float32(backend: str, device: str, rows: int, estimator: str, vocab: int, mask: bool) -> None:
    logits = randn(rows, vocab, device=device) * 2
    logits = masked(logits) if mask else logits
    table = randn(vocab, 5, device=device, seed=1)
    noise = noise_of(3, rows, device, vocab_start=vocab + 1)
    check(logits, (table,), row_taus(rows, torch.float32, device), noise, estimator)


PAIRS = {
    "float64": (torch.float64, torch.float64),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "bfloat16, float32 table": (torch.bfloat16, torch.float32),
    "float32, bfloat16 table": (torch.float32, torch.bfloat16),
    "float32, float64 table": (torch.float32, torch.float64),
    "float64, float32 table": (torch.float64, torch.float32),
}


@pytest.mark.parametrize("vocab", [2, 1031])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("pair", PAIRS)
def test_dtypes(backend: str, device: str, rows: int, pair: str, estimator: str, vocab: int) -> None:
    dtype, table_dtype = PAIRS[pair]
    logits = masked(randn(rows, vocab, dtype=dtype, device=device) * 2)
    table = randn(vocab, 6, dtype=table_dtype, device=device, seed=1)
    check(logits, (table,), row_taus(rows, dtype, device), noise_of(3, rows, device), estimator)


@pytest.mark.parametrize("known", [False, True], ids=["", "known logprobs"])
@pytest.mark.parametrize("vocab", [1, 2, 17, 1031])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_noise_of_given_tokens(
    backend: str, device: str, rows: int, estimator: str, dtype: torch.dtype, vocab: int, known: bool
) -> None:
    logits = masked(randn(rows, vocab, dtype=dtype, device=device) * 2)
    table = randn(vocab, 5, dtype=dtype, device=device, seed=1)
    noise = noise_given(noise_of(3, rows, device, vocab_start=vocab + 1), logits, known=known)
    check(logits, (table,), row_taus(rows, dtype, device), noise, estimator)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_several_tables(backend: str, device: str, rows: int, estimator: str) -> None:
    """Tables of different widths and dtypes, each embedding and gradient in its table's own."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    tables = tuple(randn(131, 3 + i, dtype=dtype, device=device, seed=i) for i, dtype in enumerate(dtypes))
    check(randn(rows, 131, device=device), tables, row_taus(rows, torch.float32, device), noise_of(), estimator)
    check(randn(rows, 131, device=device), tables[:1], row_taus(rows, torch.float32, device), noise_of(), estimator)


def test_one_table_or_a_tuple(backend: str, device: str) -> None:
    logits, table = randn(2, 9, device=device), randn(9, 4, device=device, seed=1)
    alone = gk.gumbel_ste_embedding(logits, table, noise=noise_of())
    assert isinstance(alone, gk.GumbelSTEEmbedding)
    embedding, ids, logprobs = alone
    assert embedding is alone.embedding
    assert isinstance(embedding, torch.Tensor)
    for several in ((table,), [table]):
        out = gk.gumbel_ste_embedding(logits, several, noise=noise_of())  # type: ignore[arg-type]
        assert isinstance(out.embedding, tuple)
        assert torch.equal(out.embedding[0], embedding)
        assert torch.equal(out.ids, ids)
        assert torch.equal(out.logprobs, logprobs)


@pytest.mark.parametrize("mask", [False, True], ids=["open", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_given_ids(backend: str, device: str, rows: int, estimator: str, dtype: torch.dtype, mask: bool) -> None:
    """A rollout's tokens: repeated ones add up in the table's gradient, and masked ones have log-probability -inf."""
    vocab = 131
    logits = randn(rows, vocab, dtype=dtype, device=device) * 2
    logits = masked(logits) if mask else logits
    table = randn(vocab, 5, dtype=dtype, device=device, seed=1)
    for given in ([0, 130, 65, 64, 1], [7, 7, 7, 7, 7], [65, 3, 65, 3, 65]):
        ids = torch.tensor(given[:rows], device=device)
        check(logits, (table,), row_taus(rows, dtype, device), noise_of(3, rows, device), estimator, ids)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_given_masked_id_gets_no_gradient(backend: str, device: str, estimator: str) -> None:
    logits = leaf(torch.tensor([[0.5, -math.inf, -1.0]], device=device))
    table = randn(3, 2, device=device)
    ids = torch.tensor([1], device=device)
    out = gk.gumbel_ste_embedding(logits, table, 0.7, estimator=estimator, noise=noise_of(), ids=ids)
    assert out.logprobs.item() == -math.inf
    dlogits = grads(out.embedding.sum() + out.logprobs.sum(), logits)[0]
    assert dlogits[0, 1] == 0
    assert dlogits.isfinite().all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_sampled_ids_given_back_change_nothing(backend: str, device: str, rows: int, estimator: str) -> None:
    logits, table = leaf(randn(rows, 67, device=device)), leaf(randn(67, 4, device=device, seed=1))
    first = gk.gumbel_ste_embedding(logits, table, 0.5, estimator=estimator, noise=noise_of())
    # Strides of their own.
    ids = torch.stack([first.ids, first.ids * 0], 1)[:, 0]
    second = gk.gumbel_ste_embedding(logits, table, 0.5, estimator=estimator, noise=noise_of(), ids=ids)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    losses = [out.embedding.square().sum() + out.logprobs.sum() for out in (first, second)]
    for a, b in zip(grads(losses[0], logits, table), grads(losses[1], logits, table), strict=True):
        assert torch.equal(a, b)
    # The result is the op's own: writing to it leaves what the caller gave.
    second.ids.fill_(0)
    assert torch.equal(ids, first.ids)


def test_many_rows(backend: str, device: str, interpreted: bool) -> None:
    rows, vocab, width = (11, 131, 3) if interpreted else (131, 261, 33)
    for dtype in (torch.float32, torch.bfloat16):
        logits = randn(rows, vocab, device=device, dtype=dtype)
        tables = (randn(vocab, width, device=device, dtype=dtype, seed=1), randn(vocab, 1, device=device, seed=2))
        tau = torch.linspace(0.25, 2.0, rows, device=device)
        check(logits, tables, tau, noise_of(3, rows, device), "ste")


@pytest.mark.parametrize("estimator", ["ste", "soft"])
def test_large_vocabulary(backend: str, device: str, estimator: str) -> None:
    vocab = 151937 if backend == "cpu" or device == "cuda" else 9001
    logits = randn(2, vocab, device=device, dtype=torch.bfloat16) * 3
    table = randn(vocab, 4, device=device, dtype=torch.bfloat16, seed=1)
    check(logits, (table,), row_taus(2, torch.bfloat16, device), gk.GumbelNoise(11), estimator)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("estimator", ["ste", "soft"])
def test_strides(backend: str, device: str, rows: int, layout: str, estimator: str) -> None:
    """Logits, table and upstream gradients of any layout."""
    logits, table = randn(rows, 131, device=device), randn(131, 4, device=device, seed=1)
    de, dlogprobs = randn(rows, 4, device=device, seed=2), randn(rows, device=device, seed=3)
    lay = LAYOUTS[layout]
    flat = LAYOUTS["transposed"] if layout == "leading dimensions" else lay

    def run(x: torch.Tensor, e: torch.Tensor, *upstream: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, e = x.detach().requires_grad_(), e.detach().requires_grad_()
        out = gk.gumbel_ste_embedding(x, e, 0.5, estimator=estimator, noise=gk.GumbelNoise(5))
        upstream = tuple(u.view(y.shape) if u.shape != y.shape else u for u, y in zip(upstream, out[::2], strict=True))
        dx, dtable = torch.autograd.grad(out[::2], (x, e), upstream)
        assert dx.shape == x.shape
        return out[0].reshape(rows, 4), out[1].flatten(), out[2].flatten(), dx.reshape(rows, 131), dtable

    expected = run(logits, table, de, dlogprobs)
    spread = torch.stack([dlogprobs, dlogprobs * math.nan], 1)[:, 0]
    for arguments in ((lay(logits), table, de, dlogprobs), (logits, flat(table), flat(de), spread)):
        for ours, theirs in zip(run(*arguments), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_upstream_of_stride_zero(backend: str, device: str, rows: int, estimator: str) -> None:
    """`.sum().backward()`, as in a first try at a prompt."""
    logits, table = leaf(randn(rows, 31, device=device)), leaf(randn(31, 4, device=device, seed=1))
    ones = (torch.ones(rows, 4, device=device), torch.ones(rows, device=device))
    out = gk.gumbel_ste_embedding(logits, table, 0.5, estimator=estimator, noise=noise_of())
    ours = grads(out.embedding.sum() + out.logprobs.sum(), logits, table)
    out = gk.gumbel_ste_embedding(logits, table, 0.5, estimator=estimator, noise=noise_of())
    for a, b in zip(ours, torch.autograd.grad((out.embedding, out.logprobs), (logits, table), ones), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.cover(1)
@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 1, 7), (2, 3, 2, 7), (0, 7), (2, 0, 7), (0, 0, 7), (0, 1)])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_leading_shapes(backend: str, device: str, shape: tuple[int, ...], estimator: str) -> None:
    dtype = torch.float32 if len(shape) % 2 else torch.bfloat16  # empty and full batches of either
    batch, vocab = shape[:-1], shape[-1]
    logits, tau = leaf(randn(*shape, dtype=dtype, device=device)), leaf(torch.ones(batch, device=device))
    tables = tuple(leaf(randn(vocab, width, dtype=dtype, device=device, seed=width)) for width in (1, 3))
    for ids in (None, torch.zeros(batch, dtype=torch.int64, device=device)):
        out = gk.gumbel_ste_embedding(logits, tables, tau, estimator=estimator, noise=noise_of(), ids=ids)
        assert [e.shape for e in out.embedding] == [(*batch, 1), (*batch, 3)]
        assert out.ids.shape == out.logprobs.shape == batch
        assert out.logprobs.dtype == torch.float32
        loss = out.embedding[0].sum() + out.embedding[1].sum() + out.logprobs.sum()
        found = grads(loss, logits, tau, *tables)
        assert [d.shape for d in found] == [shape, batch, (vocab, 1), (vocab, 3)]
        assert all(d.isfinite().all() for d in found)
        if logits.numel() == 0:
            assert all((d == 0).all() for d in found)
        else:
            flat = gk.gumbel_ste_embedding(
                logits.view(-1, vocab), tables, 1.0, estimator=estimator, noise=noise_of(), ids=out.ids.flatten()
            )
            assert torch.equal(out.logprobs.flatten(), flat.logprobs)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_empty_batch_of_any_strides(backend: str, device: str, estimator: str) -> None:
    """Whatever stride an empty tensor reports between tokens."""
    logits, table = randn(0, 21, device=device)[:, ::3].requires_grad_(), leaf(randn(7, 3, device=device))
    for noise in (noise_of(), gk.GumbelNoise(2, torch.zeros(0, dtype=torch.int64, device=device))):
        out = gk.gumbel_ste_embedding(logits, table, estimator=estimator, noise=noise)
        assert (out.embedding.shape, out.ids.shape, out.logprobs.shape) == ((0, 3), (0,), (0,))
        dlogits, dtable = grads(out.embedding.sum() + out.logprobs.sum(), logits, table)
        assert dlogits.shape == (0, 7)
        assert (dtable == 0).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("what", ["embedding", "logprobs"])
def test_loss_of_one_output(backend: str, device: str, rows: int, estimator: str, what: str) -> None:
    """A loss that reads only one of the outputs, against the sum of both, and gradients of a subset of the inputs."""
    x, table = leaf(randn(rows, 31, device=device)), leaf(randn(31, 4, device=device, seed=1))
    tau = leaf(torch.tensor(0.5, device=device))

    def loss(part: str, *inputs: torch.Tensor) -> torch.Tensor:
        logits, e, t = inputs
        out = gk.gumbel_ste_embedding(logits, e, t, estimator=estimator, noise=noise_of())
        parts = {"embedding": out.embedding.square().sum(), "logprobs": out.logprobs.square().sum()}
        return parts["embedding"] + parts["logprobs"] if part == "both" else parts[part]

    ours = grads(loss(what, x, table, tau), x, table, tau)
    other = "logprobs" if what == "embedding" else "embedding"
    rest, both = grads(loss(other, x, table, tau), x, table, tau), grads(loss("both", x, table, tau), x, table, tau)
    for a, b, c in zip(ours, rest, both, strict=True):
        torch.testing.assert_close(a + b, c, rtol=1e-4, atol=1e-5)
    if what == "logprobs":
        assert (ours[1] == 0).all()
        assert ours[2] == 0
        p = x.detach().softmax(-1)
        out = gk.gumbel_ste_embedding(x, table, tau, noise=noise_of())
        expected = 2 * out.logprobs.detach()[:, None] * (F.one_hot(out.ids, 31) - p)
        torch.testing.assert_close(ours[0], expected, rtol=1e-4, atol=1e-5)
        return
    for i in range(3):
        inputs = [t if j == i else t.detach() for j, t in enumerate((x, table, tau))]
        torch.testing.assert_close(grads(loss(what, *inputs), inputs[i])[0], ours[i])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradient_of_shared_tau(backend: str, device: str, rows: int, estimator: str, dtype: torch.dtype) -> None:
    logits, table = randn(rows, 31, device=device), randn(31, 4, device=device, seed=1)
    de = randn(rows, 4, device=device, seed=2)
    per_row, shared = leaf(torch.full((rows,), 0.5, device=device)), leaf(torch.tensor(0.5, dtype=dtype, device=device))
    found = []
    for tau in (per_row, shared):
        out = gk.gumbel_ste_embedding(leaf(logits), table, tau, estimator=estimator, noise=noise_of())
        found.append(grads((out.embedding * de).sum(), tau)[0])
    assert found[1].dtype == dtype
    torch.testing.assert_close(
        found[1], found[0].sum().to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=0
    )
    assert (found[1] == 0) == (estimator == "reinmax")


@pytest.mark.parametrize("form", ["soft", "logprobs", "tables"])
@pytest.mark.parametrize("mask", [False, True], ids=["open", "masked"])
def test_gradcheck(backend: str, device: str, interpreted: bool, form: str, mask: bool) -> None:
    """Where the backward is the forward's true derivative: soft embeddings, log-probabilities, tables."""
    logits = randn(2, 5, dtype=torch.float64, device=device).requires_grad_(form != "tables")
    tau = torch.tensor([0.6, 1.4], dtype=torch.float64, device=device).requires_grad_(form == "soft")
    tables = tuple(
        randn(5, width, dtype=torch.float64, device=device, seed=width).requires_grad_(form != "logprobs")
        for width in (1, 2)
    )
    hidden = torch.zeros(2, 5, dtype=torch.bool, device=device)
    hidden[:, 3] = mask

    def f(x: torch.Tensor, t: torch.Tensor, *e: torch.Tensor) -> tuple[torch.Tensor, ...]:
        estimator = "soft" if form == "soft" else "ste"
        x = x.masked_fill(hidden, -math.inf)
        out = gk.gumbel_ste_embedding(x, e, t, estimator=estimator, noise=noise_of())
        return (
            (out.logprobs,)
            if form == "logprobs"
            else out.embedding
            if form == "tables"
            else (*out.embedding, out.logprobs)
        )

    assert torch.autograd.gradcheck(f, (logits, tau, *tables), fast_mode=interpreted)


def test_ste_gradient_is_that_of_soft(backend: str, device: str, rows: int) -> None:
    """For a linear loss, and to the last bit outside of autograd's own arithmetic."""
    logits, table = randn(rows, 131, device=device), randn(131, 4, device=device, seed=1)
    de = randn(rows, 4, device=device, seed=2)
    found = []
    for estimator in ("ste", "soft"):
        x, tau = leaf(logits), leaf(torch.tensor(0.5, device=device))
        out = gk.gumbel_ste_embedding(x, table, tau, estimator=estimator, noise=noise_of())
        found.append(grads((out.embedding * de).sum(), x, tau))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b) if backend == "reference" else torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_gumbel_softmax_times_the_table(backend: str, device: str, rows: int, dtype: torch.dtype) -> None:
    """The composition of two of our own operations gives the same as the one that fuses them."""
    logits, table = randn(rows, 131, dtype=dtype, device=device), randn(131, 4, dtype=dtype, device=device, seed=1)
    de = randn(rows, 4, dtype=dtype, device=device, seed=2)
    for estimator, hard in (("ste", True), ("soft", False)):
        found = []
        for fused in (True, False):
            x, e, tau = leaf(logits), leaf(table), leaf(torch.tensor(0.5, dtype=dtype, device=device))
            if fused:
                y = gk.gumbel_ste_embedding(x, e, tau, estimator=estimator, noise=noise_of()).embedding
            else:
                y = gk.gumbel_softmax(x, tau, hard, noise=noise_of()) @ e
            assert isinstance(y, torch.Tensor)
            found.append((y, *grads((y * de).sum(), x, e, tau)))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=1e-5)


def test_estimators_differ(backend: str, device: str) -> None:
    logits, table = leaf(randn(2, 9, device=device)), randn(9, 4, device=device, seed=1)
    found = {}
    for estimator in ESTIMATORS:
        out = gk.gumbel_ste_embedding(logits, table, 0.5, estimator=estimator, noise=noise_of())
        found[estimator] = grads((out.embedding * torch.arange(4.0, device=device)).sum(), logits)[0]
    torch.testing.assert_close(found["ste"], found["soft"])
    for a, b in (("ste", "st"), ("st", "reinmax"), ("ste", "reinmax")):
        assert (found[a] - found[b]).abs().max() > 1e-2


@pytest.mark.uncollect_if(
    lambda backend: backend == "reference", "the reference is plain autograd, which saves what it likes"
)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("layout", ["rows", "leading", "sliced"])
def test_saved_for_backward(backend: str, device: str, estimator: str, layout: str) -> None:
    """Logits, tables and O(rows) numbers."""
    rows, vocab = 6, 500
    tables = (leaf(randn(vocab, 20, device=device)), leaf(randn(vocab, 30, device=device, dtype=torch.bfloat16)))
    logits = leaf(randn(2, 6, vocab, device=device))
    logits = {"rows": logits[0], "leading": logits[:, :3].contiguous(), "sliced": logits[:, ::2]}[layout]
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = gk.gumbel_ste_embedding(logits, tables, 0.5, estimator=estimator, noise=noise_of())
    assert out.logprobs.grad_fn is not None
    assert saved
    own = {t.untyped_storage().data_ptr() for t in (logits, *tables)}
    others = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    extra = sum(size for pointer, size in others.items() if pointer not in own)
    assert extra <= 64 * rows, f"{extra} bytes saved beside the inputs"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_two_runs_are_bitwise_equal(
    backend: str, device: str, interpreted: bool, estimator: str, dtype: torch.dtype
) -> None:
    """Given ids that repeat, so that rows of the tables' gradients are sums of many."""
    rows, vocab = (3, 257) if interpreted else (64, 1031 if backend == "cpu" else 257)
    logits = randn(rows, vocab, dtype=dtype, device=device)
    tables = (randn(vocab, 64, dtype=dtype, device=device), randn(vocab, 3, device=device))
    ids = torch.arange(rows, device=device) % 5

    def run() -> tuple[torch.Tensor, ...]:
        x, tau, tabs = leaf(logits), leaf(torch.tensor(0.5, device=device)), [leaf(t) for t in tables]
        out = gk.gumbel_ste_embedding(x, tuple(tabs), tau, estimator=estimator, noise=gk.GumbelNoise(5), ids=ids)
        loss = out.embedding[0].float().square().sum() + out.embedding[1].square().sum() + out.logprobs.square().sum()
        return (*out.embedding, out.ids, out.logprobs, *grads(loss, x, tau, *tabs))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.uncollect_if(
    lambda interpreted: interpreted, "the sum is one function for all backends, and this takes many rows"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_repeated_ids_add_up_in_wide_arithmetic(
    backend: str, device: str, interpreted: bool, dtype: torch.dtype
) -> None:
    """1000 times 1.0 on one row of the table is 1000, which a running bfloat16 sum stops short of at 256."""
    rows = 1000
    logits, table = (
        torch.zeros(rows, 3, dtype=dtype, device=device),
        leaf(torch.zeros(3, 2, dtype=dtype, device=device)),
    )
    ids = torch.ones(rows, dtype=torch.int64, device=device)
    out = gk.gumbel_ste_embedding(logits, table, noise=noise_of(), ids=ids)
    (dtable,) = grads(out.embedding.sum(), table)
    assert dtable.tolist() == [[0, 0], [torch.tensor(float(rows), dtype=dtype).item()] * 2, [0, 0]]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_noise_follows_rows(backend: str, device: str, rows: int, estimator: str) -> None:
    logits, table = leaf(randn(rows, 67, device=device)), randn(67, 4, device=device, seed=1)
    noise = noise_of(3, rows, device)
    assert noise.row_ids is not None
    found = []
    for x, n in ((logits, noise), (logits.flip(0), gk.GumbelNoise(3, noise.row_ids.flip(0)))):
        out = gk.gumbel_ste_embedding(x, table, 0.5, estimator=estimator, noise=n)
        (dx,) = torch.autograd.grad(out.embedding.square().sum() + out.logprobs.square().sum(), x)
        found.append((out.embedding, out.ids, out.logprobs, dx))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b.flip(0), rtol=1e-5, atol=1e-6)
    assert torch.equal(found[0][1], gk.gumbel_sample(logits, noise=noise))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_chunks_of_the_torch_backend(monkeypatch: pytest.MonkeyPatch, estimator: str) -> None:
    resize(monkeypatch, chunk=1)
    with gk.use_backend("torch"):
        logits = masked(randn(3, 1031))
        logits[0, :300] = -math.inf
        tau, tables = row_taus(3, torch.float32, "cpu"), (randn(1031, 5, seed=1), randn(1031, 2, seed=2))
        check(logits, tables, tau, noise_of(3, 3), estimator)
        check(logits, tables, tau, noise_of(3, 3), estimator, ids=torch.tensor([1030, 256, 255]))


def test_no_noise_given(backend: str, device: str) -> None:
    logits, table = torch.zeros(4, 100, device=device), randn(100, 3, device=device)
    torch.manual_seed(5)
    first, second = (gk.gumbel_ste_embedding(logits, table) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(gk.gumbel_ste_embedding(logits, table).ids, first.ids)
    assert not torch.equal(first.ids, second.ids)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_allocation_is_written(backend: str, device: str, rows: int, estimator: str) -> None:
    """With the allocator itself filling new memory with NaN, C++ extensions included, results stay what they are."""

    def run() -> tuple[torch.Tensor, ...]:
        x, tau = leaf(masked(randn(rows, 517, device=device))), leaf(torch.tensor(0.5, device=device))
        e = leaf(randn(517, 4, device=device, seed=1))
        out = gk.gumbel_ste_embedding(x, e, tau, estimator=estimator, noise=gk.GumbelNoise(5))
        loss: Any = out.embedding.square().sum() + out.logprobs.square().sum()
        return (*out, *grads(loss, x, e, tau))

    before = run()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        after = run()
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
