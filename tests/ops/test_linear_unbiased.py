"""Stochastic support (eps > 0): the mean of the gradient over draws is the exact gradient.

Every check looks at differences: the gradient with eps minus the exact one (eps = 0) for the same noise, so the noise's
own variance, which is far larger, cancels. BATCHES independent seeds give that many independent vectors of
differences; each is projected onto a few directions (the mean exact gradient, where shrinking shows, and fixed random
ones), and each projection's mean is compared with its own standard error: Student's t with BATCHES - 1 degrees of
freedom. THRESHOLD is its two-sided quantile at 1e-8, about 1e5 projections are looked at in all, so a correct
implementation fails this file for one choice of seeds in a thousand; the seeds are fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import grade_kernels as gk
from grade_kernels.backends import Support
from grade_kernels.backends.torch import backend as torch_backend
from grade_kernels.ops.head_gradients import Entries
from grade_kernels.ops.linear_gumbel_ste.sparse import SparseRows
from tests.support.helpers import ESTIMATORS, leaf, noise_given, randn, truth_noise
from tests.support.problems import Problem, Tensor, flat, logits_of, problem, run, small_chunks, widened

BATCHES, ROWS, VOCAB, FEATURES = 40, 48, 300, 5
THRESHOLD = 7.15  # t quantile, 39 degrees of freedom, two-sided 1e-8
EPS = 2**-1  # coarse, so that a wrong rule's bias (relative size eps or more) stands out of the rounding

SHAPES = {"peaked": 1.6, "flat": 0.05}


def directions(name: str, exact: Tensor) -> Tensor:
    """Where to look: along the mean exact gradient `exact` [k], and in fixed random directions; [k, 5]."""
    generator = torch.Generator().manual_seed(len(name))
    random = torch.randn(exact.numel(), 4, generator=generator, dtype=torch.float64)
    chosen = torch.cat([exact[:, None], random], dim=1)
    return chosen / chosen.norm(dim=0).clamp_min(1e-300)


def assert_unbiased(draw: Callable[[int, float], dict[str, Tensor]], eps: float = EPS, batches: int = BATCHES) -> None:
    """`draw(seed, eps)` gives gradients by name, sums over independent rows; AssertionError where they are biased."""
    rounded: dict[str, list[Tensor]] = {}
    exact: dict[str, list[Tensor]] = {}
    for seed in range(batches):
        for store, value in ((rounded, eps), (exact, 0.0)):
            for name, gradient in draw(1000 + seed, value).items():
                store.setdefault(name, []).append(gradient.detach().double().cpu().reshape(-1))
    for name in exact:
        truth = torch.stack(exact[name])
        difference = torch.stack(rounded[name]) - truth
        shown = difference @ directions(name, truth.mean(0))
        assert (shown.norm(dim=0) > 1e-4 * truth.norm(dim=1).mean()).all(), f"{name}: nothing was rounded"
        t = shown.mean(0) / (shown.std(0).clamp_min(1e-12) / math.sqrt(batches))
        assert t.abs().max() < THRESHOLD, (
            f"{name} is biased: t = {[round(x, 1) for x in t.tolist()]}, "
            f"relative {float(shown.mean(0)[0] / truth.mean(0).norm()):.4f}"
        )


def gumbel_draw(
    estimator: str, shape: str, tau: float, path: str, device: str = "cpu", rows: int = ROWS, vocab: int = VOCAB
) -> Callable[[int, float], dict[str, Tensor]]:
    """Gradients of `linear_gumbel_ste` on `rows` copies of one hidden state with independent noise."""
    p = problem((rows,), vocab, FEATURES, bias=True, estimator=estimator, tau=tau, scale=SHAPES[shape], device=device,
                softcap=6.0 if shape == "peaked" else None,
                table_dtypes=(torch.float32, torch.float32))  # fmt: skip
    # What a head and a table have in common is what the gradient sees; independent ones would send hardly any.
    p = p._replace(
        tables=(p.lm_head[:, :3] / SHAPES[shape], p.tables[1]),
        hidden=p.hidden[:1].expand(rows, -1).contiguous(), bias=p.bias * SHAPES[shape],
        tau=torch.full((rows,), tau, device=device),
        dlogprobs=torch.ones_like(p.dlogprobs) * (path == "logprobs"),
        upstream=tuple(d[:1].expand(rows, -1) * (path == "embedding") for d in p.upstream),
    )  # fmt: skip

    def draw(seed: int, eps: float) -> dict[str, Tensor]:
        answer = run(p._replace(noise=gk.GumbelNoise(seed)), eps)
        found = {"hidden": answer.hidden.sum(0), "lm_head": answer.lm_head, "bias": answer.bias}
        if path == "embedding" and estimator != "reinmax":
            found["tau"] = answer.tau.sum()[None]
        if path == "embedding" and estimator == "soft":
            found["table 0"], found["table 1"] = answer.tables
        return found

    return draw


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks of vocabulary, so that the running normaliser decides first."""
    small_chunks(monkeypatch, gather=2**20)


def on_rounding_backends(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test for backends that round at all, and are fast enough for statistics."""
    slow = "thousands of rows in Triton's interpreter; test_support compares its supports one by one instead"
    # Eighty calls a case. What values of parameters do together, test_gradient_on_a_support sees in a single call.
    test = pytest.mark.cover(1, on_each_backend=True)(test)
    test = pytest.mark.uncollect_if(lambda backend: backend == "reference", "the reference is exact at every eps")(test)
    return pytest.mark.uncollect_if(lambda interpreted: interpreted, slow)(test)


@on_rounding_backends
@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_embedding_path(backend: str, device: str, estimator: str, tau: float, shape: str) -> None:
    assert_unbiased(gumbel_draw(estimator, shape, tau, "embedding", device))


@on_rounding_backends
@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("estimator", ["ste", "soft", "reinmax"])
def test_logprobs_path(backend: str, device: str, estimator: str, shape: str) -> None:
    assert_unbiased(gumbel_draw(estimator, shape, 0.7, "logprobs", device))


def statistic_draw(
    kind: str, shape: str, temperature: float, device: str, rows: int = ROWS
) -> Callable[[int, float], dict[str, Tensor]]:
    p = problem((1,), VOCAB, FEATURES, bias=True, scale=SHAPES[shape], device=device)
    hidden = p.hidden.expand(rows, -1).contiguous()
    ref_hidden, ref_head = randn(1, 3, device=device, seed=7).expand(rows, 3), randn(VOCAB, 3, device=device, seed=8)
    ids = torch.arange(rows, device=device) * 7 % VOCAB

    def draw(seed: int, eps: float) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        h, w, b = leaf(hidden), leaf(p.lm_head), leaf(p.bias * SHAPES[shape])
        common: dict[str, Any] = {"bias": b, "temperature": temperature, "eps": eps}
        common["logit_softcap"] = 6.0 if shape == "peaked" else None
        if kind == "logprobs":
            value = gk.linear_logprobs(h, w, ids, **common)
        elif kind == "kl":
            value = gk.linear_kl(h, w, ref_hidden, ref_head, **common)
        else:
            value = gk.linear_entropy(h, w, **common)
        dh, dw, db = torch.autograd.grad(value.sum(), (h, w, b))
        return {"hidden": dh.sum(0), "lm_head": dw, "bias": db}

    return draw


@on_rounding_backends
@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("kind", ["logprobs", "kl", "entropy"])
def test_statistics(backend: str, device: str, kind: str, temperature: float, shape: str) -> None:
    assert_unbiased(statistic_draw(kind, shape, temperature, device))


# --- the check has teeth


def without_leave_one_out(patch: pytest.MonkeyPatch) -> None:
    """The mean of an entry includes its own rounded value."""

    def relaxed(self: SparseRows, support: Support, factor: Tensor, tempered: bool) -> Entries:
        rows, q = support.rows(), support.p.clamp_min(self.eps)
        dy = self.upstream.at(rows, support.tokens)
        values = factor[rows] * q * (dy - support.row_sums(q * dy)[rows])
        if tempered:
            self.dtau -= support.row_sums(values * support.p.log())
        return Entries(rows, support.tokens, values)

    patch.setattr(SparseRows, "relaxed", relaxed)


def reinmax_without_leave_one_out(patch: pytest.MonkeyPatch) -> None:
    """The same in ReinMax's own rule."""

    def reinmax(self: SparseRows, support: Support, untempered: Support) -> list[Entries]:
        of, everyone = self.statistics, torch.arange(len(self.ids))
        sampled_p = ((of.chosen - of.logit_max) / self.tau).exp() / of.relaxed_sum
        sampled_dy, weight, rows = self.upstream.at(everyone, self.ids), (1.0 + sampled_p) / 2, support.rows()
        q = torch.where(support.tokens != self.ids[rows], support.p.clamp_min(self.eps), 0.0) / 2
        dy = self.upstream.at(rows, support.tokens)
        mean = support.row_sums(q * dy) + weight * sampled_dy
        return [
            Entries(rows, support.tokens, 2 * q * (dy - mean[rows])),
            Entries(everyone, self.ids, 2 * weight * (sampled_dy - mean)),
            self.relaxed(untempered, torch.full_like(self.tau, -0.5), tempered=False),
        ]

    patch.setattr(SparseRows, "reinmax", reinmax)


def dropped(patch: pytest.MonkeyPatch) -> None:
    """Tokens below eps are left out instead of being rounded."""
    patch.setattr(torch_backend, "uniform_from_words", lambda word, dtype: torch.ones(word.shape, dtype=dtype))


def own_probability(patch: pytest.MonkeyPatch) -> None:
    """A kept token stands for its own p instead of max(p, eps)."""
    clamp = Tensor.clamp_min
    patch.setattr(Tensor, "clamp_min", lambda self, least: self if least == EPS else clamp(self, least))


def wrong_uniform(patch: pytest.MonkeyPatch) -> None:
    """The decision reuses the noise's own word without mixing it."""
    patch.setattr(torch_backend, "uniform_from_words", lambda word, dtype: (word.to(dtype) + 0.5) * 2.0**-32)


MUTATIONS = (without_leave_one_out, dropped, own_probability, wrong_uniform)


@pytest.mark.cover(1)
@pytest.mark.uncollect_if(
    lambda mutation, estimator: mutation is wrong_uniform and estimator == "st",
    "a word that is not the noise's needs no mixing",
)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("estimator", ["ste", "soft", "st"])
def test_biased_rules_are_noticed(mutation: Callable[..., None], estimator: str) -> None:
    """The very same check fails for each way to get it wrong (`st` draws a word of its own: any uniform serves)."""
    with gk.use_backend("torch"), pytest.MonkeyPatch.context() as patch:
        mutation(patch)
        with pytest.raises(AssertionError, match="biased"):
            assert_unbiased(gumbel_draw(estimator, "peaked", 1.0, "embedding"))


@pytest.mark.cover(1)
@pytest.mark.parametrize("kind", ["logprobs", "kl", "entropy"])
@pytest.mark.parametrize("mutation", [dropped, own_probability], ids=lambda f: f.__name__)
def test_biased_statistics_are_noticed(mutation: Callable[..., None], kind: str) -> None:
    with gk.use_backend("torch"), pytest.MonkeyPatch.context() as patch:
        mutation(patch)
        with pytest.raises(AssertionError, match="biased"):
            assert_unbiased(statistic_draw(kind, "peaked", 1.0, "cpu"))


@pytest.mark.parametrize("mutation", [without_leave_one_out, reinmax_without_leave_one_out, dropped, own_probability],
                         ids=lambda f: f.__name__)  # fmt: skip
def test_biased_reinmax_is_noticed(mutation: Callable[..., None]) -> None:
    with gk.use_backend("torch"), pytest.MonkeyPatch.context() as patch:
        mutation(patch)
        with pytest.raises(AssertionError, match="biased"):
            assert_unbiased(gumbel_draw("reinmax", "peaked", 0.5, "embedding"))


# --- the support itself


@on_rounding_backends
def test_default_eps_is_unbiased_on_a_large_vocabulary(backend: str, device: str) -> None:
    """2^-11, V of thousands: what a user gets."""

    draw = gumbel_draw("ste", "flat", 1.0, "embedding", device, rows=4, vocab=20011)
    assert_unbiased(draw, eps=2**-11, batches=BATCHES)


def expected_support(p: Problem, eps: float, domain: int, noisy: bool) -> tuple[Tensor, Tensor]:
    """Probabilities `[N, V]` and decision thresholds in float64, from the words of the noise contract."""
    from grade_kernels.noise import uniform_from_words

    p = widened(flat(p))
    logits = logits_of(p)
    rows, vocab = logits.shape
    if noisy:
        logits = logits + truth_noise(p.noise, rows, vocab, logits)
    prior = p.noise.noise if isinstance(p.noise, gk.PosteriorNoise) else p.noise
    words = prior.words(rows, vocab, domain=domain)
    return (logits / p.tau[:, None]).softmax(-1), uniform_from_words(words, torch.float64) * eps


@pytest.mark.uncollect_if(lambda backend: backend == "reference", "the reference collects no support")
@pytest.mark.parametrize("noisy", [True, False], ids=["scores", "softmax"])
@pytest.mark.parametrize("eps", [2**-5, 0.9])
@pytest.mark.parametrize("vocab", [1, 17, 300, 1031])
def test_support(
    backend: str, device: str, interpreted: bool, vocab: int, eps: float, noisy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly the tokens with p > u * eps, sorted by row and token, with their exact probabilities."""
    small_chunks(monkeypatch)
    n = 2 if interpreted else 33
    row_ids = torch.arange(n, device=device) * 2**33 - 5
    p = problem((n,), vocab, 7, mask=vocab > 1, tau="row", device=device,
                noise=gk.GumbelNoise(3, row_ids, vocab_start=6))  # fmt: skip
    chosen = gk.backends.get(backend)
    head = gk.backends.Head(p.hidden, p.lm_head, p.bias, None)
    noise = gk.backends.Noise(p.noise.seed.to(device), p.noise.row_ids, 6)
    if noisy:
        *_, support = chosen.head_scores(head, p.tau, noise, eps)
    else:
        *_, support = chosen.head_softmax(head, p.tau, noise, eps)
    probabilities, threshold = expected_support(p, eps, 0 if noisy else 2, noisy)
    assert not support.overflow.any()
    assert support.offsets.tolist()[0] == 0
    assert support.offsets.tolist()[-1] == len(support.tokens) == len(support.p)
    rows = torch.arange(n).repeat_interleave(support.offsets.cpu().diff())
    place = rows * vocab + support.tokens.cpu()
    assert (place.diff() > 0).all(), "entries are not sorted by row and token, or repeat"
    kept = torch.zeros(n * vocab, dtype=torch.bool)
    kept[place] = True
    kept = kept.reshape(n, vocab)
    clear = (probabilities - threshold).abs() > 1e-4 * probabilities
    assert torch.equal(kept[clear], (probabilities > threshold)[clear])
    torch.testing.assert_close(support.p.cpu().double(), probabilities[kept], rtol=2e-5, atol=0)
    assert clear.double().mean() > 0.99


@pytest.mark.uncollect_if(lambda backend: backend == "reference", "the reference collects no support")
@pytest.mark.parametrize("given", [False, True], ids=["", "given tokens"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_on_a_support(
    backend: str, device: str, interpreted: bool, estimator: str, softcap: float | None, given: bool
) -> None:
    """One draw, number by number: q = max(p, eps) on the support, and a mean without the entry's own rounding."""
    n, eps = (2 if interpreted else 9), 2**-4
    p = problem((n,), 67, 5, bias=True, tau="row", estimator=estimator, softcap=softcap, scale=0.7, device=device,
                table_dtypes=(torch.float32, torch.float32))  # fmt: skip
    if given:
        p = p._replace(noise=noise_given(p.noise, logits_of(widened(flat(p))).to(device), known=True))
    ours = run(p, eps)
    w = widened(flat(p))
    dy = sum(d @ t.T for d, t in zip(w.upstream, w.tables, strict=True))
    hit = torch.zeros_like(dy).scatter_(1, ours.ids.cpu()[:, None], 1.0)

    def rounded(q: Problem, domain: int, noisy: bool) -> tuple[Tensor, Tensor]:
        probability, threshold = expected_support(q, eps, domain, noisy)
        assert ((probability - threshold).abs() > 1e-5 * probability).all(), "rounding may decide; take another seed"
        return probability, torch.where(probability > threshold, probability.clamp_min(eps), 0.0)

    def relaxed(pair: tuple[Tensor, Tensor]) -> Tensor:
        probability, q = pair
        mean = (q * dy).sum(1, keepdim=True)
        return q * (dy - (mean - q * dy) - probability * dy)

    noisy = estimator in ("ste", "soft")
    main = rounded(p, (3 if given else 0) if noisy else 2, noisy)
    plain = rounded(p._replace(tau=torch.ones_like(p.tau)), 2, False)
    if estimator == "reinmax":
        probability, q = ((x / 2) * (1 - hit) for x in main)
        sampled = hit * (1 + main[0]) / 2
        mean = ((q + sampled) * dy).sum(1, keepdim=True)
        dl = 2 * q * (dy - (mean - q * dy) - probability * dy) + 2 * sampled * (dy - mean) - relaxed(plain) / 2
    else:
        dl = relaxed(main) / w.tau[:, None]
    dl = dl + w.dlogprobs[:, None] * (hit - plain[1])
    if softcap is not None:
        dl = dl * (1 - (logits_of(w) / softcap) ** 2)
    expected = {"hidden": dl @ w.lm_head, "lm_head": dl.T @ w.hidden, "bias": dl.sum(0)}
    for name, truth in expected.items():
        torch.testing.assert_close(getattr(ours, name).double().cpu(), truth, rtol=5e-5, atol=5e-5)
    if estimator == "soft":
        for grad, d in zip(ours.tables, w.upstream, strict=True):
            torch.testing.assert_close(grad.double().cpu(), main[1].T @ d, rtol=5e-5, atol=5e-5)


@pytest.mark.takes_long(
    "a mean over many draws; test_linear_exact compares rows that overflowed with the dense backward"
)
@on_rounding_backends
def test_overflow_does_not_bias(backend: str, device: str) -> None:
    """V = 4096 and eps 2^-9 leave room for 512 entries, just what a flat row needs on average.

    If a row is exact when many tokens happen to be kept and sparse when few are, the mean over draws is too small.
    """
    assert_unbiased(gumbel_draw("st", "flat", 1.0, "embedding", device, vocab=4096), eps=2**-9)
