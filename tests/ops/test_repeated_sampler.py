"""Sampling step after step through one head: the tokens of `linear_gumbel_sample`, whatever was ruled out before."""

from __future__ import annotations

import pytest
import torch

import grade_kernels as gk
from grade_kernels import backends
from grade_kernels.backends import Head
from grade_kernels.backends.cpu.screen import Screen
from grade_kernels.ops.repeated_sampler import RepeatedSampler
from tests.support.helpers import randn
from tests.support.needs import needs_backend

STEPS = 40


def at_once(
    weight: torch.Tensor, bias: torch.Tensor | None = None, logit_softcap: float | None = None
) -> RepeatedSampler:
    """A sampler that rules tokens out from its first step on."""
    return RepeatedSampler(weight, bias=bias, logit_softcap=logit_softcap, plain_steps=0)


def screen_of(sampler: RepeatedSampler) -> Screen:
    """What a sampler has made of its head."""
    screen = sampler._sampler.__self__
    assert isinstance(screen, Screen)
    return screen


def _steps(sampler: RepeatedSampler, hidden: torch.Tensor, **noise: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of the sampler and of the operation, for hidden states `[steps, rows, H]`."""
    options = {"bias": sampler._bias, "logit_softcap": sampler._softcap}
    ours, theirs = [], []
    for i, states in enumerate(hidden):
        drawn = gk.GumbelNoise(i, **noise)
        ours.append(sampler(states, drawn))
        theirs.append(gk.linear_gumbel_sample(states, sampler.lm_head, noise=drawn, **options)[0])
    return torch.stack(ours), torch.stack(theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("rows", "vocab", "width"), [(1, 1, 1), (1, 997, 33), (3, 64, 16), (4, 4099, 64), (8, 301, 100), (9, 301, 7)]
)
def test_tokens_are_those_of_the_operation(dtype: torch.dtype, rows: int, vocab: int, width: int) -> None:
    weight = randn(vocab, width, dtype=dtype)
    hidden = (randn(STEPS, rows, width, dtype=torch.float64, seed=1) * 3 / width**0.5).to(dtype)
    sampler = at_once(weight)
    ours, theirs = _steps(sampler, hidden)
    assert torch.equal(ours, theirs)
    if backends.select(weight.device, dtype) == "cpu" and dtype != torch.float64 and rows <= 8:
        assert screen_of(sampler).usable


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("start", [0, 3, 2**33 + 17])
def test_with_everything(dtype: torch.dtype, softcap: float | None, start: int) -> None:
    """A bias that masks, a softcap, a shard of the vocabulary, rows of their own noise, several batch dimensions."""
    bias = randn(1501, seed=5)
    bias[::3] = -torch.inf
    weight, hidden = randn(1501, 40, dtype=dtype), randn(STEPS, 2, 3, 40, dtype=dtype, seed=1)
    ids = torch.tensor([5, -7, 2**40 + 3, 2**33, 0, 11])
    sampler = at_once(weight[:, ::2], bias=bias, logit_softcap=softcap)
    ours, theirs = _steps(sampler, hidden[..., ::2], row_ids=ids, vocab_start=start)
    assert ours.shape == (STEPS, 2, 3)
    assert torch.equal(ours, theirs)
    assert (ours % 3 != 0).all()


def _screen(weight: torch.Tensor):
    return Screen(Head(weight[:0], weight, None, None))


@needs_backend("cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_within_their_slack(dtype: torch.dtype) -> None:
    """For states that are as bad as can be: along the errors themselves. Columns and rows differ by orders of magnitude."""
    weight = randn(300, 45) * torch.logspace(-3, 2, 45) * torch.logspace(-2, 1, 300)[:, None]
    weight[7] = 0.0
    weight = weight.to(dtype)
    screen = _screen(weight)
    coded = screen._codes[:, :45].double() * screen._scale.double()[:, None]
    error = weight.double() / screen._columns.double() - coded
    assert (error.norm(dim=1) <= screen._slack.double()).all()
    assert (screen._slack <= 0.02 * (weight.double() / screen._columns).norm(dim=1) + 1e-30).all(), (
        "bounds that rule out nothing"
    )


@needs_backend("cpu")
def test_a_column_that_outweighs_all_others_costs_nothing() -> None:
    """As in trained heads: without factors of columns, codes of all others would be zero and no token be ruled out."""
    weight = randn(4096, 128)
    weight[:, 5] += 300.0
    hidden = randn(STEPS, 2, 128, seed=1) / 3
    hidden[..., 5] /= 300
    sampler = at_once(weight)
    ours, theirs = _steps(sampler, hidden)
    assert torch.equal(ours, theirs)
    screen = _screen(weight)
    assert (screen._slack / screen._scale < 8).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_has_the_operations_error(value: float) -> None:
    weight, hidden = randn(301, 16), randn(2, 16, seed=1)
    sampler = at_once(weight)
    sampler(hidden, gk.GumbelNoise(0))
    hidden[1, 3] = value
    with pytest.raises(ValueError, match="row"):
        sampler(hidden, gk.GumbelNoise(0))
    weight[40, 2] = value
    spoiled = at_once(weight)
    with pytest.raises(ValueError, match="row"):
        spoiled(randn(2, 16, seed=1), gk.GumbelNoise(0))
    masked = at_once(randn(301, 16), bias=torch.full((301,), -torch.inf))
    with pytest.raises(ValueError, match="row"):
        masked(randn(2, 16, seed=1), gk.GumbelNoise(0))


def test_where_nothing_is_ruled_out_the_operation_is_asked() -> None:
    """Weights whose codes say nothing of them: one number of each row is a million times the others, which decide."""
    weight = randn(60000, 32)
    weight[torch.arange(60000), torch.arange(60000) % 32] = 1e6
    hidden = torch.zeros(3, 8, 32)
    hidden[:, :, 0] = 5.0
    sampler = at_once(weight, torch.where(torch.arange(60000) % 32 == 0, -torch.inf, 0.0))
    ours, theirs = _steps(sampler, hidden)
    assert torch.equal(ours, theirs)
    assert sampler._sampler is None or not screen_of(sampler).usable


def test_under_autocast() -> None:
    weight, hidden = randn(997, 64), randn(STEPS, 4, 64, seed=1)
    sampler = at_once(weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = _steps(sampler, hidden)
    assert torch.equal(ours, theirs)


def test_the_default_dtype_changes_nothing() -> None:
    weight, hidden = randn(997, 64), randn(STEPS, 4, 64, seed=1)
    sampler = at_once(weight)
    torch.set_default_dtype(torch.float64)
    try:
        ours, theirs = _steps(sampler, hidden)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(ours, theirs)
