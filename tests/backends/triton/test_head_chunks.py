"""The way through a head by the library's product in chunks: what chunks there are, where it is gone, what it multiplies.

That its results are the truth is decided in `test_head.py`, where every test of the passes runs on both ways.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import grade_kernels as gk
from grade_kernels.backends import Head, Noise, get
from grade_kernels.backends.torch import products
from grade_kernels.backends.triton.sizes import HeadTile, TritonSizes
from tests.support.helpers import resize
from tests.support.interpreter import INTERPRETED
from tests.support.needs import needs_backend
from tests.support.problems import Answer, problem, run, tiny_capacity

pytest.importorskip("triton", reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
runs = needs_backend("triton")
pytestmark = [INTERPRETED] if DEVICE == "cpu" else []
SPLIT = 64


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several splits in a small vocabulary."""
    tile = HeadTile(16, 32, 32, 4, 2)
    resize(monkeypatch, tile_float32=tile, tiles={1: tile, 2: tile}, tiles_few_rows={}, head_split=SPLIT,
           chunk_tile=HeadTile(4, 32, 0, 4, 2))  # fmt: skip


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and columns of every product that the passes ask the library for."""
    from grade_kernels.backends.triton import head_chunks

    shapes: list[tuple[int, int]] = []

    def counting(x: torch.Tensor, table: torch.Tensor, out: torch.Tensor, elements: int) -> torch.Tensor:
        shapes.append((len(x), len(table)))
        return products.product(x, table, out, elements)

    monkeypatch.setattr(head_chunks, "product", counting)
    return shapes


def exact(rows: int, vocab: int, width: int, seed: int = 0) -> Head:
    """A head in bfloat16 whose logits are the same in whatever order their terms are summed."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, width, generator=generator).mul(4).round() / 8 for n in (rows, vocab))
    bias = torch.randn(vocab, generator=generator)
    return Head(hidden.bfloat16().to(DEVICE), weight.bfloat16().to(DEVICE), bias.to(DEVICE), 20.0)


def passes(head: Head, ref: Head, start: int, eps: float) -> list[torch.Tensor]:
    """Everything that every pass finds."""
    backend, rows = get("triton:chunks"), len(head.hidden)
    tau, noise = torch.linspace(0.5, 2.0, rows, device=DEVICE), Noise(torch.tensor(7), None, start)
    sampled = backend.head_sample(head, noise)
    scores, total, support = backend.head_scores(head, tau, noise, eps)
    alone, alone_support = backend.head_softmax(head, tau, noise, eps)
    beside, beside_support = backend.head_softmax(head, tau, noise, eps, ref)
    return [*sampled, *scores, total, *support, *alone, *alone_support, *beside, *beside_support]


@runs
def test_chunks_and_batches_change_no_result(
    multiplied: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit where the product is exact: candidates and overflow are decided by the splits before, not by chunks."""
    head, ref, start = exact(5, 300, 12), exact(5, 300, 20, seed=1), 2**34 + 3
    tiny_capacity(monkeypatch, 17)
    whole = passes(head, ref, start, 0.03)
    assert set(multiplied) == {(5, 300)}, "one chunk holds this vocabulary"
    overflow = whole[12]
    assert overflow.dtype == torch.bool
    assert overflow.any()
    assert not overflow.all()
    for splits in (1, 3):
        multiplied.clear()
        resize(monkeypatch, chunk_bytes=4 * 5 * SPLIT * splits)
        for a, b in zip(passes(head, ref, start, 0.03), whole, strict=True):
            assert torch.equal(a, b)
        # The first chunk lacks the three tokens before the shard's first group, and the last is ragged.
        assert (5, SPLIT * splits - 3) in multiplied
        assert (5, (303 - 1) % (SPLIT * splits) + 1) in multiplied
    multiplied.clear()
    resize(monkeypatch, batch_rows=2, chunk_least=SPLIT, chunk_bytes=4 * 2 * SPLIT)
    for a, b in zip(passes(head, ref, start, 0.03), whole, strict=True):
        assert torch.equal(a, b)
    assert {rows for rows, _ in multiplied} == {1, 2}


@runs
def test_memory_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as is allowed, less where a device has little, and one split at least."""
    from grade_kernels.backends.triton.head_chunks import chunk_splits

    sizes, gpu = TritonSizes(chunk_bytes=2**28), torch.device("cuda")
    free = 2**40
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**40))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**19)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    split = 4 * sizes.head_split
    assert chunk_splits(sizes, 4096, 238, 1, gpu) == 2**28 // (4096 * split)
    assert chunk_splits(sizes, 4096, 238, 2, gpu) == 2**28 // (2 * 4096 * split)
    assert chunk_splits(sizes, 8, 238, 1, gpu) == 238
    assert chunk_splits(sizes, 2**20, 238, 1, gpu) == 1
    free = 2**29
    assert chunk_splits(sizes, 4096, 238, 1, gpu) == (2**29 + 2**19) // 4 // (4096 * split)
    free = 0
    assert chunk_splits(sizes, 4096, 238, 1, gpu) == 2**26 // (4096 * split)

    def refused(device: torch.device) -> tuple[int, int]:
        raise AssertionError("a stream that is being captured was asked for its memory")

    monkeypatch.setattr(torch.cuda, "mem_get_info", refused)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert chunk_splits(sizes, 4096, 238, 1, gpu) == 2**28 // (4096 * split)


def test_memory_that_the_environment_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADE_KERNELS_CHUNK_MIB", raising=False)
    assert TritonSizes().chunk_bytes == 2**28
    monkeypatch.setenv("GRADE_KERNELS_CHUNK_MIB", "48")
    assert TritonSizes().chunk_bytes == 48 * 2**20
    for bad in ("0", "-3", "1.5", "much"):
        monkeypatch.setenv("GRADE_KERNELS_CHUNK_MIB", bad)
        with pytest.raises(ValueError, match=f"GRADE_KERNELS_CHUNK_MIB must be a positive .* got '{bad}'"):
            TritonSizes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("wide", [False, True])
def test_products_are_kept_in_float32(wide: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the library where it does that on a device (`wide`: here a stand-in for torch.mm), else by widening its factors."""
    multiply, asked = torch.mm, []

    def stand_in(
        x: torch.Tensor, y: torch.Tensor, *, out: torch.Tensor, out_dtype: torch.dtype | None = None
    ) -> object:
        asked.append(out_dtype)
        if out_dtype is None:
            return multiply(x, y, out=out)
        assert x.dtype == y.dtype == dtype, "the library takes 16 bits as they are"
        return out.copy_(multiply(x.to(out_dtype), y.to(out_dtype)))

    if wide:
        monkeypatch.setattr(torch, "mm", stand_in)
        products.has_wide_product.cache_clear()
    try:
        if dtype != torch.float32:
            assert products.has_wide_product(dtype, torch.device("cpu")) == wide
        generator = torch.Generator().manual_seed(0)
        x, table = (torch.randn(n, 50, generator=generator).to(dtype) for n in (3, 700))
        place = torch.full((3, 710), torch.nan)
        found = products.product(x, table, place[:, 5:705], 2**10)
    finally:
        products.has_wide_product.cache_clear()
    torch.testing.assert_close(found, (x.double() @ table.double().T).float(), rtol=1e-5, atol=1e-5)
    assert place[:, 5:705].equal(found)
    assert place[:, :5].isnan().all()
    assert place[:, 705:].isnan().all()
    if wide:
        assert asked[-1] == (None if dtype == torch.float32 else torch.float32)


CASES = {
    "ste": {"estimator": "ste", "softcap": 3.0, "bias": True},
    "soft": {"estimator": "soft", "table_dtypes": (torch.float32, torch.float32)},
    "st": {"estimator": "st", "mask": True},
    "reinmax": {"estimator": "reinmax", "dtype": torch.float16},
}


@runs
@pytest.mark.parametrize("eps", [0.0, 0.05])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_tiles(name: str, eps: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the public operation, with a row that overflows in the sparse backward."""
    p = problem((3,), 150, 9, device=DEVICE, **CASES[name])
    resize(monkeypatch, chunk_bytes=4 * 3 * SPLIT)
    tiny_capacity(monkeypatch, 30)
    answers: list[Answer] = []
    for way in ("tiles", "chunks"):
        with gk.use_backend(f"triton:{way}"):
            answers.append(run(p, eps))
    tolerance = 1e-5 if p.hidden.dtype == torch.float32 else 2e-3
    for a, b in zip(*(_tensors(answer) for answer in answers), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def _tensors(answer: Answer) -> Iterator[torch.Tensor]:
    for part in answer:
        for x in part if isinstance(part, tuple) else (part,):
            if x is not None:
                yield x


@runs
@pytest.mark.parametrize("way", ["tiles", "chunks"])
def test_backward_goes_the_way_of_forward(way: str, multiplied: list[tuple[int, int]]) -> None:
    """The saved record says which, whatever is asked for meanwhile. The estimator `soft` makes its support in backward."""
    p = problem((2,), 70, 5, device=DEVICE, estimator="soft")
    hidden = p.hidden.clone().requires_grad_()
    with gk.use_backend(f"triton:{way}"):
        out = gk.linear_gumbel_ste(hidden, p.lm_head, p.tables, p.tau, estimator="soft", noise=p.noise, eps=0.05)
    multiplied.clear()
    with gk.use_backend("triton:tiles" if way == "chunks" else "triton:chunks"):
        out.embedding[0].sum().backward()
    assert bool(multiplied) == (way == "chunks")
