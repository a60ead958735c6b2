"""Means over many rows: where sums of a product are rounded to 16 bits, they are off, though each row's error seems small."""

from __future__ import annotations

import pytest
import torch

import grade_kernels as gk
from grade_kernels.backends.triton.sizes import HeadTile
from tests.support.helpers import resize

ROWS, VOCAB, WIDTH = 10_000, 64, 32
# Its square is in all logits, as heads of language models have it. The larger a sum, the coarser its rounding.
COMMON = 4.0


def entropy_and_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64."""
    logp = (hidden.double() @ weight.double().T).log_softmax(dim=1)
    return -(logp.exp() * logp).sum(dim=1), logp.gather(1, ids[:, None])[:, 0]


@pytest.mark.uncollect_if(lambda backend, way: backend not in ("triton", "cuda") and way == "chunks", "it has one way")
@pytest.mark.parametrize("way", ["tiles", "chunks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_means_are_those_of_products_in_float32(
    backend: str, device: str, dtype: torch.dtype, way: str, interpreted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off by no more than the mean's own uncertainty from the rounding of the inputs, about 3e-5 in bfloat16.

    Rounded sums are off by 8e-4 there. The inputs are fixed, so nothing is left to chance.
    """
    if interpreted:
        tile = HeadTile(2048, 64, 32, 4, 2)
        resize(monkeypatch, tiles={1: tile, 2: tile}, tiles_few_rows={}, tiles_many_rows={}, head_split=64,
               chunk_tile=tile)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(ROWS, WIDTH, generator=generator), torch.randn(VOCAB, WIDTH, generator=generator) / 3
    hidden[:, 0], weight[:, 0] = COMMON, COMMON
    ids = torch.arange(ROWS) % VOCAB
    exact = entropy_and_logprobs(hidden, weight, ids)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    truth = entropy_and_logprobs(hidden, weight, ids)
    h, w = hidden.to(device), weight.to(device)
    with gk.use_backend(f"{backend}:{way}" if backend in ("triton", "cuda") else backend):
        found = gk.linear_entropy(h, w, eps=0.0), gk.linear_logprobs(h, w, ids.to(device), eps=0.0)
    for name, ours, true, unrounded in zip(("entropy", "logprobs"), found, truth, exact, strict=True):
        uncertainty = (true - unrounded).std() / ROWS**0.5
        assert 1e-6 < uncertainty < 1e-4
        off = (ours.cpu().double() - true).mean().abs()
        assert off <= uncertainty, f"mean {name} is off by {off:.1e}, and the inputs' rounding leaves {uncertainty:.1e}"
