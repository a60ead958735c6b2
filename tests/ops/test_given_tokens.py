"""`GumbelNoise.given`: noise from its posterior, given tokens, has the distribution that prior noise has given its winner.

Statistical tests have fixed seeds. Each says how often a correct implementation would fail with other seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

import grade_kernels as gk
from grade_kernels.backends import Noise, Posterior
from grade_kernels.noise import uniform_from_words
from tests.support.helpers import (
    ESTIMATORS,
    grads,
    leaf,
    masked,
    noise_given,
    noise_of,
    on_cpu,
    raises,
    randn,
    resize,
    truth_noise,
)
from tests.support.problems import small_chunks

Tensor = torch.Tensor

MANY = 200_000
LOGITS = torch.tensor([0.3, -1.2, 1.1, -math.inf, -0.4], dtype=torch.float64)
VOCAB = len(LOGITS)


def many_logits(device: str = "cpu", dtype: torch.dtype = torch.float64) -> Tensor:
    return LOGITS.to(device, dtype).expand(MANY, VOCAB)


def prior_tokens(seed: int) -> tuple[Tensor, Tensor]:
    """Scores `[MANY, VOCAB]` of prior noise, and the tokens that they make win."""
    scores = LOGITS + gk.GumbelNoise(seed).dense(MANY, VOCAB, dtype=torch.float64)
    return scores, scores.argmax(1)


def assert_same_distribution(a: Tensor, b: Tensor, what: str, rate: float) -> None:
    """Two samples by the test of Kolmogorov and Smirnov, whose statistic has exceeded this with probability `rate`."""
    both = torch.cat([a, b]).sort().values
    below_a, below_b = (torch.searchsorted(x.sort().values, both, right=True) / len(x) for x in (a, b))
    distance = float((below_a - below_b).abs().max())
    limit = math.sqrt(-math.log(rate / 2) / 2 * (len(a) + len(b)) / (len(a) * len(b)))
    assert distance < limit, f"{what}: the distributions are {distance:.4f} apart, {limit:.4f} is chance"


@pytest.mark.parametrize("known", [False, True], ids=["", "known logprobs"])
def test_distribution_of_the_posterior(known: bool) -> None:
    """Prior noise grouped by its winner, and posterior noise given that winner: every score, their maximum, their sums.

    Four winners, four scores, the maximum and three sums each: 32 comparisons at 1e-10 fail by chance once in 3e8 runs.
    """
    scores, ids = prior_tokens(5)
    logprobs = LOGITS.log_softmax(0)[ids] if known else None
    given = LOGITS + gk.GumbelNoise(6).given(ids, logprobs).dense(many_logits())
    assert torch.equal(given.argmax(1), ids)
    open_tokens = [v for v in range(VOCAB) if LOGITS[v] > -math.inf]
    assert (given[:, 3] == -math.inf).all()
    for k in open_tokens:
        won = ids == k
        views: dict[str, Callable[[Tensor], Tensor]] = {
            **{f"score of {v}": lambda z, v=v: z[:, v] for v in open_tokens},
            "maximum": lambda z: z.amax(1),
            **{f"sum of {v} and {k}": lambda z, k=k, v=v: z[:, v] + z[:, k] for v in open_tokens if v != k},
        }
        for name, view in views.items():
            assert_same_distribution(view(scores[won]), view(given[won]), f"winner {k}, {name}", 1e-10)


def test_draws_differ() -> None:
    """Further draws for the same tokens have words of their own, and the words of nobody else."""
    logits, ids = randn(3, 50, dtype=torch.float64), torch.tensor([1, 30, 49])
    noise = noise_of(4, 3)
    seen = [noise.words(3, 50, domain=domain) for domain in range(9)]
    assert len({int(w) for words in seen for w in words.flatten()}) == 9 * 150
    draws = [gk.PosteriorNoise(noise, ids, None, draw).dense(logits) for draw in range(3)]
    for draw, g in enumerate(draws):
        word, refinement = (seen[3 + 2 * draw + i] for i in range(2))
        e = gk.noise.exponential_from_words(word, refinement, torch.float64)
        own = torch.arange(50) == ids[:, None]
        expected = -torch.log(torch.where(own, 0.0, e) + logits.softmax(1) * e.gather(1, ids[:, None]))
        torch.testing.assert_close(g, expected, rtol=1e-12, atol=1e-12)


def gradients_of_rows(call: Callable[[Tensor], Tensor], device: str, dtype: torch.dtype) -> Tensor:
    """Gradients `[MANY, VOCAB]` with respect to each row's logits, of a loss that reads the returned embedding."""
    logits = leaf(many_logits(device, dtype))
    embedded = call(logits)
    # Not linear in the embedding, so the gradient from above depends on the token.
    return grads((embedded + 0.3 * embedded**2).sum(), logits)[0].double().cpu()


@pytest.mark.uncollect_if(lambda interpreted: interpreted, "200,000 rows in Triton's interpreter")
@pytest.mark.parametrize("source", ["this package", "another sampler"])
def test_mean_gradient_of_given_tokens(backend: str, device: str, interpreted: bool, source: str) -> None:
    """The mean over tokens from the policy of the `ste` gradient is that with prior noise, whoever sampled the tokens.

    Five means, each a difference of two sums of 200,000 terms, at seven standard errors: 1.3e-11 of false alarms.
    """
    dtype = torch.float32
    table = randn(VOCAB, 3, dtype=dtype, device=device, seed=3)
    if source == "this package":
        ids = gk.gumbel_sample(many_logits(device, dtype), noise=gk.GumbelNoise(11))
    else:
        generator = torch.Generator().manual_seed(2)
        ids = torch.multinomial(LOGITS.softmax(0), MANY, replacement=True, generator=generator).to(device)
    noise = gk.GumbelNoise(12).given(ids)

    def through(noise: gk.GumbelNoise | gk.PosteriorNoise) -> Callable[[Tensor], Tensor]:
        return lambda x: gk.gumbel_ste_embedding(x, table, 0.7, noise=noise).embedding

    prior = gradients_of_rows(through(gk.GumbelNoise(11)), device, dtype)
    posterior = gradients_of_rows(through(noise), device, dtype)
    difference = posterior.mean(0) - prior.mean(0)
    # Rows of the two share the token where the package sampled it, which makes their difference less noisy, not more.
    error = ((prior.var(0) + posterior.var(0)) / MANY).sqrt()
    assert (difference.abs() <= 7 * error).all(), f"{(difference / error).tolist()} standard errors"
    assert (posterior.mean(0).abs() > 30 * error)[:3].all(), "nothing to compare"
    assert (posterior[:, 3] == 0).all()


@pytest.mark.parametrize("eps", [0.0, 0.05])
@pytest.mark.parametrize("estimator", ["st", "reinmax"])
def test_estimators_without_noise(backend: str, device: str, estimator: str, eps: float) -> None:
    """They take the tokens alone: the gradient is that of `ids`, to rounding, and with a support of the same words."""
    hidden, head = (randn(n, 6, device=device, seed=n) for n in (3, 23))
    table, ids = randn(23, 4, device=device, seed=5), torch.tensor([3, 0, 22], device=device)
    noise = noise_of(2, 3, device)
    logits = hidden @ head.T

    def found(**given: object) -> list[Tensor]:
        x, y, w = leaf(logits), leaf(hidden), leaf(head)
        a = gk.gumbel_ste_embedding(x, table, 0.7, estimator=estimator, **given)
        b = gk.linear_gumbel_ste(y, w, table, 0.7, estimator=estimator, eps=eps, **given)
        assert torch.equal(a.ids, ids)
        assert torch.equal(b.ids, ids)
        loss = a.embedding.square().sum() + a.logprobs.sum() + b.embedding.square().sum() + b.logprobs.sum()
        return [loss, *grads(loss, x, y, w)]

    for known in (None, logits.log_softmax(1).gather(1, ids[:, None]).squeeze(1)):
        for ours, theirs in zip(found(noise=noise.given(ids, known)), found(noise=noise, ids=ids), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_ignored_rows(backend: str, device: str, estimator: str) -> None:
    """Rows of the ignored id among the given tokens are 0 and send nothing, whatever their logits and log-probabilities."""
    hidden, head = (randn(n, 6, device=device, seed=n) for n in (3, 23))
    hidden[1] = math.nan
    table, ids = randn(23, 4, device=device, seed=5), torch.tensor([3, -100, 22], device=device)
    noise = noise_of(2, 3, device)
    logits, logprobs = hidden @ head.T, torch.tensor([-2.0, math.nan, -3.0], device=device)
    kept = torch.tensor([0, 2], device=device)
    assert noise.row_ids is not None
    others = gk.GumbelNoise(2, noise.row_ids[kept]).given(ids[kept], logprobs[kept])
    for name, x, tensors in (("gumbel_ste_embedding", logits, ()), ("linear_gumbel_ste", hidden, (head,))):
        operation = getattr(gk, name)
        full, few = leaf(x), leaf(x[kept])
        given = noise.given(ids, logprobs)
        out = operation(full, *tensors, table, 0.7, estimator=estimator, noise=given, ignore_index=-100)
        expected = operation(few, *tensors, table, 0.7, estimator=estimator, noise=others)
        assert torch.equal(out.ids, ids)
        assert (out.embedding[1] == 0).all()
        assert out.logprobs[1] == 0
        (ours,) = grads(out.embedding.square().sum() + out.logprobs.sum(), full)
        (theirs,) = grads(expected.embedding.square().sum() + expected.logprobs.sum(), few)
        assert (ours[1] == 0).all()
        torch.testing.assert_close(ours[kept], theirs, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(out.logprobs[kept], expected.logprobs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("estimator", [*ESTIMATORS, "gumbel_rao"])
def test_ignored_rows_where_token_0_is_masked(backend: str, device: str, estimator: str, given: bool) -> None:
    """An ignored row has no token that could have won, so it must not matter which tokens are masked."""
    hidden, head = (randn(n, 6, device=device, seed=n) for n in (3, 23))
    table, ids = randn(23, 4, device=device, seed=5), torch.tensor([3, -100, 22], device=device)
    bias = randn(23, device=device, seed=6)
    bias[0] = -math.inf
    kept, noise = torch.tensor([0, 2], device=device), noise_of(2, 3, device)
    assert noise.row_ids is not None
    few = gk.GumbelNoise(2, noise.row_ids[kept])
    found = []
    for x, tokens, prior in ((hidden, ids, noise), (hidden[kept], ids[kept], few)):
        sources = [leaf(x), leaf(head), leaf(bias)]
        out = gk.linear_gumbel_ste(
            *sources[:2], table, 0.7, bias=sources[2], estimator=estimator, ignore_index=-100, eps=0,
            **({"noise": prior.given(tokens)} if given else {"noise": prior, "ids": tokens}),
        )  # fmt: skip
        found.append((out, grads(out.embedding.square().sum() + out.logprobs.sum(), *sources)))
    (full, ours), (alone, theirs) = found
    assert (full.embedding[1] == 0).all()
    assert full.logprobs[1] == 0
    torch.testing.assert_close(full.embedding[kept], alone.embedding, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(full.logprobs[kept], alone.logprobs, rtol=1e-5, atol=1e-6)
    assert (ours[0][1] == 0).all()
    for one, other in zip((ours[0][kept], *ours[1:]), theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3), ()])
def test_empty_batches_and_no_batch_dimension(backend: str, device: str, shape: tuple[int, ...]) -> None:
    table, head = randn(7, 4, device=device), randn(7, 5, device=device)
    ids = torch.full(shape, 3, device=device)
    for known in (None, torch.full(shape, -0.5, device=device)):
        noise = gk.GumbelNoise(1).given(ids, known)
        x, h = leaf(torch.zeros(*shape, 7, device=device)), leaf(torch.ones(*shape, 5, device=device))
        assert gk.gumbel_softmax(x, noise=noise).shape == (*shape, 7)
        assert torch.equal(gk.gumbel_ste(x, noise=noise).argmax(-1) if ids.numel() else ids, ids)
        for estimator in ESTIMATORS:
            a = gk.gumbel_ste_embedding(x, table, estimator=estimator, noise=noise)
            b = gk.linear_gumbel_ste(h, head, table, estimator=estimator, noise=noise)
            for out, source in ((a, x), (b, h)):
                assert out.embedding.shape == (*shape, 4)
                assert torch.equal(out.ids, ids)
                assert grads(out.embedding.sum(), source)[0].shape == source.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_apart_logits(backend: str, device: str, dtype: torch.dtype) -> None:
    """Tokens next to certain and next to impossible, and log-probabilities of another model: finite, and 1 at the token."""
    logits = torch.tensor([[0.0, -2000.0, 1000.0], [1e4, 0.0, -1e4], [0.0, -50.0, 3.0]], device=device, dtype=dtype)
    ids = torch.tensor([0, 0, 1], device=device)
    for known in (None, torch.tensor([-1000.0, 0.0, -53.0], device=device), torch.tensor([0.0, -40.0, -1e-3])):
        known = None if known is None else known.to(device, dtype)
        noise = gk.GumbelNoise(1).given(ids, known)
        for tau in (0.01, 1.0, 100.0):
            x = leaf(logits)
            y = gk.gumbel_softmax(x, tau, noise=noise)
            truth = gk.reference.gumbel_softmax(logits.double(), tau, noise=noise)
            torch.testing.assert_close(y.double(), truth, rtol=2e-3, atol=1e-6)
            assert grads((y * x.detach()).sum(), x)[0].isfinite().all()
            out = gk.linear_gumbel_ste(x, torch.eye(3, device=device, dtype=dtype), logits, tau, noise=noise, eps=0.0)
            assert grads(out.embedding.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_does_not_decide(backend: str, device: str, interpreted: bool, dtype: torch.dtype) -> None:
    """Next to logits of 10^8 the differences of scores vanish, and the largest stands at several places."""
    logits = torch.full((4 if interpreted else 200, 3), 1e8, dtype=dtype, device=device)
    ids = torch.arange(len(logits), device=device) % 3
    noise = gk.GumbelNoise(3).given(ids)
    assert torch.equal(gk.gumbel_ste(logits, noise=noise).argmax(-1), ids)
    table = randn(3, 2, dtype=dtype, device=device)
    for out in (
        gk.gumbel_ste_embedding(logits, table, noise=noise),
        gk.linear_gumbel_ste(logits, torch.eye(3, dtype=dtype, device=device), table, noise=noise),
    ):
        assert torch.equal(out.ids, ids)
        assert torch.equal(out.embedding, table[ids])


@pytest.mark.uncollect_if(lambda backend: backend == "reference", "the reference has no passes")
@pytest.mark.parametrize("tau", [1.0, 0.3, 8.0])
@pytest.mark.parametrize("scale", [1.0, 40.0], ids=["", "logits far below"])
@pytest.mark.parametrize("vocab", [1, 17, 1031])
def test_pass_over_a_head(
    backend: str,
    device: str,
    interpreted: bool,
    vocab: int,
    scale: float,
    tau: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`head_scores` number by number: normalisers, and exactly the tokens with p > u * eps, in chunks and in pieces."""
    small_chunks(monkeypatch)
    resize(monkeypatch, tile_buffer=2**12)
    n, eps = (3 if interpreted else 35), 2**-6
    hidden, weight = randn(n, 7, device=device), randn(vocab, 7, device=device, seed=1) * scale
    bias = masked(torch.zeros(vocab, device=device))
    logits = hidden.cpu().double() @ weight.cpu().double().T + bias.cpu()
    prior = noise_of(4, n, device, vocab_start=6)
    ids, row_tau = noise_given(on_cpu(prior), logits, known=False).ids, torch.full((n,), tau, device=device)
    g = truth_noise(prior.given(ids), n, vocab, logits)
    score_max = (logits + g).gather(1, ids[:, None]).squeeze(1)
    given = Posterior(ids.to(device), None, 0, score_max.float().to(device))
    noise = Noise(prior.seed.to(device), prior.row_ids, 6, given)
    backend_of = gk.backends.get(backend)
    sample, total, support = backend_of.head_scores(gk.backends.Head(hidden, weight, bias, None), row_tau, noise, eps)

    z = (logits + g - score_max[:, None]) / tau
    assert torch.equal(sample.ids.cpu(), ids)
    assert torch.equal(sample.score_max, given.score_max)
    found = {"normaliser": (total, z.exp().sum(1)),
             "log-sum-exp": (sample.logit_max + sample.logit_sum.log(), logits.logsumexp(1))}  # fmt: skip
    for what, (ours, truth) in found.items():
        torch.testing.assert_close(ours.cpu().double(), truth, rtol=3e-5, atol=1e-4, msg=lambda m, w=what: f"{w}: {m}")
    p, u = z.softmax(1), uniform_from_words(on_cpu(prior).words(n, vocab, domain=3), torch.float64)
    kept = torch.zeros(n, vocab, dtype=torch.bool)
    rows = torch.arange(n).repeat_interleave(support.offsets.cpu().diff())
    kept[rows, support.tokens.cpu()] = True
    assert not support.overflow.any()
    assert kept.sum() == len(support.tokens)
    clear = (p - u * eps).abs() > 1e-3 * p
    assert torch.equal(kept[clear], (p > u * eps)[clear])
    torch.testing.assert_close(support.p.cpu().double(), p[kept], rtol=2e-4, atol=0)


def test_ids_beside_the_noise(backend: str, device: str) -> None:
    logits, table, ids = randn(3, 7, device=device), randn(7, 2, device=device), torch.tensor([1, 2, 3], device=device)
    noise = gk.GumbelNoise(1).given(ids)
    expected = gk.gumbel_ste_embedding(logits, table, noise=noise).embedding
    assert torch.equal(gk.gumbel_ste_embedding(logits, table, noise=noise, ids=ids).embedding, expected)
    head = torch.eye(7, device=device)
    for operation in (
        gk.gumbel_ste_embedding,
        lambda x, *rest, **kwargs: gk.linear_gumbel_ste(x, head, *rest, **kwargs),
    ):
        with raises(ValueError, "ids", "given"):
            operation(logits, table, noise=noise, ids=ids.flip(0))


def test_the_noise_is_a_constant(backend: str, device: str) -> None:
    """No gradient flows through the noise or into log-probabilities that have a graph."""
    logits, table = (
        leaf(randn(3, 7, dtype=torch.float64, device=device)),
        randn(7, 2, dtype=torch.float64, device=device),
    )
    ids = torch.tensor([1, 2, 3], device=device)
    logprobs = logits.log_softmax(1).gather(1, ids[:, None]).squeeze(1)
    ours = gk.gumbel_softmax(logits, 0.7, noise=gk.GumbelNoise(1).given(ids, logprobs))
    g = gk.GumbelNoise(1).given(ids).dense(logits)
    truth = ((logits + g) / 0.7).softmax(1)
    torch.testing.assert_close(grads((ours @ table).sum(), logits), grads((truth @ table).sum(), logits))


def test_representation_and_dense_errors() -> None:
    noise = gk.GumbelNoise(3).given(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3))
    assert "given" in repr(noise)
    assert noise.dense(torch.zeros(2, 3, 5, dtype=torch.bfloat16)).dtype == torch.float32
    with raises(ValueError, "logits", (2, 3), (3, 5)):
        noise.dense(torch.zeros(3, 5))
    masked = torch.tensor([[0.0, -math.inf]])
    assert gk.GumbelNoise(3).given(torch.tensor([1])).dense(masked).isnan().all()
