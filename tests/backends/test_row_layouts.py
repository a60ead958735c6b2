"""Samples of rows of every width and layout, and their gradients: the kernels of Triton and CUDA against float64.

Without a GPU Triton's run through its interpreter and CUDA's on the host, which are slow: shapes are small.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from grade_kernels import backends
from grade_kernels.backends import Backend, GradientRule, Noise, Rows, Sample
from tests.support.helpers import resize
from tests.support.rows import DEVICE, GPU_BACKENDS, REFINED, SEED, loaded, on

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

torch_backend = backends.get("torch")
NARROW = {
    torch.float32: 0.0,
    torch.float64: 0.0,
    torch.bfloat16: 4e-3,
    torch.float16: 5e-4,
}  # half a unit in the last place

# From logits [A, V, B] to the same in other memory, or to other logits.
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "V last": lambda x: x.movedim(1, 2).contiguous().movedim(2, 1),
    "V first": lambda x: x.movedim(1, 0).contiguous().movedim(0, 1),
    "every second token": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda x: x[:1, :, :1].expand(x.shape),
    "not aligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.fixture(params=GPU_BACKENDS)
def rows_backend(request: pytest.FixtureRequest) -> Backend:
    return loaded(request.param)


@pytest.fixture
def small_tiles(monkeypatch):
    """For Triton rows of several splits of several tiles, which the interpreter gets through quickly."""
    resize(monkeypatch, tile_groups=256, tile_tokens=64, row_split=512)


def given(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(shape, generator=generator)).to(dtype)


def by_row(x: torch.Tensor) -> torch.Tensor:
    """`[N, V]` in float64 of `[A, V, B]`."""
    return x.cpu().movedim(1, 2).reshape(-1, x.shape[1]).double()


def check(backend: Backend, logits: torch.Tensor, *, vocab_start: int = 0, named_rows: bool = False) -> None:
    """Both kinds of sample and all gradients, with a temperature of each row, against float64."""
    count, vocab, dtype = logits.shape[0] * logits.shape[2], logits.shape[1], logits.dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    tau = torch.linspace(0.5, 2, count, dtype=compute)
    row_ids = 2**40 + 7 - 3 * torch.arange(count) if named_rows else None
    noise, truth = Noise(torch.tensor(SEED), row_ids, vocab_start), by_row(logits)
    sample = torch_backend.sample(truth, noise, False)
    exact = Rows.of(truth, tau.double(), noise)
    soft, _ = torch_backend.softmax(exact, sample.score_max, normalize=True, dtype=torch.float64)
    hard = torch.nn.functional.one_hot(sample.ids, vocab).double()

    where = Noise(noise.seed.to(DEVICE), None if row_ids is None else row_ids.to(DEVICE), vocab_start)
    rows = Rows(logits.to(DEVICE), tau.to(DEVICE), where)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5

    def close(found: torch.Tensor, expected: torch.Tensor, rounding: float) -> None:
        torch.testing.assert_close(found, expected, rtol=tolerance + rounding, atol=tolerance)

    for is_hard, expected in ((True, hard), (False, soft.squeeze(2))):
        out = torch.full(logits.shape, math.nan, dtype=dtype, device=DEVICE)
        score_max = backend.gumbel_softmax(rows, is_hard, out)
        close(by_row(out), expected, NARROW[dtype])
        close(score_max.cpu().double(), sample.score_max, 0)
    dy = given(tuple(logits.shape), dtype, seed=1)
    expected = torch.empty_like(exact.logits)
    rule = GradientRule("ste", needs_dtau=True)
    expected_dtau = torch_backend.softmax_backward(by_row(dy).unsqueeze(2), exact, sample, rule, expected)
    found = Sample(sample.ids, score_max, score_max[:0], score_max[:0])
    place = dy.to(DEVICE, copy=True)
    for upstream, out in ((dy.to(DEVICE), torch.full_like(place, math.nan)), (place, place)):
        dtau = backend.softmax_backward(upstream, rows, found, rule, out)
        close(by_row(out), expected.squeeze(2), NARROW[dtype])
        close(dtau.cpu().double(), expected_dtau, 5e-5 if dtype != torch.float64 else 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("vocab", [1, 2, 3, 4, 5, 6, 7, 8, 9, 31, 320, 1024])
def test_every_width(rows_backend, vocab, layout):
    check(rows_backend, LAYOUTS[layout](given((3, vocab, 2))))


@pytest.mark.parametrize(
    "shape", [(5, 6, 1), (1, 6, 5), (1, 6, 1), (3, 4, 7), (2, 37, 3), (1, 300, 33), (600, 2, 1), (1, 3, 520)]
)
def test_every_place(rows_backend, shape):
    """V last, first and in the middle, more rows than a tile has, and tiles of which a part exists."""
    check(rows_backend, given(shape), named_rows=True)


@pytest.mark.uncollect_if(
    lambda rows_backend, dtype: rows_backend == "cuda" and dtype == torch.float64, "served by the torch backend"
)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("vocab", [2, 6, 8, 70])
def test_every_dtype(rows_backend, dtype, vocab):
    for shape in ((4, vocab, 1), (2, vocab, 4)):
        check(rows_backend, given(shape, dtype))


@pytest.mark.parametrize("vocab_start", [1, 2, 3, 4, 2**34 + 1])
@pytest.mark.parametrize("vocab", [1, 2, 6, 16])
def test_shards(rows_backend, vocab, vocab_start):
    check(rows_backend, given((3, vocab, 2)), vocab_start=vocab_start)


@pytest.mark.parametrize("vocab_start", [0, 5])
@pytest.mark.parametrize("shape", [(2, 1100, 1), (2, 270, 3), (1, 150, 5)])
def test_rows_of_several_tiles(rows_backend, shape, vocab_start, small_tiles):
    for layout in ("contiguous", "V last", "every second token"):
        check(rows_backend, LAYOUTS[layout](given(shape)), vocab_start=vocab_start)


def test_no_rows(rows_backend):
    for shape in ((0, 6, 1), (2, 6, 0)):
        logits = torch.empty(shape, device=DEVICE)
        rows = Rows(logits, torch.empty(0, device=DEVICE), Noise(torch.tensor(SEED), None, 0))
        score_max = rows_backend.gumbel_softmax(rows, False, logits)
        assert score_max.shape == (0,)
        sample = Sample(score_max.long(), score_max, score_max, score_max)
        rule = GradientRule("ste", needs_dtau=True)
        assert rows_backend.softmax_backward(logits, rows, sample, rule, logits).shape == (0,)


@pytest.mark.parametrize(("row", "token"), REFINED)
@pytest.mark.parametrize("across", [False, True])
def test_refined_words(rows_backend, row, token, across, request):
    """The rare path: a token whose noise needs the second word, among tokens of the same logit."""
    vocab = 200
    for tiles in ("one", "several"):
        if tiles == "several":
            request.getfixturevalue("small_tiles")
        shape = (1, vocab, 3) if across else (3, vocab, 1)
        noise = Noise(torch.tensor(SEED), torch.tensor([5, row, 6]), token - 41)
        rows = Rows(*on(torch.zeros(shape), torch.ones(3), noise))
        y = torch.empty(shape, device=DEVICE)
        score_max = rows_backend.gumbel_softmax(rows, True, y)
        exact = torch_backend.sample(torch.zeros(3, vocab, dtype=torch.float64), noise, False)
        assert torch.equal(by_row(y).argmax(1), exact.ids)
        torch.testing.assert_close(score_max.cpu().double(), exact.score_max, rtol=0, atol=4e-6)
        rows_backend.gumbel_softmax(rows, False, y)
        assert by_row(y)[1, 41] > 0.9999
        dy = torch.zeros(shape, device=DEVICE)
        dy.movedim(1, 2).view(3, vocab)[:, 41] = 1
        sample = Sample(score_max.long(), score_max, score_max[:0], score_max[:0])
        out = torch.empty_like(dy)
        rows_backend.softmax_backward(dy, rows, sample, GradientRule("ste"), out)
        p = by_row(y)[1, 41]
        torch.testing.assert_close(by_row(out)[1, 41], p * (1 - p), rtol=1e-2, atol=1e-8)


@pytest.mark.parametrize("what", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("vocab", [2, 6, 70])
def test_a_bad_row_is_nan_and_alone(rows_backend, vocab, what, request):
    for tiles in ("one", "several"):
        if tiles == "several":
            request.getfixturevalue("small_tiles")
        for layout in ("contiguous", "V last"):
            results = []
            for bad in (False, True):
                logits = given((2, vocab, 2))
                logits[1, vocab // 2 if what != -math.inf else slice(None), 0] = what if bad else 0.5
                rows = Rows(
                    LAYOUTS[layout](logits).to(DEVICE), torch.ones(4, device=DEVICE), Noise(torch.tensor(SEED), None, 0)
                )
                hard, soft, gradient = (torch.empty((2, vocab, 2), device=DEVICE) for _ in range(3))
                score_max = rows_backend.gumbel_softmax(rows, True, hard)
                assert torch.equal(rows_backend.gumbel_softmax(rows, False, soft).isnan(), score_max.isnan())
                sample = Sample(score_max.long(), score_max, score_max[:0], score_max[:0])
                dy = given((2, vocab, 2), seed=1).to(DEVICE)
                rows_backend.softmax_backward(dy, rows, sample, GradientRule("ste"), gradient)
                results.append([score_max[:, None].cpu(), by_row(hard), by_row(soft), by_row(gradient)])
            for good, bad in zip(*results, strict=True):
                assert bad[2].isnan().all()
                assert torch.equal(bad[[0, 1, 3]], good[[0, 1, 3]])


def test_masked_tokens_get_nothing_whatever_arrives(rows_backend):
    logits, dy = given((3, 6, 2)), given((3, 6, 2), seed=1)
    masked = torch.zeros(logits.shape, dtype=torch.bool)
    masked[:, ::3] = True
    logits[masked] = -math.inf
    rows = Rows(logits.to(DEVICE), torch.full((6,), 0.7, device=DEVICE), Noise(torch.tensor(SEED), None, 0))
    y = torch.empty_like(rows.logits)
    score_max = rows_backend.gumbel_softmax(rows, False, y)
    assert (y.cpu()[masked] == 0).all()
    sample = Sample(score_max.long(), score_max, score_max[:0], score_max[:0])
    results = []
    for value in (0.0, math.inf, math.nan):
        upstream = dy.masked_fill(masked, value).to(DEVICE)
        out = torch.empty_like(upstream)
        dtau = rows_backend.softmax_backward(upstream, rows, sample, GradientRule("ste", needs_dtau=True), out)
        results.append((out.cpu(), dtau.cpu()))
    for out, dtau in results:
        assert (out[masked] == 0).all()
        assert torch.equal(out, results[0][0])
        assert torch.equal(dtau, results[0][1])


@pytest.mark.parametrize("vocab", [5, 31])
def test_tokens_are_those_of_the_other_kernels(rows_backend, vocab):
    """One noise: the bits of the best score and the token, whichever kernel looks for them."""
    logits = given((40, vocab, 1)).to(DEVICE)
    rows = Rows(logits, torch.ones(40, device=DEVICE), Noise(torch.tensor(SEED), None, 6))
    sample = rows_backend.sample(logits.squeeze(2), rows.noise, False)
    for layout in ("contiguous", "V first", "every second token"):
        y = torch.empty_like(logits)
        assert torch.equal(
            rows_backend.gumbel_softmax(rows._replace(logits=LAYOUTS[layout](logits)), True, y), sample.score_max
        )
        assert torch.equal(y.squeeze(2).argmax(1), sample.ids)


def test_equal_scores_go_to_the_smaller_token(rows_backend):
    # Noise is lost in numbers this large, and the lowest number is a legal logit.
    for value in (1e30, torch.finfo(torch.float32).min):
        for shape in ((2, 9, 1), (1, 9, 2)):
            logits = torch.full(shape, value, device=DEVICE)
            logits[:, :2] = -math.inf
            rows = Rows(logits, torch.ones(2, device=DEVICE), Noise(torch.tensor(SEED), None, 0))
            y = torch.empty_like(logits)
            rows_backend.gumbel_softmax(rows, True, y)
            assert by_row(y).argmax(1).tolist() == [2, 2]
            rows_backend.gumbel_softmax(rows, False, y)
            torch.testing.assert_close(
                by_row(y)[:, 2:], torch.full((2, 7), 1 / 7, dtype=torch.float64), rtol=1e-6, atol=0
            )


@pytest.mark.parametrize("vocab_start", [0, 5])
@pytest.mark.parametrize("vocab", [4500, 9001])
def test_long_rows(rows_backend, vocab, vocab_start):
    """Rows that the kernels over strips serve, in a soft sample by its own scan."""
    logits = given((2, vocab, 1))
    logits[0, 100:3000] = -math.inf
    check(rows_backend, logits, vocab_start=vocab_start)


def test_parts_of_rows_change_nothing(rows_backend, monkeypatch, small_tiles):
    """Rows that are read twice are taken in parts."""
    for shape in ((33, 260, 1), (1, 260, 33), (3, 260, 8)):
        logits, dy = given(shape).to(DEVICE), given(shape, seed=1).to(DEVICE)
        rows = Rows(
            logits, torch.linspace(0.5, 2, shape[0] * shape[2], device=DEVICE), Noise(torch.tensor(SEED), None, 0)
        )
        results = []
        for size in (2**24, 2**14):
            resize(monkeypatch, reread_bytes=size)
            y, dlogits = torch.empty_like(logits), torch.empty_like(logits)
            score_max = rows_backend.gumbel_softmax(rows, False, y)
            sample = Sample(score_max.long(), score_max, score_max[:0], score_max[:0])
            dtau = rows_backend.softmax_backward(dy, rows, sample, GradientRule("ste", needs_dtau=True), dlogits)
            results.append((score_max, y, dlogits, dtau))
        for whole, in_parts in zip(*results, strict=True):
            assert torch.equal(whole, in_parts)
