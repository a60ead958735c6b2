"""The reference against closed forms, in float64 and written out by hand: it is what all backends are compared with."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F

import grade_kernels as gk
from tests.support.helpers import DTYPES, ESTIMATORS, compute_dtype, grads, leaf, masked, noise_of, randn, truth_noise

ROWS, VOCAB, WIDTH = 4, 11, 3


def inputs(mask: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, gk.GumbelNoise, torch.Tensor]:
    logits = randn(ROWS, VOCAB, dtype=torch.float64) * 2
    table = randn(VOCAB, WIDTH, dtype=torch.float64, seed=1)
    tau = torch.tensor([0.3, 1.0, 2.5, 0.7], dtype=torch.float64)
    noise = noise_of(rows=ROWS)
    return masked(logits) if mask else logits, table, tau, noise, truth_noise(noise, ROWS, VOCAB)


def softmax_by_sum(z: torch.Tensor) -> torch.Tensor:
    """exp(z) / sum exp(z), entry by entry in Python."""
    rows = []
    for row in z.tolist():
        top = max(row)
        weights = [math.exp(x - top) for x in row]
        rows.append([w / math.fsum(weights) for w in weights])
    return torch.tensor(rows, dtype=torch.float64)


def jacobian(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """J(p) x with the matrix J(p) = diag(p) - p p^T in full."""
    return torch.stack([(torch.diag(q) - torch.outer(q, q)) @ y for q, y in zip(p, x, strict=True)])


@pytest.mark.parametrize("mask", [False, True])
def test_soft_probabilities(mask: bool) -> None:
    logits, _, tau, noise, g = inputs(mask)
    y = gk.reference.gumbel_softmax(logits, tau, noise=noise)
    expected = softmax_by_sum((logits + g) / tau[:, None])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=0)
    assert (y[logits == -math.inf] == 0).all()


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hard_is_exactly_one_hot(dtype: torch.dtype, mask: bool) -> None:
    logits, _, tau, noise, g = inputs(mask)
    logits = logits.to(dtype).requires_grad_()
    y = gk.reference.gumbel_softmax(logits, tau.float(), hard=True, noise=noise)
    expected = F.one_hot((logits.double() + g).argmax(-1), VOCAB).to(dtype)
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    assert torch.equal(gk.reference.gumbel_ste(logits, tau.float(), noise=noise), expected)
    assert torch.equal(gk.reference.gumbel_sample(logits, noise=noise), expected.argmax(-1))


@pytest.mark.parametrize("hard", [False, True])
def test_softmax_gradients(hard: bool) -> None:
    """dl = J(p) dy / tau and dtau = -(J(p) dy) . (l + g) / tau^2, soft and hard alike."""
    logits, _, tau, noise, g = inputs()
    logits, tau, dy = leaf(logits), leaf(tau), randn(ROWS, VOCAB, dtype=torch.float64, seed=5)
    y = gk.reference.gumbel_softmax(logits, tau, hard, noise=noise)
    dlogits, dtau = grads((y * dy).sum(), logits, tau)
    z = (logits + g).detach()
    p = softmax_by_sum(z / tau.detach()[:, None])
    product = jacobian(p, dy)
    torch.testing.assert_close(dlogits, product / tau[:, None], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(dtau, -(product * z).sum(1) / tau**2, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_embedding_and_its_gradients(estimator: str, given: bool, mask: bool) -> None:
    logits, table, tau, noise, g = inputs(mask)
    ids = torch.tensor([5, 5, 5, 5]) if given else None  # index 5 is never masked by `masked`
    logits, table, tau = leaf(logits), leaf(table), leaf(tau)
    de, dlogprobs = randn(ROWS, WIDTH, dtype=torch.float64, seed=6), randn(ROWS, dtype=torch.float64, seed=7)

    out = gk.reference.gumbel_ste_embedding(logits, table, tau, estimator=estimator, noise=noise, ids=ids)
    dlogits, dtable, dtau = grads((out.embedding * de).sum() + (out.logprobs * dlogprobs).sum(), logits, table, tau)

    with torch.no_grad():
        column = tau[:, None]
        winners = (logits + g).argmax(1) if ids is None else ids
        D = F.one_hot(winners, VOCAB).double()
        noisy, tempered = softmax_by_sum((logits + g) / column), softmax_by_sum(logits / column)
        plain = softmax_by_sum(logits)
        dY = de @ table.T
        y = noisy if estimator == "soft" else D
        dtau_expected = torch.zeros_like(tau)
        if estimator == "reinmax":
            dl = 2 * jacobian((D + tempered) / 2, dY) - jacobian(plain, dY) / 2
        else:
            p, z = (tempered, logits) if estimator == "st" else (noisy, logits + g)
            dl = jacobian(p, dY) / column
            dtau_expected = -(dl * torch.where(logits == -math.inf, 0.0, z)).sum(1) / tau
        dl = dl + dlogprobs[:, None] * (D - plain)

    assert torch.equal(out.ids, winners)
    torch.testing.assert_close(out.embedding, y @ table, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(out.logprobs, plain.log().gather(1, winners[:, None])[:, 0], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(dlogits, dl, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dtable, y.T @ de, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(dtau, dtau_expected, rtol=1e-10, atol=1e-12)
    assert (dlogits[logits == -math.inf] == 0).all()


def test_reinmax_at_a_vocabulary_of_two_is_the_published_formula() -> None:
    """Liu et al. 2023, algorithm 2, with its own detours through logarithms and detached terms.

    The gradient is that of softmax(log(pi1) - l.detach() + l) times 2, minus half that of softmax(l).
    """
    logits = leaf(torch.tensor([[0.4, -0.9]], dtype=torch.float64))
    table, noise = torch.tensor([[1.0], [3.0]], dtype=torch.float64), noise_of()
    out = gk.reference.gumbel_ste_embedding(logits, table, 1.0, estimator="reinmax", noise=noise)
    ours = grads(out.embedding.sum(), logits)[0]
    pi0 = logits.softmax(-1)
    D = F.one_hot(out.ids, 2).double()
    pi1 = ((pi0 + D) / 2).detach()
    pi1 = (pi1.log() - logits.detach() + logits).softmax(-1)
    pi2 = 2 * pi1 - 0.5 * pi0
    expected = grads(((pi2 - pi2.detach() + D) @ table).sum(), logits)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_given_masked_id_gets_no_gradient(estimator: str) -> None:
    """A -inf logit has gradient exactly 0, even where its token was given as the sampled one."""
    logits = leaf(torch.tensor([[0.5, -math.inf, -1.0]], dtype=torch.float64))
    table = randn(3, 2, dtype=torch.float64)
    out = gk.reference.gumbel_ste_embedding(
        logits, table, 0.7, estimator=estimator, noise=noise_of(), ids=torch.tensor([1])
    )
    assert out.logprobs.item() == -math.inf
    dlogits = grads(out.embedding.sum() + out.logprobs.sum(), logits)[0]
    assert dlogits[0, 1] == 0
    assert dlogits.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_made_of_the_lowest_finite_number(dtype: torch.dtype) -> None:
    """`masked_fill(mask, torch.finfo(dtype).min)` is how many libraries mask; scores over tau then overflow to -inf."""
    lowest = torch.finfo(dtype).min
    logits = leaf(torch.tensor([[0.5, lowest, -1.0, lowest]], dtype=dtype))
    tau = leaf(torch.tensor(0.5, dtype=compute_dtype(dtype)))
    y = gk.reference.gumbel_softmax(logits, tau, noise=noise_of())
    dlogits, dtau = grads((y * torch.arange(4)).sum(), logits, tau)
    assert (y[0, [1, 3]] == 0).all()
    assert (dlogits[0, [1, 3]] == 0).all()
    assert dlogits.isfinite().all()
    assert dtau.isfinite()


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_any_dim(dim: int) -> None:
    logits = randn(3, 4, 5, dtype=torch.float64)
    moved = logits.movedim(dim, -1)
    y = gk.reference.gumbel_softmax(logits, 0.7, dim=dim, noise=noise_of())
    expected = gk.reference.gumbel_softmax(moved.contiguous(), 0.7, noise=noise_of()).movedim(-1, dim)
    assert torch.equal(y, expected)
    ids = gk.reference.gumbel_sample(logits, dim, noise=noise_of())
    assert torch.equal(ids, expected.argmax(dim))
    assert torch.equal(gk.reference.gumbel_ste(logits, dim=dim, noise=noise_of()).argmax(dim), ids)


@pytest.mark.parametrize("name", ["gumbel_sample", "gumbel_softmax", "gumbel_ste", "gumbel_ste_embedding"])
def test_signatures(name: str) -> None:
    """The reference takes what the operation takes, by the same names in the same order with the same defaults."""
    ours, reference = (inspect.signature(getattr(where, name)) for where in (gk, gk.reference))
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in reference.parameters.values()
    ]


def test_public_signatures_are_those_of_the_api() -> None:
    def names(function: object) -> str:
        parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
        keyword = [p.name for p in parameters if p.kind == p.KEYWORD_ONLY]
        return ",".join(p.name for p in parameters if p.name not in keyword) + ";" + ",".join(keyword)

    assert names(gk.gumbel_softmax) == "logits,tau,hard,eps,dim;noise"
    assert names(gk.gumbel_ste) == "logits,tau,dim;noise"
    assert names(gk.gumbel_sample) == "logits,dim;noise"
    assert names(gk.gumbel_ste_embedding) == "logits,embedding,tau;estimator,draws,noise,ids,ignore_index"
    assert names(gk.GumbelNoise).startswith("seed,row_ids")
    assert names(gk.GumbelNoise.dense) == "self,num_rows,vocab_size;vocab_start,dtype"
    # A drop-in: PyTorch's own parameters, defaults and order come first.
    theirs = list(inspect.signature(F.gumbel_softmax).parameters.values())
    ours = list(inspect.signature(gk.gumbel_softmax).parameters.values())[: len(theirs)]
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


def test_forward_sample_is_unbiased() -> None:
    """The mean embedding over many rows is softmax(l) @ E: the forward sample is exact (4 sigma; fixed seed)."""
    logits, table = randn(1, 5, dtype=torch.float64), randn(5, 2, dtype=torch.float64, seed=1)
    n = 4000
    out = gk.reference.gumbel_ste_embedding(logits.expand(n, 5), table, noise=gk.GumbelNoise(3))
    p = logits.softmax(-1)
    mean = p @ table
    deviation = ((p @ table**2 - mean**2) / n).sqrt()
    assert ((out.embedding.mean(0) - mean).abs() < 4 * deviation).all()
