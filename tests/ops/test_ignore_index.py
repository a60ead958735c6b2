"""`ignore_index`: rows of given ids that give zero and no gradient, whatever they hold."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import grade_kernels as gk
from tests.support.helpers import ESTIMATORS, leaf, noise_of, raises, randn

pytestmark = pytest.mark.usefixtures("poison")

N, H, V, D = 6, 5, 11, 3
KEPT, IGNORED = [0, 2, 5], [1, 3, 4]
Tensor = torch.Tensor


def ids_with(index: int, device: str) -> Tensor:
    ids = torch.tensor([3, 0, 7, 1, 2, 10], device=device)
    ids[IGNORED] = index
    return ids


def arguments(device: str, dtype: torch.dtype, mask: bool) -> dict[str, Tensor]:
    """Leaves; the ignored rows of hidden hold what no row may hold. A masked bias hides token 0."""
    hidden = randn(N, H, dtype=dtype, device=device)
    hidden[IGNORED[0]], hidden[IGNORED[1]], hidden[IGNORED[2]] = math.nan, math.inf, -1e30
    bias = randn(V, dtype=dtype, device=device, seed=2)
    if mask:
        bias[[0, 4]] = -math.inf
    return {
        "hidden": leaf(hidden),
        "lm_head": leaf(randn(V, H, dtype=dtype, device=device, seed=1)),
        "bias": leaf(bias),
    }


def rows_of(arguments: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    return {name: leaf(x[rows] if name == "hidden" else x) for name, x in arguments.items()}


def assert_nothing_from_ignored(found: dict[str, Tensor], alone: dict[str, Tensor], tolerance: dict[str, Any]) -> None:
    """Exactly zero where hidden states were ignored; elsewhere the gradients of a call without these rows."""
    assert (found["hidden"][IGNORED] == 0).all()
    torch.testing.assert_close(found["hidden"][KEPT], alone["hidden"], **tolerance)
    for name in found.keys() - {"hidden"}:
        assert found[name].isfinite().all()
        torch.testing.assert_close(found[name], alone[name], **tolerance)


def tolerance_of(dtype: torch.dtype) -> dict[str, Any]:
    return {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}


@pytest.mark.parametrize("mask", [False, True], ids=["open", "masked"])
@pytest.mark.parametrize("eps", [0.0, 0.125])
@pytest.mark.parametrize("index", [-100, -1, 4, 2**40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs(backend: str, device: str, dtype: torch.dtype, index: int, eps: float, mask: bool) -> None:
    """With support and without: the other rows are those of a call without the ignored ones, draws included."""
    given, ids = arguments(device, dtype, mask), ids_with(index, device)
    noise = noise_of(3, N, device)
    assert noise.row_ids is not None
    options: dict[str, Any] = {"eps": eps, "logit_softcap": 5.0, "temperature": 0.8}
    value = gk.linear_logprobs(**given, ids=ids, ignore_index=index, noise=noise, **options)
    assert (value[IGNORED] == 0).all()
    upstream = torch.arange(1.0, N + 1, device=device)
    found = dict(zip(given, torch.autograd.grad((value * upstream).sum(), list(given.values())), strict=True))
    fewer, few = rows_of(given, KEPT), gk.GumbelNoise(3, noise.row_ids[KEPT])
    alone = gk.linear_logprobs(**fewer, ids=ids[KEPT], noise=few, **options)
    torch.testing.assert_close(value[KEPT], alone, **tolerance_of(torch.float32))
    gradients = torch.autograd.grad((alone * upstream[KEPT]).sum(), list(fewer.values()))
    assert_nothing_from_ignored(found, dict(zip(fewer, gradients, strict=True)), tolerance_of(dtype))


def test_logprobs_are_those_of_cross_entropy(backend: str, device: str) -> None:
    """The labels of the field, -100 among them: minus PyTorch's cross entropy, value and gradient."""
    hidden, head = (randn(*shape, device=device, seed=seed) for shape, seed in (((2, 3, H), 0), ((V, H), 1)))
    labels = torch.tensor([[-100, 2, 3], [0, -100, -100]], device=device)
    h, w = leaf(hidden), leaf(head)
    theirs = -F.cross_entropy((h @ w.T).flatten(0, 1), labels.flatten(), reduction="none").view(2, 3)
    expected = torch.autograd.grad(theirs.sum(), (h, w))
    h, w = leaf(hidden), leaf(head)
    for where in (gk, gk.reference):
        ours = where.linear_logprobs(h, w, labels, ignore_index=-100, eps=0.0)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(torch.autograd.grad(ours.sum(), (h, w)), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("eps", [0.0, 0.125])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_linear_ste(backend: str, device: str, estimator: str, eps: float) -> None:
    """The ids that come back are those that were given; embedding, logprobs and all gradients as above."""
    given, ids, noise = arguments(device, torch.float32, False), ids_with(-100, device), noise_of(3, N, device)
    assert noise.row_ids is not None
    given["tau"] = leaf(torch.linspace(0.5, 1.0, N, device=device))
    fewer = {**rows_of(given, KEPT), "tau": leaf(given["tau"][KEPT])}
    tables = tuple(leaf(randn(V, d, device=device, seed=d)) for d in (2, 3))

    def call(given: dict[str, Tensor], ids: Tensor, noise: gk.GumbelNoise, **options: Any) -> tuple[Any, Any]:
        out = gk.linear_gumbel_ste(
            **given, embedding=tables, estimator=estimator, noise=noise, ids=ids, eps=eps, **options
        )
        loss = sum((e.square() + e).sum() for e in out.embedding) + out.logprobs.sum()
        return out, torch.autograd.grad(loss, [*given.values(), *tables])

    out, gradients = call(given, ids, noise, ignore_index=-100)
    alone, expected = call(fewer, ids[KEPT], gk.GumbelNoise(3, noise.row_ids[KEPT]))
    assert torch.equal(out.ids, ids)
    assert out.ids.data_ptr() != ids.data_ptr()
    for ours, theirs in zip((*out.embedding, out.logprobs), (*alone.embedding, alone.logprobs), strict=True):
        assert (ours[IGNORED] == 0).all()
        torch.testing.assert_close(ours[KEPT], theirs)
    by_row = [name in ("hidden", "tau") for name in given] + [False] * len(tables)
    for is_by_row, ours, theirs in zip(by_row, gradients, expected, strict=True):
        torch.testing.assert_close(ours[KEPT] if is_by_row else ours, theirs, rtol=1e-4, atol=1e-5)
        assert not is_by_row or (ours[IGNORED] == 0).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_rows(backend: str, device: str, estimator: str) -> None:
    """`gumbel_ste_embedding` of given logits, one table and several."""
    logits, ids = randn(N, V, device=device), ids_with(-100, device)
    logits[IGNORED[0]], logits[IGNORED[1]] = math.nan, -math.inf
    noise, tau = noise_of(3, N, device), torch.linspace(0.5, 1.0, N, device=device)
    assert noise.row_ids is not None
    table = randn(V, D, device=device, seed=4)
    found = []
    for rows, few, options in (
        (list(range(N)), noise, {"ignore_index": -100}), (KEPT, gk.GumbelNoise(3, noise.row_ids[KEPT]), {}),
    ):  # fmt: skip
        x, t, e = leaf(logits[rows]), leaf(tau[rows]), leaf(table)
        out = gk.gumbel_ste_embedding(x, e, t, estimator=estimator, noise=few, ids=ids[rows], **options)
        several = gk.gumbel_ste_embedding(x, (e, e), t, estimator=estimator, noise=few, ids=ids[rows], **options)
        assert torch.equal(several.embedding[1], out.embedding)
        gradients = torch.autograd.grad(out.embedding.square().sum() + out.logprobs.sum(), (x, t, e))
        found.append((out, gradients))
    (out, gradients), (alone, expected) = found
    assert torch.equal(out.ids, ids)
    assert (out.logprobs[IGNORED] == 0).all()
    assert (out.embedding[IGNORED] == 0).all()
    torch.testing.assert_close((out.embedding[KEPT], out.logprobs[KEPT]), (alone.embedding, alone.logprobs))
    for i, (ours, theirs) in enumerate(zip(gradients, expected, strict=True)):
        torch.testing.assert_close(ours[KEPT] if i < 2 else ours, theirs)
        assert i == 2 or (ours[IGNORED] == 0).all()


def test_all_rows_ignored(backend: str, device: str) -> None:
    hidden, head = leaf(torch.full((2, H), math.nan, device=device)), leaf(randn(V, H, device=device))
    ids = torch.full((2,), -100, device=device)
    for eps in (0.0, 0.1):
        value = gk.linear_logprobs(hidden, head, ids, ignore_index=-100, eps=eps)
        gradients = torch.autograd.grad(value.sum(), (hidden, head))
        assert all((x == 0).all() for x in (value, *gradients))


def calls(device: str) -> dict[str, Any]:
    hidden, head = randn(N, H, device=device), randn(V, H, device=device, seed=1)
    logits, table = randn(N, V, device=device), randn(V, D, device=device, seed=2)
    return {
        "linear_logprobs": lambda ids, **k: gk.linear_logprobs(hidden, head, ids, **k),
        "linear_gumbel_ste": lambda ids, **k: gk.linear_gumbel_ste(hidden, head, table, ids=ids, **k).embedding,
        "gumbel_ste_embedding": lambda ids, **k: gk.gumbel_ste_embedding(logits, table, ids=ids, **k).embedding,
    }


@pytest.mark.parametrize("name", ["linear_logprobs", "linear_gumbel_ste", "gumbel_ste_embedding"])
def test_what_is_refused(backend: str, device: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ignore_index -100 is no token; with it, every other id must be one. The argument itself is a whole number."""
    monkeypatch.setenv("GRADE_KERNELS_CHECK", "1")
    call, ids = calls(device)[name], ids_with(-100, device)
    for options in ({}, {"ignore_index": None}, {"ignore_index": -101}, {"ignore_index": 3}):
        with raises(ValueError, "ids", f"[0, {V})", -100, "row 1"):
            call(ids, **options)
    for index in (np.int64(-100), np.array(-100), torch.tensor(-100)):
        assert torch.equal(call(ids, ignore_index=index, noise=noise_of()),
                           call(ids, ignore_index=-100, noise=noise_of()))  # fmt: skip
    for wrong in (-100.0, "-100", True, torch.tensor(-100.0), torch.tensor([-100]), [-100]):
        with raises(TypeError, "ignore_index", type(wrong).__name__):
            call(ids, ignore_index=wrong)
    if name != "linear_logprobs":
        with raises(ValueError, "ignore_index", "ids is None"):
            call(None, ignore_index=-100)


@pytest.mark.uncollect_if(lambda interpreted: interpreted, "slow to compile, and no other code decides there")
@pytest.mark.parametrize("name", ["linear_logprobs", "linear_gumbel_ste", "gumbel_ste_embedding"])
def test_compiled(backend: str, device: str, interpreted: bool, name: str) -> None:
    call, ids = calls(device)[name], ids_with(-100, device)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda ids: call(ids, ignore_index=-100, noise=noise_of()), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(ids), call(ids, ignore_index=-100, noise=noise_of()))
