"""Logits never exist: what the operations through the head allocate, by the allocator's own account.

The profiler reports every block that torch's allocator gives, from C++ kernels as well, so neither a tensor that nobody
sees nor a list of chunks that stays alive is missed. Blocks of MKL and of Triton's interpreter are not torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import grade_kernels as gk
from tests.support.helpers import ESTIMATORS, leaf, resize
from tests.support.problems import Problem, allocations, problem, run, small_chunks, tiny_capacity

pytestmark = [
    pytest.mark.uncollect_if(lambda backend: backend == "reference", "the reference is dense"),
    pytest.mark.uncollect_if(
        lambda device, interpreted: device != "cpu" or interpreted,
        "the account is that of the CPU allocator, and the interpreter's tensors are its own",
    ),
]

N, V, H = 32, 8209, 3
EPSES = pytest.mark.parametrize("eps", [0.0, 2**-5])


@pytest.fixture
def small(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks far below N * V."""
    small_chunks(monkeypatch, gather=2**13)
    resize(monkeypatch, tile_buffer=2**14)


def measured(call: Callable[[], Any]) -> tuple[int, int]:
    """Largest block and highest level above the start, in bytes."""
    with allocations() as found:
        call()
    assert found, "the profiler saw no allocation"
    return max(size for size, _ in found), max(level for _, level in found)


def trainable(p: Problem, names: tuple[str, ...]) -> int:
    """Bytes of the gradients that were asked for, twice: a sum is rounded to its tensor's dtype."""
    count = {"lm_head": p.lm_head.numel(), "bias": p.lm_head.shape[0], "tables": sum(t.numel() for t in p.tables)}
    return 8 * sum(count.get(name, 0) for name in names)


def assert_small(call: Callable[[], Any], gradients: int = 0, logits: int = N * V) -> None:
    largest, peak = measured(call)
    assert largest < logits, f"a block of {largest} bytes, N * V = {logits}"
    # Half of float32 logits; a chunk's noise in plain PyTorch takes about 50 bytes an element.
    assert peak < 2 * logits + gradients, f"{peak} bytes at once, N * V = {logits}"


def test_the_account_sees_dense_tensors() -> None:
    """What the operations replace is far above the bound, and hidden pieces of it are."""
    p = problem((N,), V, H, estimator="ste")
    with gk.use_backend("reference"):
        assert measured(lambda: run(p, 0.0, ("hidden",)))[0] >= 4 * N * V
    assert measured(lambda: [torch.zeros(N, 256) for _ in range(V // 256)])[1] >= 3.9 * N * V
    assert measured(lambda: torch.zeros(N, V, dtype=torch.bool))[0] >= N * V


@pytest.mark.usefixtures("small")
@EPSES
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gumbel_ste(backend: str, estimator: str, eps: float) -> None:
    p = problem((N,), V, H, bias=True, softcap=5.0, tau="row", estimator=estimator, scale=0.3)
    everything = ("hidden", "lm_head", "bias", "tables", "tau")
    assert_small(lambda: run(p, eps, everything), trainable(p, everything))


@pytest.mark.usefixtures("small")
@pytest.mark.takes_long(
    "seconds of small chunks; they hold as much for any estimator",
    lambda backend, estimator: backend == "torch" and estimator in ("soft", "st"),
)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gumbel_ste_whose_support_overflows(backend: str, estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_capacity(monkeypatch, 8)
    p = problem((N,), 2 * V, H, bias=True, estimator=estimator, scale=0.05)
    assert_small(lambda: run(p, 2**-6, ("hidden",)), logits=2 * N * V)


@pytest.mark.usefixtures("small")
def test_sample(backend: str) -> None:
    p = problem((N,), V, H, bias=True)
    assert_small(lambda: gk.linear_gumbel_sample(p.hidden, p.lm_head, bias=p.bias))


@pytest.mark.usefixtures("small")
@EPSES
@pytest.mark.parametrize("kind", ["logprobs", "kl", "entropy"])
def test_statistics(backend: str, kind: str, eps: float) -> None:
    p = problem((N,), V, H, bias=True, scale=0.3)
    ids = torch.arange(N)

    def call() -> None:
        hidden = leaf(p.hidden)
        if kind == "logprobs":
            value = gk.linear_logprobs(hidden, p.lm_head, ids, bias=p.bias, eps=eps)
        elif kind == "kl":
            value = gk.linear_kl(hidden, p.lm_head, p.hidden, p.lm_head, bias=p.bias, eps=eps)
        else:
            value = gk.linear_entropy(hidden, p.lm_head, bias=p.bias, eps=eps)
        value.sum().backward()

    assert_small(call)


@pytest.mark.usefixtures("small")
@EPSES
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_frozen_weights_cost_nothing(backend: str, estimator: str, eps: float) -> None:
    """Head and tables that want no gradient are not even touched by one: no block of their size."""
    wide = 200
    p = problem((4,), 2003, wide, estimator=estimator, scale=3.0)
    table = torch.randn(2003, wide)
    p = p._replace(tables=(table,), upstream=(torch.randn(4, wide),))
    largest, peak = measured(lambda: run(p, eps, ("hidden",)))
    assert largest < 2003 * wide
    assert peak < 2003 * wide * 2
    assert measured(lambda: run(p, eps, ("lm_head",)))[0] >= 4 * 2003 * wide


@pytest.mark.usefixtures("small")
@EPSES
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_that_a_backward_does_not_ask_for_cost_nothing(backend: str, estimator: str, eps: float) -> None:
    """`torch.autograd.grad(..., hidden)` through a head and a table that others train, as `wanted` above is for a graph."""
    vocab, wide = 2003, 200
    p = problem((4,), vocab, wide, scale=3.0)
    hidden, head, table = leaf(p.hidden), leaf(p.lm_head), leaf(torch.randn(vocab, wide))
    out = gk.linear_gumbel_ste(hidden, head, table, estimator=estimator, noise=p.noise, eps=eps)
    loss = out.embedding.square().sum() + out.logprobs.sum()

    def bytes_for(loss: torch.Tensor, x: torch.Tensor) -> int:
        return measured(lambda: torch.autograd.grad(loss, x, retain_graph=True))[0]

    assert bytes_for(loss, hidden) < vocab * wide
    assert bytes_for(loss, head) >= 4 * vocab * wide
    assert bytes_for(loss, table) >= 4 * vocab * wide
    logits = leaf(torch.randn(300, vocab))
    loss = gk.gumbel_ste_embedding(logits, table[:, :3], estimator="ste", noise=p.noise).embedding.sum()
    assert bytes_for(loss, logits) >= 4 * logits.numel() > bytes_for(loss, table)


@pytest.mark.usefixtures("small")
@EPSES
def test_frozen_heads_cost_statistics_nothing(backend: str, eps: float) -> None:
    wide = 200
    p = problem((4,), 2003, wide, bias=True, scale=3.0)

    def call(hidden: torch.Tensor, head: torch.Tensor) -> None:
        gk.linear_kl(hidden, head, p.hidden.sin(), p.lm_head, bias=p.bias, eps=eps).sum().backward()
        gk.linear_logprobs(hidden, head, torch.arange(4), eps=eps).sum().backward()

    assert measured(lambda: call(leaf(p.hidden), p.lm_head))[0] < 2003 * wide
    assert measured(lambda: call(p.hidden, leaf(p.lm_head)))[0] >= 4 * 2003 * wide


@pytest.mark.usefixtures("small")
def test_nothing_is_kept_for_backward_but_rows_and_supports(backend: str) -> None:
    """Between forward and backward: statistics of rows, and supports, whatever the vocabulary."""
    p = problem((N,), V, H, scale=1.0)
    kept: list[int] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in (p.lm_head.untyped_storage().data_ptr(), table):
            kept.append(x.numel())
        return x

    table = p.tables[0].untyped_storage().data_ptr()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        gk.linear_gumbel_ste(leaf(p.hidden), p.lm_head, p.tables[0], estimator="reinmax", noise=p.noise, eps=2**-5)
    assert kept
    assert sum(kept) < N * 500
