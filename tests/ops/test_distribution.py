"""What is sampled follows softmax(logits), in the bulk and far out in the tail. Seeds are fixed throughout."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

import grade_kernels as gk
from tests.support.helpers import randn

pytestmark = pytest.mark.usefixtures("poison")

SEED = 0x9E3779B97F4A7C15
TAIL, BEHIND = 262_144, 17.5  # one head token, and that many tokens each that much below it
CAP = 16.64  # -log(-log(1 - 2^-24)): the largest noise that a 24-bit uniform number gives

# Rows of SEED in which a tail token wins, and which one does: found with an independent implementation of the contract.
# Capped noise gives the head token in each of them.
TAIL_WINS = {214: 98900, 1070: 256851, 1358: 140240, 1811: 55011, 2120: 230210, 2394: 205196, 2478: 200313}


def tail_logits(rows: int, device: str = "cpu") -> torch.Tensor:
    row = torch.full((1, TAIL + 1), -BEHIND, device=device)
    row[0, 0] = 0.0
    return row.expand(rows, -1)


def test_chi_squared(backend: str, device: str, interpreted: bool) -> None:
    """Counts of 9 tokens, two of them masked. False alarm 10^-4 for each backend."""
    n = 60 if interpreted else 40_000
    logits = randn(9, device=device) * 1.5
    logits[[2, 7]] = -math.inf
    ids = gk.gumbel_sample(logits.expand(n, 9), noise=gk.GumbelNoise(SEED)).cpu()
    counts = torch.bincount(ids, minlength=9)
    assert counts[[2, 7]].tolist() == [0, 0]
    keep = [v for v in range(9) if v not in (2, 7)]
    expected = logits.cpu().double().softmax(-1) * n
    assert expected[keep].min() > 20 or interpreted
    assert stats.chisquare(counts[keep].numpy(), expected[keep].numpy()).pvalue > 1e-4
    if interpreted:
        return  # too few draws to tell more
    # The test has power: it rejects a distribution with 5% more weight on the likeliest token.
    skewed = expected.clone()
    skewed[int(expected.argmax())] *= 1.05
    skewed *= n / skewed.sum()
    assert stats.chisquare(counts[keep].numpy(), skewed[keep].numpy()).pvalue < 1e-4


def test_chi_squared_over_seeds(backend: str, device: str, interpreted: bool) -> None:
    """One row and many seeds: the other way to draw many samples. False alarm 10^-4 for each backend.

    A token's share has a standard error of at most 0.016.
    """
    n = 60 if interpreted else 1000
    logits = randn(1, 4, device=device)
    torch.manual_seed(1)
    ids = torch.cat([gk.gumbel_sample(logits) for _ in range(n)]).cpu()
    expected = logits[0].cpu().double().softmax(-1) * n
    assert stats.chisquare(torch.bincount(ids, minlength=4).numpy(), expected.numpy()).pvalue > 1e-4


def test_samples_of_the_embedding_and_of_softmax(backend: str, device: str, interpreted: bool) -> None:
    """The other operations draw from the same distribution, since they draw the very same tokens."""
    n = 10 if interpreted else 2000
    logits = randn(1, 9, device=device).expand(n, 9)
    ids = gk.gumbel_sample(logits, noise=gk.GumbelNoise(SEED))
    assert torch.equal(gk.gumbel_ste(logits, noise=gk.GumbelNoise(SEED)).argmax(-1), ids)
    assert torch.equal(gk.gumbel_softmax(logits, 0.5, noise=gk.GumbelNoise(SEED)).argmax(-1), ids)
    out = gk.gumbel_ste_embedding(logits, randn(9, 2, device=device), noise=gk.GumbelNoise(SEED))
    assert torch.equal(out.ids, ids)


def test_masked_tokens_are_never_sampled(backend: str, device: str, interpreted: bool) -> None:
    """Half of the tokens masked, in every row another half, also where the rest is far below zero."""
    n, vocab = (12, 64) if interpreted else (4096, 64)
    mask = torch.rand(n, vocab, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[:, 5] = False
    for level in (0.0, -1e4, -1e30):
        logits = torch.full((n, vocab), level).masked_fill(mask, -math.inf).to(device)
        ids = gk.gumbel_sample(logits, noise=gk.GumbelNoise(SEED)).cpu()
        assert not mask[torch.arange(n), ids].any()
    only = torch.full((1, vocab), -math.inf, device=device)
    only[0, 63] = -1e30
    assert (gk.gumbel_sample(only.expand(n, vocab), noise=gk.GumbelNoise(SEED)) == 63).all()


@pytest.mark.uncollect_if(
    lambda backend, device: backend != "cpu" and device == "cpu",
    "2.6 billion words take minutes here; test_rows_in_which_the_tail_wins decides for this backend",
)
def test_the_tail_is_sampled_as_often_as_it_should_be(backend: str, device: str) -> None:
    """Tail tokens together have probability 2^18 e^-17.5 / (1 + 2^18 e^-17.5) = 0.0065.

    In 10,000 rows that is 65.4 times, by the binomial distribution between 37 and 97 with a false alarm of 2 * 10^-4.
    With noise capped at 16.64 a tail token beats the head only where the head's own noise is below -0.86: 20 times.
    """
    n, batch = 10_000, 500
    ids = []
    for start in range(0, n, batch):
        rows = torch.arange(start, start + batch, device=device)
        ids.append(gk.gumbel_sample(tail_logits(batch, device), noise=gk.GumbelNoise(SEED, rows)).cpu())
    wins = torch.cat(ids).nonzero().flatten().tolist()

    mass = TAIL * math.exp(-BEHIND)
    expected = stats.binom(n, mass / (1 + mass))
    low, high = expected.ppf(1e-4), expected.ppf(1 - 1e-4)
    assert low <= len(wins) <= high, f"{len(wins)} of {n}, expected {expected.mean():.1f}"
    # Tokens of the tail are equally likely: their ids are uniform (false alarm 10^-4).
    assert stats.kstest(torch.cat(ids)[wins].double().numpy() / TAIL, "uniform").pvalue > 1e-4

    # The same rows with capped noise fail the same test. Only those that the tail won can change.
    capped_wins = 0
    for row in wins:
        g = gk.GumbelNoise(SEED, torch.tensor([row])).dense(1, TAIL + 1)
        capped_wins += int((tail_logits(1) + g.clamp(max=CAP)).argmax()) != 0
    assert capped_wins < low, f"capped noise gives {capped_wins}, which this test does not tell from {len(wins)}"


def test_rows_in_which_the_tail_wins(backend: str, device: str, interpreted: bool) -> None:
    """The same, for backends that are slow here: rows whose sample needs noise above the cap."""
    wins = dict(list(TAIL_WINS.items())[: 1 if interpreted else 3 if backend != "cpu" and device == "cpu" else None])
    rows = torch.tensor(list(wins), device=device)
    ids = gk.gumbel_sample(tail_logits(len(wins), device), noise=gk.GumbelNoise(SEED, rows))
    assert ids.tolist() == list(wins.values())


def test_capped_noise_loses_these_rows() -> None:
    row, winner = next(iter(TAIL_WINS.items()))
    g = gk.GumbelNoise(SEED, torch.tensor([row])).dense(1, TAIL + 1)
    assert g[0, winner] > CAP
    assert (tail_logits(1) + g).argmax() == winner
    assert (tail_logits(1) + g.clamp(max=CAP)).argmax() == 0
