"""The Triton backend below the operations: device functions, and kernels at awkward shapes.

Without a GPU, kernels run through Triton's interpreter (TRITON_INTERPRET=1), which is slow: shapes are small.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grade_kernels import backends
from grade_kernels.backends import Sample
from grade_kernels.backends import torch as torch_backend
from grade_kernels.noise import DOMAIN_REFINE, GumbelNoise, gumbel_from_words

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

from grade_kernels.backends import triton as triton_backend  # noqa: E402

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
REASON = triton_backend.why_unavailable()
runs = pytest.mark.skipif(REASON is not None, reason=str(REASON))

SEED = -2401053089206453570
# (row id, token) under SEED whose word is below 256, found by search: 211, 13 and 249.
REFINED = [(-34359738340, 166090), (-34359738325, 104037), (-34359738048, 196101)]
ROWS = torch.tensor([5, -7, 2**40 + 3, 2**33])

if REASON is None:
    from grade_kernels.backends.triton import philox

    @triton.jit
    def _words_kernel(p_seed, p_rows, out, group_start, ROWS: tl.constexpr, GROUPS: tl.constexpr, FAST: tl.constexpr):
        # Two-dimensional, as the epilogue of a matmul will use it.
        k0, k1 = philox.load_key(p_seed)
        o_n = tl.arange(0, ROWS)
        low, high = philox.split_row(tl.load(p_rows + o_n))
        groups = group_start.to(tl.uint32) + tl.arange(0, GROUPS).to(tl.uint32)
        w, least = philox.words(groups[None, :], low[:, None], high[:, None], k0, k1, 0, FAST)
        fine, _ = philox.words(groups[None, :], low[:, None], high[:, None], k0, k1, 1, FAST)
        o_v = tl.arange(0, 4 * GROUPS)
        o = o_n[:, None] * (4 * GROUPS) + o_v[None, :]
        tl.store(out + o, w.to(tl.int64))
        tl.store(out + ROWS * 4 * GROUPS + o, fine.to(tl.int64))
        o = o_n[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
        tl.store(out + 2 * ROWS * 4 * GROUPS + o, least.to(tl.int64))

    @triton.jit
    def _noise_kernel(word, refinement, out, BLOCK: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr):
        o = tl.arange(0, BLOCK)
        w, fine = tl.load(word + o).to(tl.uint32), tl.load(refinement + o).to(tl.uint32)
        n = philox.scaled_noise(w, fine, DTYPE, FAST, REFINE=True)
        tl.store(out + o, tl.fma(n, -philox.LN2, philox.SHIFT))


def _fast() -> bool:
    return DEVICE == "cuda" and torch.version.hip is None


@pytest.fixture
def poison(monkeypatch):
    """Uninitialised memory is NaN, so reading it cannot go unnoticed."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor.fill_(-(10**9))

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(
        torch, "empty_like", lambda t, **kw: poisoned(t.shape, dtype=kw.get("dtype", t.dtype), device=t.device)
    )


@pytest.fixture
def small_splits(monkeypatch):
    """Several splits of several tiles in a vocabulary that the interpreter gets through quickly."""
    if REASON is None:
        from grade_kernels.backends.triton import tiles

        backend, _ = tiles.target()
        monkeypatch.setattr(tiles, "target", lambda: (backend, 32))
        monkeypatch.setattr(tiles, "SPLIT_COLUMNS", 1024)
        monkeypatch.setattr(tiles, "MAX_STRIPS", 1)


def _logits(rows: int, vocab: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, vocab, generator=generator)).to(dtype)


def _on(*tensors):
    return tuple(t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in tensors)


def _seed(value: int = SEED) -> torch.Tensor:
    return torch.tensor(value, device=DEVICE)


def _sample64(logits, rows, vocab_start):
    """The truth: ids and statistics in float64."""
    return torch_backend.sample(logits.double().cpu(), torch.tensor(SEED), rows.cpu(), vocab_start, True)


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-5, torch.float16: 1e-5}


# Importing and choosing


def test_importing_the_package_does_not_import_triton():
    code = "import sys, grade_kernels; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"


def test_unavailable_without_driver_and_interpreter():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, so there is a driver")
    code = "from grade_kernels.backends import status; print(status()['triton'])"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True, env=env)
    assert "no active driver" in done.stdout


@runs
def test_says_which_device_it_serves():
    assert triton_backend.why_not_device(torch.device(DEVICE)) is None
    assert "meta" not in str(triton_backend.why_not_device(torch.device(DEVICE)))
    assert repr(DEVICE) in triton_backend.why_not_device(torch.device("meta"))
    assert "triton" in backends.available_backends()


# The noise contract


@runs
@pytest.mark.parametrize("seed", [0, 1, SEED, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("group_start", [0, 2**31 - 3, 2**32 - 5])
def test_words_are_those_of_the_contract(seed, group_start):
    groups = 16
    rows, out = ROWS.to(DEVICE), torch.empty(9 * 4 * groups, dtype=torch.int64, device=DEVICE)
    _words_kernel[(1,)](_seed(seed), rows, out, group_start, 4, groups, _fast())
    out = out.cpu()
    words, fine = out[: 2 * 4 * 4 * groups].view(2, 4, 4 * groups)
    noise = GumbelNoise(seed, ROWS)
    assert torch.equal(words, noise.words(4, 4 * groups, vocab_start=4 * group_start))
    assert torch.equal(fine, noise.words(4, 4 * groups, vocab_start=4 * group_start, domain=DOMAIN_REFINE))
    assert torch.equal(out[2 * 4 * 4 * groups :].view(4, groups), words.view(4, groups, 4).amin(2))


@runs
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 4e-7), (torch.float64, 1e-15)])
def test_noise_of_every_kind_of_word(dtype, tolerance):
    size = 2**15
    generator = torch.Generator().manual_seed(0)
    edges = [torch.arange(1024), torch.arange(2**31 - 512, 2**31 + 512), torch.arange(2**32 - 1024, 2**32)]
    magnitudes = (2 ** (32 * torch.rand(2**13, generator=generator, dtype=torch.float64))).long().clamp(max=2**32 - 1)
    count = size - 3 * 1024 - magnitudes.numel()
    word = torch.cat([*edges, magnitudes, torch.randint(0, 2**32, (count,), generator=generator)])
    fine = torch.randint(0, 2**32, (size,), generator=generator)
    fine[:256:2] = 0
    fine[1:256:2] = 2**32 - 1
    out = torch.empty(size, dtype=dtype, device=DEVICE)
    tl_dtype = tl.float32 if dtype == torch.float32 else tl.float64
    import numpy as np

    with np.errstate(all="ignore"):
        _noise_kernel[(1,)](*_on(word, fine), out, size, tl_dtype, _fast())
    out = out.double().cpu()
    truth = gumbel_from_words(word, fine, torch.float64)
    assert out.isfinite().all()
    # Relative to the size of what is added up: the scaled noise reaches 65.
    error = (out - truth).abs() / (1 + truth.abs())
    assert error.max() < tolerance, (error.max(), word[error.argmax()])


@runs
@pytest.mark.parametrize(("row", "token"), REFINED)
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_refined_words_reach_every_kernel(row, token, offset, poison):
    """The rare path: a token whose noise needs the second word, among tokens of the same logit."""
    vocab, start = 600, token - 40 - offset
    logits, rows = torch.zeros(1, vocab), torch.tensor([row])
    truth = _sample64(logits, rows, start)
    assert truth.ids == token - start
    assert truth.score_max > 16.6
    logits, rows = _on(logits, rows)
    found = triton_backend.sample(logits, _seed(), rows, start, True)
    assert found.ids == token - start
    assert abs(found.score_max.cpu() - truth.score_max) < 4e-6
    tau, dy = torch.full((1,), 4.0), torch.linspace(-1, 1, vocab)[None]
    arguments = (tau, torch.tensor(SEED), rows.cpu(), start)
    weights, total = triton_backend.softmax(logits, *_on(*arguments), found.score_max, True, torch.float32)
    expected, expected_total = torch_backend.softmax(
        logits.cpu().double(), *arguments, truth.score_max, True, torch.float64
    )
    torch.testing.assert_close(total.cpu().double(), expected_total, rtol=1e-5, atol=0)
    torch.testing.assert_close(weights.cpu().double(), expected, rtol=1e-5, atol=1e-9)
    out = dy.to(DEVICE, copy=True)
    triton_backend.softmax_backward(
        out, logits, *_on(*arguments), "ste", Sample(found.ids, found.score_max, tau[:0], tau[:0]), None, False, out
    )
    reference = expected * (dy - (expected * dy).sum()) / 4
    torch.testing.assert_close(out.cpu().double(), reference, rtol=1e-5, atol=1e-8)


# sample, softmax and softmax_backward against float64


@runs
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("vocab", "vocab_start"), [(1, 0), (2, 3), (127, 2**34 + 1), (2048, 0), (2053, 4), (9001, 2)])
def test_sample(dtype, vocab, vocab_start, poison):
    logits = _logits(3, vocab, dtype)
    rows = ROWS[1:]
    if vocab > 2:
        logits[1, ::2] = -math.inf
        logits[2, 1:] = -math.inf
    truth = _sample64(logits, rows, vocab_start)
    for logsumexp in (True, False):
        found = triton_backend.sample(*_on(logits, torch.tensor(SEED), rows, vocab_start), logsumexp)
        assert found.ids.dtype == torch.int64
        assert torch.equal(found.ids.cpu(), truth.ids)
        names = ("score_max", "logit_max", "logit_sum") if logsumexp else ("score_max",)
        for name in names:
            value, expected = getattr(found, name).cpu().double(), getattr(truth, name)
            torch.testing.assert_close(value, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@runs
def test_equal_scores_go_to_the_smaller_id():
    for vocab, vocab_start in ((5, 1), (9001, 0)):
        # Noise is lost in numbers this large, and the lowest number is a legal logit.
        logits = torch.stack([torch.full((vocab,), 1e30), torch.full((vocab,), torch.finfo(torch.float32).min)])
        found = triton_backend.sample(*_on(logits, torch.tensor(SEED)), None, vocab_start, True)
        assert found.ids.tolist() == [0, 0]
        assert found.logit_sum.tolist() == [vocab, vocab]
        logits[:, :3] = -math.inf
        found = triton_backend.sample(*_on(logits, torch.tensor(SEED)), None, vocab_start, False)
        assert found.ids.tolist() == [3, 3]


@runs
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 4099])
def test_one_hot(dtype, vocab, poison):
    ids = torch.tensor([0, vocab - 1, vocab // 2])
    score_max = torch.tensor([1.0, math.nan, -2.0])
    out = triton_backend.one_hot(Sample(*_on(ids, score_max, score_max[:0], score_max[:0])), vocab, dtype).cpu()
    assert out.dtype == dtype
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], torch.nn.functional.one_hot(ids[[0, 2]], vocab).to(dtype))


def _relaxations(logits, tau, dy, ids, dlogprobs, vocab_start, estimator, backend, compute, out_dtype, stats, alias):
    """Outputs of softmax and softmax_backward, on the CPU in float64."""
    seed, rows = torch.tensor(SEED), ROWS[: logits.shape[0]]
    logits, tau, dy, ids, dlogprobs, seed, rows = (
        tuple(t if t is None else t.to(DEVICE) for t in (logits, tau, dy, ids, dlogprobs, seed, rows))
        if backend is triton_backend
        else (logits, tau, dy, ids, dlogprobs, seed, rows)
    )
    stats = backend.sample(logits, seed, rows, vocab_start, True) if stats is None else stats
    out = dy.clone() if alias else torch.empty(logits.shape, dtype=out_dtype, device=logits.device)
    sample = stats._replace(ids=ids)
    dtau = backend.softmax_backward(
        out if alias else dy, logits, tau, seed, rows, vocab_start, estimator, sample, dlogprobs, True, out
    )
    weights, total = backend.softmax(logits, tau, seed, rows, vocab_start, stats.score_max, True, out_dtype)
    raw, raw_total = backend.softmax(logits, tau, seed, rows, vocab_start, stats.score_max, False, compute)
    return [t.cpu().double() for t in (out, dtau, weights, total, raw, raw_total)]


@runs
@pytest.mark.parametrize("estimator", ["ste", "st", "reinmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("vocab", "vocab_start", "alias"), [(1, 0, False), (131, 5, True), (2053, 0, True), (1552, 0, False)]
)
def test_relaxation_and_gradient(estimator, dtype, vocab, vocab_start, alias, poison, small_splits):
    logits, dy = _logits(3, vocab, dtype), _logits(3, vocab, dtype, seed=1)
    if vocab > 2:
        logits[1, ::2] = -math.inf
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    tau, dlogprobs = torch.tensor([0.5, 1.0, 2.0], dtype=compute), torch.tensor([0.3, -1.0, 2.0], dtype=compute)
    ids = torch.tensor([0, 1 % vocab, vocab - 1])
    dlogprobs = dlogprobs if vocab != 131 else None
    common = (ids, dlogprobs, vocab_start, estimator)
    found = _relaxations(logits, tau, dy, *common, triton_backend, compute, dtype, None, alias)
    double = [t if t is None else t.double() for t in (logits, tau, dy)]
    common = (ids, None if dlogprobs is None else dlogprobs.double(), vocab_start, estimator)
    truth = _relaxations(*double, *common, torch_backend, torch.float64, torch.float64, None, False)
    narrow = 8e-3 if dtype == torch.bfloat16 else 0
    for value, expected, rounding in zip(found, truth, (narrow, 0, narrow, 0, 0, 0), strict=True):
        tolerance = 1e-11 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(value, expected, rtol=tolerance + rounding, atol=tolerance)


# Awkward layouts


@runs
def test_any_strides(poison):
    base = _logits(3, 700)
    row_tau = torch.tensor([0.7])
    seed = torch.tensor(SEED)
    layouts = {
        "transposed": base.T.contiguous().T,
        "every other column": torch.repeat_interleave(base, 2, dim=1)[:, ::2],
        "shifted": torch.nn.functional.pad(base, (1, 3))[:, 1:-3],
    }
    found = triton_backend.sample(*_on(base, seed, ROWS[:3], 6), True)
    weights, _ = triton_backend.softmax(
        *_on(base, row_tau.expand(3), seed, ROWS[:3], 6), found.score_max, True, torch.float32
    )
    for name, logits in layouts.items():
        assert torch.equal(logits, base)
        other = triton_backend.sample(*_on(logits, seed, ROWS[:3], 6), True)
        assert all(torch.equal(a, b) for a, b in zip(found, other, strict=True)), name
        again, _ = triton_backend.softmax(
            *_on(logits, row_tau.expand(3), seed, ROWS[:3], 6), other.score_max, True, torch.float32
        )
        assert torch.equal(weights, again), name
        # An expanded gradient, and an output that is a view.
        dy = torch.ones(1, 1).expand(3, 700)
        wide = torch.full((3, 1400), 7.0, device=DEVICE)
        triton_backend.softmax_backward(
            *_on(dy, logits, row_tau.expand(3), seed, ROWS[:3], 6), "ste", other, None, False, wide[:, 1::2]
        )
        assert wide[:, 1::2].abs().max() < 1e-5, name
        assert (wide[:, ::2] == 7).all(), name


@runs
def test_no_rows(poison):
    logits, tau, seed = _on(torch.empty(0, 5), torch.empty(0), torch.tensor(SEED))
    found = triton_backend.sample(logits, seed, None, 0, True)
    assert [t.shape for t in found] == [(0,)] * 4
    weights, total = triton_backend.softmax(logits, tau, seed, None, 0, found.score_max, True, torch.float32)
    assert weights.shape == (0, 5)
    assert total.shape == (0,)
    dtau = triton_backend.softmax_backward(
        logits, logits, tau, seed, None, 0, "ste", found, None, True, torch.empty_like(logits)
    )
    assert dtau.shape == (0,)


# Splits, batches and repetition


@runs
@pytest.mark.parametrize("vocab", [2053, 9001])
def test_results_depend_on_neither_batch_nor_run(vocab, poison, request):
    """A row alone, in a batch, and again: the same bits, over several splits."""
    if vocab < 9001:
        request.getfixturevalue("small_splits")
    logits, dy = _on(_logits(3, vocab), _logits(3, vocab, seed=1))
    tau, rows = _on(torch.tensor([0.5, 1.0, 2.0]), ROWS[:3])

    def everything(part):
        found = triton_backend.sample(logits[part], _seed(), rows[part], 0, True)
        arguments = (logits[part], tau[part], _seed(), rows[part], 0)
        weights = triton_backend.softmax(*arguments, found.score_max, True, torch.float32)
        out = torch.empty_like(logits[part])
        dtau = triton_backend.softmax_backward(dy[part], *arguments, "ste", found, None, True, out)
        return [*found, *weights, out, dtau]

    batch, again = everything(slice(None)), everything(slice(None))
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
    for i in range(3):
        alone = everything(slice(i, i + 1))
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(batch, alone, strict=True))


@runs
@pytest.mark.parametrize("cut", [2048, 1003])
def test_a_shard_draws_the_same_noise(cut):
    logits = _logits(2, 3007)
    seed, rows = torch.tensor(SEED), ROWS[:2]
    whole = triton_backend.sample(*_on(logits, seed, rows, 0), False)
    left = triton_backend.sample(*_on(logits[:, :cut], seed, rows, 0), False)
    right = triton_backend.sample(*_on(logits[:, cut:], seed, rows, cut), False)
    ids = torch.where(left.score_max >= right.score_max, left.ids, right.ids + cut)
    assert torch.equal(ids, whole.ids)
    assert torch.equal(torch.maximum(left.score_max, right.score_max), whole.score_max)


# Bad rows and masked tokens


@runs
@pytest.mark.parametrize("vocab", [7, 2053])
@pytest.mark.parametrize("what", [math.nan, math.inf, -math.inf])
def test_a_bad_row_is_nan_and_alone(vocab, what, poison, small_splits):
    logits = _logits(3, vocab)
    good = triton_backend.sample(*_on(logits, torch.tensor(SEED), ROWS[:3], 1), True)
    if what == -math.inf:
        logits[1] = what
    else:
        logits[1, vocab // 2] = what
    tau, dy = torch.ones(3), _logits(3, vocab, seed=1)
    for logsumexp in (False, True):
        found = triton_backend.sample(*_on(logits, torch.tensor(SEED), ROWS[:3], 1), logsumexp)
        assert 0 <= found.ids[1] < vocab
        assert all(t[1].isnan() for t in found[1:] if t.numel())
        for a, b in zip(found, good, strict=True):
            assert a.numel() == 0 or torch.equal(a[[0, 2]], b[[0, 2]])
    arguments = _on(logits, tau, torch.tensor(SEED), ROWS[:3], 1)
    weights, total = triton_backend.softmax(*arguments, found.score_max, True, torch.float32)
    assert weights.isnan().any(1).tolist() == total.isnan().tolist() == [False, True, False]
    assert weights[1].isnan().all()
    for estimator in ("ste", "st", "reinmax"):
        out = torch.empty_like(logits).to(DEVICE)
        triton_backend.softmax_backward(dy.to(DEVICE), *arguments, estimator, found, None, False, out)
        assert out[1].isnan().all()
        assert out[[0, 2]].isfinite().all()


@runs
@pytest.mark.parametrize("estimator", ["ste", "st", "reinmax"])
def test_masked_tokens_get_no_gradient_whatever_arrives(estimator, poison):
    logits, dy = _logits(2, 600), _logits(2, 600, seed=1)
    masked = torch.zeros(2, 600, dtype=torch.bool)
    masked[:, 1::3] = True
    logits[masked] = -math.inf
    clean = dy.clone()
    dy[masked] = torch.tensor([math.inf, -math.inf, math.nan, 1e38]).repeat(100)
    arguments = _on(logits, torch.tensor([0.5, 2.0]), torch.tensor(SEED), ROWS[:2], 0)
    found = triton_backend.sample(*_on(logits, torch.tensor(SEED), ROWS[:2], 0), True)
    assert not masked[torch.arange(2), found.ids.cpu()].any()
    results = []
    for upstream in (dy, clean):
        out = torch.empty(2, 600, device=DEVICE)
        dlogprobs = torch.ones(2, device=DEVICE)
        dtau = triton_backend.softmax_backward(upstream.to(DEVICE), *arguments, estimator, found, dlogprobs, True, out)
        results.append((out.cpu(), dtau.cpu()))
    assert (results[0][0][masked] == 0).all()
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    weights, _ = triton_backend.softmax(*arguments, found.score_max, True, torch.float32)
    assert (weights.cpu()[masked] == 0).all()
