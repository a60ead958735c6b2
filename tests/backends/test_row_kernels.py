"""The kernels for rows of given logits, below the operations: Triton's and CUDA's, against float64 at awkward shapes.

Without a GPU Triton's run through its interpreter and CUDA's on the host (`tests.support.cuda_host`), which are slow: shapes
are small.
"""

from __future__ import annotations

import math

import pytest
import torch

from grade_kernels import backends
from grade_kernels.backends import Backend, GradientRule, Noise, Rows, Sample
from tests.support.helpers import resize
from tests.support.needs import needs_backend
from tests.support.ptx.setting import SIMULATED
from tests.support.rows import DEVICE, GPU_BACKENDS, REFINED, ROWS, SEED, loaded, logits_of, on, seed_tensor

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

torch_backend = backends.get("torch")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-5, torch.float16: 1e-5}


@pytest.fixture(params=GPU_BACKENDS)
def rows_backend(request: pytest.FixtureRequest) -> Backend:
    return loaded(request.param)


@pytest.fixture(params=["torch", pytest.param("cpu", marks=needs_backend("cpu")), *GPU_BACKENDS])
def every_backend(request: pytest.FixtureRequest) -> Backend:
    return loaded(request.param)


@pytest.fixture
def poison(monkeypatch):
    """Uninitialised memory is NaN, so reading it cannot go unnoticed."""
    if SIMULATED:
        return  # the simulator knows what nobody wrote
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor.fill_(-(10**9))

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(
        torch, "empty_like", lambda t, **kw: poisoned(t.shape, dtype=kw.get("dtype", t.dtype), device=t.device)
    )


@pytest.fixture
def small_splits(rows_backend, monkeypatch):
    """Several splits of several tiles in a vocabulary that Triton's interpreter gets through quickly."""
    if rows_backend.name == "triton":
        resize(monkeypatch, lanes=512, most_strips=1, row_split=1024)


def softmax(backend, logits, tau, noise, score_max, *, normalize, dtype):
    """`Backend.softmax` of `[N, V]` logits."""
    weights, total = backend.softmax(Rows.of(logits, tau, noise), score_max, normalize=normalize, dtype=dtype)
    return weights.squeeze(2), total


def softmax_backward(backend, dy, logits, tau, noise, sample, rule, out):
    """`Backend.softmax_backward` of `[N, V]` logits."""
    return backend.softmax_backward(dy.unsqueeze(2), Rows.of(logits, tau, noise), sample, rule, out.unsqueeze(2))


def _skip_unserved(backend, dtype):
    if not backend.serves(dtype, head=False):
        pytest.skip("the torch backend serves this dtype")


def _sample64(logits, rows, vocab_start):
    """The truth: ids and statistics in float64."""
    return torch_backend.sample(logits.double().cpu(), Noise(torch.tensor(SEED), rows.cpu(), vocab_start), True)


@pytest.mark.parametrize(("row", "token"), REFINED)
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_refined_words_reach_every_kernel(rows_backend, row, token, offset, poison):
    """The rare path: a token whose noise needs the second word, among tokens of the same logit."""
    vocab, start = 600, token - 40 - offset
    logits, rows = torch.zeros(1, vocab), torch.tensor([row])
    truth = _sample64(logits, rows, start)
    assert truth.ids == token - start
    assert truth.score_max > 16.6
    logits, rows = on(logits, rows)
    found = rows_backend.sample(logits, Noise(seed_tensor(), rows, start), True)
    assert found.ids == token - start
    assert abs(found.score_max.cpu() - truth.score_max) < 4e-6
    tau, dy = torch.full((1,), 4.0), torch.linspace(-1, 1, vocab)[None]
    arguments = (tau, Noise(torch.tensor(SEED), rows.cpu(), start))
    weights, total = softmax(
        rows_backend, logits, *on(*arguments), found.score_max, normalize=True, dtype=torch.float32
    )
    expected, expected_total = softmax(
        torch_backend, logits.cpu().double(), *arguments, truth.score_max, normalize=True, dtype=torch.float64
    )
    torch.testing.assert_close(total.cpu().double(), expected_total, rtol=1e-5, atol=0)
    torch.testing.assert_close(weights.cpu().double(), expected, rtol=1e-5, atol=1e-9)
    out = dy.to(DEVICE, copy=True)
    softmax_backward(
        rows_backend,
        out,
        logits,
        *on(*arguments),
        Sample(found.ids, found.score_max, tau[:0], tau[:0]),
        GradientRule("ste"),
        out,
    )
    reference = expected * (dy - (expected * dy).sum()) / 4
    torch.testing.assert_close(out.cpu().double(), reference, rtol=1e-5, atol=1e-8)


# sample, softmax and softmax_backward against float64


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("vocab", "vocab_start"), [(1, 0), (2, 3), (127, 2**34 + 1), (2048, 0), (2053, 4), (9001, 2)])
def test_sample(rows_backend, dtype, vocab, vocab_start, poison):
    _skip_unserved(rows_backend, dtype)
    logits = logits_of(3, vocab, dtype)
    rows = ROWS[1:]
    if vocab > 2:
        logits[1, ::2] = -math.inf
        logits[2, 1:] = -math.inf
    truth = _sample64(logits, rows, vocab_start)
    for logsumexp in (True, False):
        found = rows_backend.sample(*on(logits, Noise(torch.tensor(SEED), rows, vocab_start)), logsumexp)
        assert found.ids.dtype == torch.int64
        assert torch.equal(found.ids.cpu(), truth.ids)
        names = ("score_max", "logit_max", "logit_sum") if logsumexp else ("score_max",)
        for name in names:
            value, expected = getattr(found, name).cpu().double(), getattr(truth, name)
            torch.testing.assert_close(value, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_equal_scores_go_to_the_smaller_id(rows_backend):
    for vocab, vocab_start in ((5, 1), (9001, 0)):
        # Noise is lost in numbers this large, and the lowest number is a legal logit.
        logits = torch.stack([torch.full((vocab,), 1e30), torch.full((vocab,), torch.finfo(torch.float32).min)])
        found = rows_backend.sample(*on(logits, Noise(torch.tensor(SEED), None, vocab_start)), True)
        assert found.ids.tolist() == [0, 0]
        assert found.logit_sum.tolist() == [vocab, vocab]
        logits[:, :3] = -math.inf
        found = rows_backend.sample(*on(logits, Noise(torch.tensor(SEED), None, vocab_start)), False)
        assert found.ids.tolist() == [3, 3]


@pytest.mark.uncollect_if(
    lambda rows_backend, dtype: dtype == torch.float64 and rows_backend == "cuda" and DEVICE == "cpu",
    "served by the torch backend, which on the CPU marks bad rows by their ids",
)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 4099])
def test_one_hot(rows_backend, dtype, vocab, poison):
    ids = torch.tensor([0, vocab - 1, vocab // 2])
    score_max = torch.tensor([1.0, math.nan, -2.0])
    out = rows_backend.one_hot(Sample(*on(ids, score_max, score_max[:0], score_max[:0])), vocab, dtype).cpu()
    assert out.dtype == dtype
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], torch.nn.functional.one_hot(ids[[0, 2]], vocab).to(dtype))


def _relaxations(logits, tau, dy, ids, dlogprobs, vocab_start, estimator, backend, compute, out_dtype, stats, alias):
    """Outputs of softmax and softmax_backward, on the CPU in float64."""
    noise = Noise(torch.tensor(SEED), ROWS[: logits.shape[0]], vocab_start)
    if backend is not torch_backend:
        logits, tau, dy, ids, dlogprobs, noise = on(logits, tau, dy, ids, dlogprobs, noise)
    stats = backend.sample(logits, noise, True) if stats is None else stats
    out = dy.clone() if alias else torch.empty(logits.shape, dtype=out_dtype, device=logits.device)
    sample = stats._replace(ids=ids)
    dtau = softmax_backward(
        backend, out if alias else dy, logits, tau, noise, sample, GradientRule(estimator, dlogprobs, True), out
    )
    weights, total = softmax(backend, logits, tau, noise, stats.score_max, normalize=True, dtype=out_dtype)
    raw, raw_total = softmax(backend, logits, tau, noise, stats.score_max, normalize=False, dtype=compute)
    return [t.cpu().double() for t in (out, dtau, weights, total, raw, raw_total)]


@pytest.mark.parametrize("estimator", ["ste", "st", "reinmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("vocab", "vocab_start", "alias"), [(1, 0, False), (131, 5, True), (2053, 0, True), (1552, 0, False)]
)
def test_relaxation_and_gradient(rows_backend, estimator, dtype, vocab, vocab_start, alias, poison, small_splits):
    _skip_unserved(rows_backend, dtype)
    logits, dy = logits_of(3, vocab, dtype), logits_of(3, vocab, dtype, seed=1)
    if vocab > 2:
        logits[1, ::2] = -math.inf
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    tau, dlogprobs = torch.tensor([0.5, 1.0, 2.0], dtype=compute), torch.tensor([0.3, -1.0, 2.0], dtype=compute)
    ids = torch.tensor([0, 1 % vocab, vocab - 1])
    dlogprobs = dlogprobs if vocab != 131 else None
    common = (ids, dlogprobs, vocab_start, estimator)
    found = _relaxations(logits, tau, dy, *common, rows_backend, compute, dtype, None, alias)
    double = [t if t is None else t.double() for t in (logits, tau, dy)]
    common = (ids, None if dlogprobs is None else dlogprobs.double(), vocab_start, estimator)
    truth = _relaxations(*double, *common, torch_backend, torch.float64, torch.float64, None, False)
    narrow = 8e-3 if dtype == torch.bfloat16 else 0
    for value, expected, rounding in zip(found, truth, (narrow, 0, narrow, 0, 0, 0), strict=True):
        tolerance = 1e-11 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(value, expected, rtol=tolerance + rounding, atol=tolerance)


# Awkward layouts


def test_any_strides(rows_backend, poison):
    base = logits_of(3, 700)
    row_tau = torch.tensor([0.7])
    noise = Noise(torch.tensor(SEED), ROWS[:3], 6)
    layouts = {
        "transposed": base.T.contiguous().T,
        "every other column": torch.repeat_interleave(base, 2, dim=1)[:, ::2],
        "shifted": torch.nn.functional.pad(base, (1, 3))[:, 1:-3],
    }
    found = rows_backend.sample(*on(base, noise), True)
    weights, _ = softmax(
        rows_backend, *on(base, row_tau.expand(3), noise), found.score_max, normalize=True, dtype=torch.float32
    )
    for name, logits in layouts.items():
        assert torch.equal(logits, base)
        other = rows_backend.sample(*on(logits, noise), True)
        assert all(torch.equal(a, b) for a, b in zip(found, other, strict=True)), name
        again, _ = softmax(
            rows_backend, *on(logits, row_tau.expand(3), noise), other.score_max, normalize=True, dtype=torch.float32
        )
        assert torch.equal(weights, again), name
        # An expanded gradient, and an output that is a view.
        dy = torch.ones(1, 1).expand(3, 700)
        wide = torch.full((3, 1400), 7.0, device=DEVICE)
        softmax_backward(
            rows_backend, *on(dy, logits, row_tau.expand(3), noise), other, GradientRule("ste"), wide[:, 1::2]
        )
        assert wide[:, 1::2].abs().max() < 1e-5, name
        assert (wide[:, ::2] == 7).all(), name


def _laid_out(x, layout):
    """The same `[A, V, B]` in other memory, of which it takes only a part in the last two layouts."""
    a, vocab, b = x.shape
    if layout == "contiguous":
        return x.contiguous()
    if layout == "V last":
        return x.movedim(1, 2).contiguous().movedim(2, 1)
    if layout == "V first":
        return x.movedim(1, 0).contiguous().movedim(0, 1)
    wide = x.new_full((b, vocab, 2 * a), 7.0) if layout == "reversed" else x.new_full((a, vocab + 3, 2 * b), 7.0)
    part = wide[:, :, 1::2].permute(2, 1, 0) if layout == "reversed" else wide[:, 1:-2, ::2]
    return part.copy_(x)


@pytest.mark.parametrize("layout", ["contiguous", "V last", "V first", "reversed", "part"])
@pytest.mark.parametrize("shape", [(2, 37, 3), (1, 5, 4), (3, 70, 1)])
def test_rows_in_three_dimensions(every_backend, shape, layout, poison):
    """Row `a * B + b` is `x[a, :, b]`, wherever its elements lie: the tokens, and but for rounding the rest, of plain rows.

    Sums are added in an order that depends on the layout, on every backend.
    """
    device = "cpu" if every_backend.name in ("torch", "cpu") else DEVICE
    a, vocab, b = shape
    count = a * b
    logits, dy = (logits_of(count, vocab, seed=seed).to(device) for seed in (0, 1))
    logits[0, : vocab // 2] = -math.inf
    tau = torch.linspace(0.5, 2, count, device=device)
    noise = Noise(torch.tensor(SEED), 2**33 - torch.arange(count, device=device), 6)
    backend, rule = every_backend, GradientRule("ste", needs_dtau=True)

    found = backend.sample(logits, noise, False)
    _, total = softmax(backend, logits, tau, noise, found.score_max, normalize=True, dtype=torch.float32)
    weights, dlogits = torch.empty_like(logits), torch.empty_like(logits)
    backend.gumbel_softmax(Rows.of(logits, tau, noise), False, weights.unsqueeze(2))
    dtau = softmax_backward(backend, dy, logits, tau, noise, found, rule, dlogits)

    def planes(x):
        return _laid_out(x.view(a, b, vocab).movedim(2, 1), layout)

    def same(x, y):
        return torch.allclose(x, y, rtol=1e-5, atol=1e-6)

    rows = Rows(planes(logits), tau, noise)
    out = planes(torch.zeros_like(logits))
    score_max = backend.gumbel_softmax(rows, True, out)
    assert torch.equal(score_max, found.score_max)
    assert torch.equal(out, planes(backend.one_hot(found, vocab, torch.float32)))
    out = planes(torch.full_like(logits, math.nan))
    assert torch.equal(backend.gumbel_softmax(rows, False, out), score_max)
    assert same(out, planes(weights))
    assert same(backend.softmax(rows, score_max, normalize=True, dtype=torch.float32)[1], total)
    for given, place in ((planes(dy), planes(torch.full_like(dy, math.nan))), 2 * (planes(dy),)):
        assert same(backend.softmax_backward(given, rows, found, rule, place), dtau)
        assert same(place, planes(dlogits))
    if layout in ("reversed", "part"):  # what lies between the elements is nobody's
        assert (place._base == 7).sum() == place._base.numel() - place.numel()


def test_a_bad_row_is_marked_by_its_score(every_backend, poison):
    device = "cpu" if every_backend.name in ("torch", "cpu") else DEVICE
    logits = logits_of(4, 9).to(device)
    logits[0, 3], logits[1, 8], logits[2] = math.nan, math.inf, -math.inf
    rows = Rows.of(logits, torch.ones(4, device=device), Noise(torch.tensor(SEED), None, 0))
    for hard in (False, True):
        score_max = every_backend.gumbel_softmax(rows, hard, torch.zeros_like(rows.logits))
        assert score_max.isnan().tolist() == [True, True, True, False]


def test_no_rows(rows_backend, poison):
    logits, tau, noise = on(torch.empty(0, 5), torch.empty(0), Noise(torch.tensor(SEED), None, 0))
    found = rows_backend.sample(logits, noise, True)
    assert [t.shape for t in found] == [(0,)] * 4
    weights, total = softmax(rows_backend, logits, tau, noise, found.score_max, normalize=True, dtype=torch.float32)
    assert weights.shape == (0, 5)
    assert total.shape == (0,)
    dtau = softmax_backward(
        rows_backend, logits, logits, tau, noise, found, GradientRule("ste", None, True), torch.empty_like(logits)
    )
    assert dtau.shape == (0,)


# Splits, batches and repetition


@pytest.mark.parametrize("vocab", [2053, 9001])
def test_results_depend_on_neither_batch_nor_run(rows_backend, vocab, poison, request):
    """A row alone, in a batch, and again: the same bits, over several splits."""
    if vocab < 9001:
        request.getfixturevalue("small_splits")
    logits, dy = on(logits_of(3, vocab), logits_of(3, vocab, seed=1))
    tau, rows = on(torch.tensor([0.5, 1.0, 2.0]), ROWS[:3])

    def everything(part):
        noise = Noise(seed_tensor(), rows[part], 0)
        found = rows_backend.sample(logits[part], noise, True)
        arguments = (logits[part], tau[part], noise)
        weights = softmax(rows_backend, *arguments, found.score_max, normalize=True, dtype=torch.float32)
        out = torch.empty_like(logits[part])
        dtau = softmax_backward(rows_backend, dy[part], *arguments, found, GradientRule("ste", None, True), out)
        return [*found, *weights, out, dtau]

    batch, again = everything(slice(None)), everything(slice(None))
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
    for i in range(3):
        alone = everything(slice(i, i + 1))
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(batch, alone, strict=True))


@pytest.mark.parametrize("cut", [2048, 1003])
def test_a_shard_draws_the_same_noise(rows_backend, cut):
    logits = logits_of(2, 3007)
    seed, rows = torch.tensor(SEED), ROWS[:2]
    whole = rows_backend.sample(*on(logits, Noise(seed, rows, 0)), False)
    left = rows_backend.sample(*on(logits[:, :cut], Noise(seed, rows, 0)), False)
    right = rows_backend.sample(*on(logits[:, cut:], Noise(seed, rows, cut)), False)
    ids = torch.where(left.score_max >= right.score_max, left.ids, right.ids + cut)
    assert torch.equal(ids, whole.ids)
    assert torch.equal(torch.maximum(left.score_max, right.score_max), whole.score_max)


# Bad rows and masked tokens


@pytest.mark.parametrize("vocab", [7, 2053])
@pytest.mark.parametrize("what", [math.nan, math.inf, -math.inf])
def test_a_bad_row_is_nan_and_alone(rows_backend, vocab, what, poison, small_splits):
    logits = logits_of(3, vocab)
    good = rows_backend.sample(*on(logits, Noise(torch.tensor(SEED), ROWS[:3], 1)), True)
    if what == -math.inf:
        logits[1] = what
    else:
        logits[1, vocab // 2] = what
    tau, dy = torch.ones(3), logits_of(3, vocab, seed=1)
    for logsumexp in (False, True):
        found = rows_backend.sample(*on(logits, Noise(torch.tensor(SEED), ROWS[:3], 1)), logsumexp)
        assert 0 <= found.ids[1] < vocab
        assert all(t[1].isnan() for t in found[1:] if t.numel())
        for a, b in zip(found, good, strict=True):
            assert a.numel() == 0 or torch.equal(a[[0, 2]], b[[0, 2]])
    arguments = on(logits, tau, Noise(torch.tensor(SEED), ROWS[:3], 1))
    weights, total = softmax(rows_backend, *arguments, found.score_max, normalize=True, dtype=torch.float32)
    assert weights.isnan().any(1).tolist() == total.isnan().tolist() == [False, True, False]
    assert weights[1].isnan().all()
    for estimator in ("ste", "st", "reinmax"):
        out = torch.empty_like(logits).to(DEVICE)
        softmax_backward(rows_backend, dy.to(DEVICE), *arguments, found, GradientRule(estimator), out)
        assert out[1].isnan().all()
        assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("estimator", ["ste", "st", "reinmax"])
def test_masked_tokens_get_no_gradient_whatever_arrives(rows_backend, estimator, poison):
    logits, dy = logits_of(2, 600), logits_of(2, 600, seed=1)
    masked = torch.zeros(2, 600, dtype=torch.bool)
    masked[:, 1::3] = True
    logits[masked] = -math.inf
    clean = dy.clone()
    dy[masked] = torch.tensor([math.inf, -math.inf, math.nan, 1e38]).repeat(100)
    arguments = on(logits, torch.tensor([0.5, 2.0]), Noise(torch.tensor(SEED), ROWS[:2], 0))
    found = rows_backend.sample(*on(logits, Noise(torch.tensor(SEED), ROWS[:2], 0)), True)
    assert not masked[torch.arange(2), found.ids.cpu()].any()
    results = []
    for upstream in (dy, clean):
        out = torch.empty(2, 600, device=DEVICE)
        dlogprobs = torch.ones(2, device=DEVICE)
        dtau = softmax_backward(
            rows_backend, upstream.to(DEVICE), *arguments, found, GradientRule(estimator, dlogprobs, True), out
        )
        results.append((out.cpu(), dtau.cpu()))
    assert (results[0][0][masked] == 0).all()
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    weights, _ = softmax(rows_backend, *arguments, found.score_max, normalize=True, dtype=torch.float32)
    assert (weights.cpu()[masked] == 0).all()
    # Nor does a masked token that was given as the sampled one.
    given = found._replace(ids=torch.tensor([1, 4], device=DEVICE))
    out = torch.empty(2, 600, device=DEVICE)
    softmax_backward(rows_backend, clean.to(DEVICE), *arguments, given, GradientRule(estimator, dlogprobs), out)
    assert (out.cpu()[masked] == 0).all()
