"""`gumbel_sample` on every backend: the argmax of logits plus noise, whatever holds the logits and however they lie."""

from __future__ import annotations

import math

import pytest
import torch

import grade_kernels as gk
from tests.support.helpers import (
    DTYPES,
    LAYOUTS,
    ODD_VOCABS,
    assert_same_ids,
    masked,
    noise_of,
    randn,
    resize,
    top_two_gap,
    truth_noise,
)

pytestmark = pytest.mark.usefixtures("poison")


def truth_scores(logits: torch.Tensor, noise: gk.GumbelNoise) -> torch.Tensor:
    """Float64 scores `[N, V]` on the CPU."""
    flat = logits.detach().cpu().double().reshape(-1, logits.shape[-1])
    return flat + truth_noise(noise, *flat.shape)


@pytest.mark.parametrize("mask", [False, True], ids=["open", "masked"])
@pytest.mark.parametrize("vocab", ODD_VOCABS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ids(backend: str, device: str, rows: int, dtype: torch.dtype, vocab: int, mask: bool) -> None:
    logits = randn(rows, vocab, dtype=dtype, device=device) * 2
    logits = masked(logits) if mask else logits
    for noise in (noise_of(3, rows, device), gk.GumbelNoise(-3, vocab_start=vocab * 3 + 1)):
        ids = gk.gumbel_sample(logits, noise=noise)
        assert ids.shape == (rows,)
        assert ids.device.type == device
        assert not ids.requires_grad
        assert_same_ids(ids, truth_scores(logits, noise), dtype)


def test_the_tolerance_of_ids_hides_nothing() -> None:
    """What `assert_same_ids` is worth: no row of the tests here is excused, and a wrong id is found."""
    logits, noise = randn(64, 1000), noise_of(3)
    scores = truth_scores(logits, noise)
    assert top_two_gap(scores).min() > 1e-4
    second = scores.topk(2).indices[:, 1]
    with pytest.raises(AssertionError, match="differ by more than rounding"):
        assert_same_ids(torch.cat([scores.argmax(1)[:63], second[63:]]), scores, torch.float32)


def test_many_rows(backend: str, device: str, interpreted: bool) -> None:
    """More rows than any tile holds, more tokens than one chunk, and a number of either that no tile divides."""
    rows, vocab = (37, 257) if interpreted else (301, 259)
    logits, noise = randn(rows, vocab, device=device), noise_of(3, rows, device)
    assert_same_ids(gk.gumbel_sample(logits, noise=noise), truth_scores(logits, noise), torch.float32)


def test_large_vocabulary(backend: str, device: str) -> None:
    vocab = 151937 if backend == "cpu" or device == "cuda" else 20011
    logits = randn(2, vocab, device=device, dtype=torch.bfloat16)
    noise = gk.GumbelNoise(11)
    assert_same_ids(gk.gumbel_sample(logits, noise=noise), truth_scores(logits, noise), torch.bfloat16)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(backend: str, device: str, rows: int, layout: str, dtype: torch.dtype) -> None:
    """Values that surround the logits in memory are NaN here: whoever reads them raises."""
    logits = randn(rows, 131, dtype=dtype, device=device)
    laid_out = LAYOUTS[layout](logits)
    assert torch.equal(laid_out.reshape(logits.shape), logits)
    expected = gk.gumbel_sample(logits, noise=gk.GumbelNoise(5))
    ids = gk.gumbel_sample(laid_out, noise=gk.GumbelNoise(5))
    assert ids.shape == laid_out.shape[:-1]
    assert torch.equal(ids.flatten(), expected)
    assert_same_ids(ids, truth_scores(logits, gk.GumbelNoise(5)), dtype)


def test_expanded_rows(backend: str, device: str, interpreted: bool) -> None:
    """One row of logits for many draws, as a stride of zero."""
    n = 9 if interpreted else 200
    row = randn(1, 37, device=device)
    ids = gk.gumbel_sample(row.expand(n, 37), noise=gk.GumbelNoise(5))
    assert torch.equal(ids, gk.gumbel_sample(row.repeat(n, 1), noise=gk.GumbelNoise(5)))
    assert len(ids.unique()) > 2
    column = randn(n, 1, device=device)
    ids = gk.gumbel_sample(column.expand(n, 37), noise=gk.GumbelNoise(5))
    assert torch.equal(ids.cpu(), truth_noise(gk.GumbelNoise(5), n, 37).argmax(1))


@pytest.mark.cover(1)
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_dims(backend: str, device: str, dim: int) -> None:
    logits = randn(2, 3, 5, device=device)
    ids = gk.gumbel_sample(logits, dim, noise=gk.GumbelNoise(2))
    moved = logits.movedim(dim, -1)
    assert ids.shape == moved.shape[:-1]
    assert_same_ids(ids, truth_scores(moved, gk.GumbelNoise(2)), torch.float32)


@pytest.mark.cover(1)
@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 1, 7), (2, 3, 4, 7), (0, 7), (2, 0, 7), (0, 0, 7), (0, 1)])
def test_leading_shapes(backend: str, device: str, shape: tuple[int, ...]) -> None:
    logits = randn(*shape, device=device)
    ids = gk.gumbel_sample(logits, noise=gk.GumbelNoise(2))
    assert ids.shape == shape[:-1]
    assert ids.dtype == torch.int64
    if logits.numel():
        assert_same_ids(ids, truth_scores(logits, gk.GumbelNoise(2)), torch.float32)


def test_empty_batch_of_any_strides(backend: str, device: str) -> None:
    assert gk.gumbel_sample(randn(0, 21, device=device)[:, ::3]).shape == (0,)
    assert gk.gumbel_sample(randn(0, 7, 3, device=device), 1).shape == (0, 3)


def test_ties_go_to_the_smaller_id(backend: str, device: str) -> None:
    """A token given twice has two different noises; a tie needs scores beyond the noise's resolution."""
    logits = torch.full((2, 300), -math.inf, device=device)
    logits[0, [70, 71, 299]] = 1e30
    logits[1, [3, 150, 298]] = -1e30
    assert gk.gumbel_sample(logits, noise=gk.GumbelNoise(2)).tolist() == [70, 3]


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(backend: str, device: str, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    rows = [[info.min, 0.0, info.min], [info.max, 0.0, info.min], [info.min] * 3, [-math.inf, info.min, -math.inf]]
    ids = gk.gumbel_sample(torch.tensor(rows, dtype=dtype, device=device), noise=gk.GumbelNoise(2)).tolist()
    assert ids[:2] == [1, 0]
    assert ids[3] == 1


def test_input_is_left_alone(backend: str, device: str) -> None:
    logits = randn(2, 37, device=device)
    before = logits.clone()
    gk.gumbel_sample(logits.requires_grad_(), noise=gk.GumbelNoise(2))
    assert torch.equal(logits, before)


# --- identity of the noise


def test_rows_take_their_noise_along(backend: str, device: str, interpreted: bool) -> None:
    """Ids stay what they are when the batch is split, permuted or padded, as long as row_ids say who is who."""
    rows = 6 if interpreted else 40
    logits, noise = randn(rows, 67, device=device), noise_of(3, rows, device)
    assert noise.row_ids is not None
    ids = gk.gumbel_sample(logits, noise=noise)
    for keep in (torch.arange(rows).flip(0), torch.arange(0, rows, 2), torch.tensor([4]), torch.tensor([1, 1, 0])):
        keep = keep.to(device)
        part = gk.GumbelNoise(3, noise.row_ids[keep])
        assert torch.equal(gk.gumbel_sample(logits[keep], noise=part), ids[keep])
    # A row of ids with strides of its own.
    spread = torch.stack([noise.row_ids, noise.row_ids * 0 - 1], 1)[:, 0]
    assert torch.equal(gk.gumbel_sample(logits, noise=gk.GumbelNoise(3, spread)), ids)


@pytest.mark.parametrize("cuts", [(50,), (1, 2, 3), (33, 34, 67, 98), (4, 8, 64)])
def test_vocabulary_shards(backend: str, device: str, rows: int, cuts: tuple[int, ...]) -> None:
    """The winner among the shards' winners is the winner of the whole."""
    vocab, start = 101, 7
    logits, whole = randn(rows, vocab, device=device), noise_of(3, rows, device, vocab_start=start)
    scores = truth_scores(logits, whole)
    ids = gk.gumbel_sample(logits, noise=whole).cpu()
    candidates = []
    for low, high in zip((0, *cuts), (*cuts, vocab), strict=True):
        shard = gk.GumbelNoise(3, whole.row_ids, vocab_start=start + low)
        candidates.append(gk.gumbel_sample(logits[:, low:high], noise=shard).cpu() + low)
        assert_same_ids(candidates[-1] - low, scores[:, low:high], torch.float32)
    winners = torch.stack(candidates, 1)
    best = scores.gather(1, winners).argmax(1, keepdim=True)
    assert torch.equal(winners.gather(1, best).squeeze(1), ids)


@pytest.mark.parametrize("width", [1, 320, 1024])
def test_chunks_of_the_torch_backend(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """At any chunk size the same ids; the smallest chunk is 256 tokens."""
    logits, noise = randn(3, 4099), noise_of(3, 3)
    with gk.use_backend("torch"):
        whole = gk.gumbel_sample(logits, noise=noise)
        resize(monkeypatch, chunk=width * 3)
        assert len(list(gk.backends.get("torch").column_chunks(3, 4099))) == -(-4099 // max(256, width))
        assert torch.equal(gk.gumbel_sample(logits, noise=noise), whole)
        tie = torch.full((3, 4099), -math.inf)
        tie[:, [200, 300, 4098]] = 1e30
        assert gk.gumbel_sample(tie, noise=noise).tolist() == [200] * 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_backends_agree(dtype: torch.dtype) -> None:
    """The same ids from every backend that this machine has, over 8 seeds; no row comes close enough to be excused."""
    logits = masked(randn(3, 523, dtype=dtype) * 3)
    for seed in range(8):
        noise = noise_of(seed, 3)
        scores = truth_scores(logits, noise)
        assert top_two_gap(scores).min() > 1e-4
        for name in gk.available_backends():
            if name == "triton" and (torch.cuda.is_available() or seed % 3):
                continue  # serves the GPU there, as the cases of test_ids; elsewhere its interpreter gets three seeds
            with gk.use_backend(name):
                assert torch.equal(gk.gumbel_sample(logits, noise=noise), scores.argmax(1)), f"{name}, seed {seed}"


def test_no_noise_given(backend: str, device: str) -> None:
    """Repeatable under torch.manual_seed, different between two calls, and the chain of calls is repeatable as well."""
    logits = torch.zeros(2, 1000, device=device)
    torch.manual_seed(5)
    first, second = gk.gumbel_sample(logits), gk.gumbel_sample(logits)
    torch.manual_seed(5)
    assert torch.equal(gk.gumbel_sample(logits), first)
    assert torch.equal(gk.gumbel_sample(logits), second)
    assert not torch.equal(first, second)
    assert first[0] != first[1]
    torch.manual_seed(5)
    assert torch.equal(gk.gumbel_sample(logits, noise=gk.GumbelNoise.from_generator()), first)


def test_two_runs_are_bitwise_equal(backend: str, device: str) -> None:
    logits = randn(64 if backend == "cpu" else 4, 3001, device=device)
    runs = [gk.gumbel_sample(logits, noise=gk.GumbelNoise(5)) for _ in range(2)]
    assert torch.equal(*runs)


def test_seed_tensor(backend: str, device: str) -> None:
    """A seed on the logits' device, changed in place between calls."""
    logits, seed = torch.zeros(2, 1000, device=device), torch.tensor(-7, device=device)
    noise = gk.GumbelNoise(seed)
    first = gk.gumbel_sample(logits, noise=noise)
    seed.add_(1)
    second = gk.gumbel_sample(logits, noise=noise)
    assert torch.equal(first, gk.gumbel_sample(logits, noise=gk.GumbelNoise(-7)))
    assert torch.equal(second, gk.gumbel_sample(logits, noise=gk.GumbelNoise(-6)))
    assert not torch.equal(first, second)
