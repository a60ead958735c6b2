"""The noise contract: Philox words, the map from words to noise, and who shares which noise with whom."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

import grade_kernels as gk
from grade_kernels.noise import DOMAIN_REFINE, gumbel_from_words, philox_4x32_10, seed_on
from grade_kernels.ops.checks import canonical_tau
from tests.support.helpers import raises, truth_noise
from tests.support.needs import needs

M32 = 2**32 - 1
SEED = 0x9E3779B97F4A7C15

# (row, token, word) under SEED, found by search: the words at which the map from words to noise changes its formula.
# Rows are beyond 32 bits and of either sign, tokens sit in every position of a counter block.
BOUNDARY = [
    (-11877994052858617, 826, 0),
    (13071741558354094, 545, 0),
    (22750046635217676, 501, 0),
    (-8201656665449309, 543, 1),
    (14735697788557834, 864, 1),
    (-20419086278757133, 190, 1),
    (-4425813475703105, 500, 254),
    (-17431670235721219, 291, 255),
    (23290078643273268, 616, 255),
    (13604489301873974, 429, 256),
    (-19183750604924805, 457, 257),
    (-19288212799522439, 864, 257),
    (10577087113302990, 273, 2**31 - 1),
    (-6677948297361807, 701, 2**31),
    (-1644908050241545, 178, 2**31 + 1),
    (-21330289360619465, 198, 2**32 - 2),
]


def philox_int(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as the paper states it, in Python integers."""
    c, k = list(counter), list(key)
    for i in range(10):
        if i:
            k = [(k[0] + 0x9E3779B9) & M32, (k[1] + 0xBB67AE85) & M32]
        hi0, lo0 = divmod(0xD2511F53 * c[0], 2**32)
        hi1, lo1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [hi1 ^ c[1] ^ k[0], lo1, hi0 ^ c[3] ^ k[1], lo0]
    return c


def word_int(seed: int, row: int, token: int, domain: int = 0) -> int:
    """The word of one token, by the letter of the contract."""
    seed, row = seed % 2**64, row % 2**64
    return philox_int([token >> 2, row & M32, row >> 32, domain], [seed & M32, seed >> 32])[token & 3]


def exact(word: np.ndarray, refinement: np.ndarray) -> np.ndarray:
    """-log(-log(1 - u)) in 80-bit floating point, u taken from its exact rational value."""
    w, fine = word.astype(np.longdouble), refinement.astype(np.longdouble)
    half, one = np.longdouble(0.5), np.longdouble(1)
    u = np.where(
        word < 256, (w * 2.0**32 + fine + half) * np.longdouble(2.0**-64), (w + half) * np.longdouble(2.0**-32)
    )
    one_minus_u = (np.longdouble(2.0**32) - w - half) * np.longdouble(2.0**-32)
    exponential = np.where(u < half, -np.log1p(-np.minimum(u, half)), -np.log(np.minimum(one_minus_u, one)))
    return -np.log(exponential)


def interesting_words() -> torch.Tensor:
    """Every word within 2^12 of a change of formula, and a stride through all 2^32."""
    near = [torch.arange(max(0, b - 4096), min(2**32, b + 4096)) for b in (0, 256, 2**31, 2**32)]
    powers = torch.tensor([2**k + d for k in range(32) for d in (-1, 0, 1)])
    return torch.cat([*near, powers, torch.arange(0, 2**32, 4093)])


# --- Philox


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123 1.14, tests/kat_vectors, lines "philox4x32 10"
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers_of_random123(counter: str, key: str, expected: str) -> None:
    counter_int, key_int, expected_int = ([int(x, 16) for x in s.split()] for s in (counter, key, expected))
    assert philox_int(counter_int, key_int) == expected_int
    words = philox_4x32_10(
        tuple(torch.tensor(x) for x in counter_int),
        tuple(torch.tensor(x) for x in key_int),  # type: ignore[arg-type]
    )
    assert [int(w) for w in words] == expected_int


SEEDS = (0, 1, -1, 42, 2**31, 2**32 - 1, 2**32, -(2**63), 2**63 - 1, 2**63, 2**64 - 1, SEED)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("domain", [0, DOMAIN_REFINE, 3])
def test_words_by_the_letter_of_the_contract(seed: int, domain: int) -> None:
    row_ids = [0, 1, -1, 2**31, 2**32 - 1, 2**32, 2**32 + 7, -(2**63), 2**63 - 1, 123456789012345]
    for start, count in ((0, 9), (5, 6), (2**20 + 3, 4), (2**34 - 2, 5)):  # the counter wraps at 2^34 tokens
        noise = gk.GumbelNoise(seed, torch.tensor(row_ids), vocab_start=start)
        ours = noise.words(len(row_ids), count, domain=domain).tolist()
        tokens = range(start, start + count)
        assert ours == [[word_int(seed, r, t % 2**34, domain) for t in tokens] for r in row_ids]


def test_default_rows_are_flat_indices() -> None:
    assert torch.equal(gk.GumbelNoise(3).words(4, 9), gk.GumbelNoise(3, torch.arange(4)).words(4, 9))


def test_seed_as_tensor_equals_seed_as_int() -> None:
    for seed in SEEDS:
        signed = seed - 2**64 if seed >= 2**63 else seed
        whole = gk.GumbelNoise(seed).words(2, 5)
        assert torch.equal(whole, gk.GumbelNoise(torch.tensor(signed)).words(2, 5))
    assert gk.GumbelNoise(np.int64(-5)).seed.item() == -5


def test_sizes_may_be_whole_numbers_of_any_kind() -> None:
    noise = gk.GumbelNoise(3)
    expected = noise.dense(2, 5, vocab_start=1)
    for kind in (np.int64, np.array, torch.tensor):
        assert torch.equal(noise.dense(kind(2), kind(5), vocab_start=kind(1)), expected)
    for wrong in (True, 2.0, "2", torch.tensor(2.0), torch.tensor(True), torch.tensor([2]), np.bool_(True)):
        for name in ("num_rows", "vocab_size", "vocab_start"):
            with raises(TypeError, name, type(wrong).__name__):
                noise.dense(**{"num_rows": 2, "vocab_size": 5, name: wrong})
        with raises(TypeError, "vocab_start", type(wrong).__name__):
            gk.GumbelNoise(3, vocab_start=wrong)


def test_seed_tensor_is_read_when_used() -> None:
    """A seed tensor may be advanced in place, as in a captured graph."""
    seed = torch.tensor(1)
    noise = gk.GumbelNoise(seed)
    first = noise.dense(2, 5)
    seed += 1
    assert torch.equal(noise.dense(2, 5), gk.GumbelNoise(2).dense(2, 5))
    assert not torch.equal(noise.dense(2, 5), first)


# --- who shares noise with whom


@pytest.mark.parametrize("start", [0, 1, 2, 3, 4, 5, 63, 64, 1001, 2**31 + 1])
def test_shards_are_slices_of_the_whole(start: int) -> None:
    rows = torch.tensor([3, -4, 2**40])
    whole = gk.GumbelNoise(7, rows, vocab_start=start).dense(3, 41)
    for cut in (0, 1, 2, 3, 4, 5, 17, 40, 41):
        left = gk.GumbelNoise(7, rows, vocab_start=start).dense(3, cut)
        right = gk.GumbelNoise(7, rows, vocab_start=start + cut).dense(3, 41 - cut)
        inner = gk.GumbelNoise(7, rows, vocab_start=start).dense(3, 41 - cut, vocab_start=cut)
        assert torch.equal(torch.cat([left, right], dim=1), whole)
        assert torch.equal(inner, right)


def test_noise_follows_row_ids() -> None:
    rows = torch.tensor([5, -9, 2**35, 0, 12])
    whole = gk.GumbelNoise(7, rows).dense(5, 23)
    order = torch.tensor([4, 2, 0, 3, 1])
    assert torch.equal(gk.GumbelNoise(7, rows[order]).dense(5, 23), whole[order])
    assert torch.equal(gk.GumbelNoise(7, rows[1:3]).dense(2, 23), whole[1:3])
    assert torch.equal(gk.GumbelNoise(7, torch.tensor([5, 5])).dense(2, 23), whole[[0, 0]])


def test_neighbours_share_nothing() -> None:
    base = gk.GumbelNoise(7).words(4, 64)
    assert base.unique().numel() == base.numel()
    for other in (gk.GumbelNoise(8), gk.GumbelNoise(7 + 2**32), gk.GumbelNoise(7, torch.arange(4) + 2**32)):
        assert not (other.words(4, 64) == base).any()
    assert not (gk.GumbelNoise(7).words(4, 64, domain=1) == base).any()


# --- from words to noise


def test_noise_is_finite_for_every_kind_of_word() -> None:
    words = interesting_words()
    for refinement in (0, 1, 2**31, 2**32 - 1):
        for dtype in (torch.float32, torch.float64):
            g = gumbel_from_words(words, torch.full_like(words, refinement), dtype)
            assert g.dtype == dtype
            assert g.isfinite().all()
            assert g.min() > -3.2
            assert g.max() < 45.1


@needs("a long double wider than double", np.finfo(np.longdouble).eps < 1e-18)
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 3e-7), (torch.float64, 1e-15)])
def test_noise_against_80_bit_arithmetic(dtype: torch.dtype, relative: float) -> None:
    """E = exp(-g) within a few units in the last place: an absolute error of g, plus a relative one from rounding g."""
    words = interesting_words()
    refinement = torch.randint(0, 2**32, words.shape, generator=torch.Generator().manual_seed(0))
    truth = exact(words.numpy(), refinement.numpy())
    ours = gumbel_from_words(words, refinement, dtype).numpy().astype(np.longdouble)
    assert float((np.abs(ours - truth) / np.maximum(1, np.abs(truth))).max()) < relative


def test_the_tail_has_64_bits() -> None:
    zero, one, top = torch.tensor(0), torch.tensor(1), torch.tensor(2**32 - 1)
    for dtype in (torch.float32, torch.float64):
        at = lambda w, fine: gumbel_from_words(w, fine, dtype).item()  # noqa: B023, E731
        assert at(zero, zero) == pytest.approx(65 * math.log(2), rel=1e-7)  # u = 2^-65
        assert at(zero, one) == pytest.approx(-math.log(1.5 * 2**-64), rel=1e-7)
        assert at(zero, top) == pytest.approx(32 * math.log(2), rel=1e-7)
        assert at(one, zero) == pytest.approx(32 * math.log(2), rel=1e-7)
        assert at(top, zero) == pytest.approx(-math.log(33 * math.log(2)), rel=1e-6)


def test_noise_falls_as_the_word_grows() -> None:
    words = interesting_words().unique()
    for dtype in (torch.float32, torch.float64):
        for refinement in (0, 2**32 - 1):
            g = gumbel_from_words(words, torch.full_like(words, refinement), dtype)
            assert (g.diff() <= 0).all()
        if dtype == torch.float64:
            # Across the end of the refinement the order holds whatever the refining word is.
            g = gumbel_from_words(words, torch.randint(0, 2**32, words.shape), dtype)
            assert (g.diff() < 0).all()


def test_words_and_refinement_meet_in_dense() -> None:
    """The searched tokens have the words they were searched for, and `dense` refines those below 256 alone."""
    for row, token, word in BOUNDARY:
        assert word_int(SEED, row, token) == word
        noise = gk.GumbelNoise(SEED, torch.tensor([row]), vocab_start=token)
        assert noise.words(1, 1).item() == word
        truth = exact(np.array([word]), np.array([word_int(SEED, row, token, domain=1)]))[0]
        assert abs(noise.dense(1, 1, dtype=torch.float64).item() - truth) < 1e-14 * max(1, abs(truth))


def test_boundary_words_in_every_backend(backend: str, device: str) -> None:
    """Each row of the logits admits one token, so a backend's best score is that token's noise, which we know."""
    vocab = 1000
    rows = torch.tensor([row for row, _, _ in BOUNDARY])
    tokens = torch.tensor([token for _, token, _ in BOUNDARY])
    truth = exact(
        np.array([word for _, _, word in BOUNDARY]), np.array([word_int(SEED, r, t, 1) for r, t, _ in BOUNDARY])
    )
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-13)):
        logits = torch.full((len(BOUNDARY), vocab), -torch.inf, dtype=dtype)
        logits[torch.arange(len(BOUNDARY)), tokens] = 0.0
        noise = gk.GumbelNoise(SEED, rows.to(device))
        assert torch.equal(gk.gumbel_sample(logits.to(device), noise=noise).cpu(), tokens)
        if backend == "reference":
            continue
        seed = torch.tensor(SEED - 2**64, device=device)
        sample = gk.backends.get(backend).sample(logits.to(device), gk.backends.Noise(seed, noise.row_ids, 0), False)
        error = (sample.score_max.cpu().double().numpy() - truth) / np.maximum(1, np.abs(truth))
        assert np.abs(error).max() < tolerance, f"{dtype}: {error}"


def test_the_tail_decides_in_every_backend(backend: str, device: str) -> None:
    """A token with word 0 wins over one that is 30 ahead, by noise that a 32-bit word alone could not give it."""
    row, token, word = BOUNDARY[0]
    assert word == 0
    g = gk.GumbelNoise(SEED, torch.tensor([row])).dense(1, 1000, dtype=torch.float64)[0]
    assert g[token] > 22.9  # 33 log 2 is the most that an unrefined word gives
    ahead = token - 1
    for margin, expected in ((-1e-4, token), (1e-4, ahead)):
        logits = torch.full((1, 1000), -torch.inf, dtype=torch.float64, device=device)
        logits[0, token] = 0.0
        logits[0, ahead] = float(g[token] - g[ahead]) + margin
        for dtype in (torch.float64, torch.float32):
            noise = gk.GumbelNoise(SEED, torch.tensor([row], device=device))
            assert gk.gumbel_sample(logits.to(dtype), noise=noise).item() == expected


# --- dense, its dtypes and devices


def test_dense_of_every_dtype() -> None:
    noise = gk.GumbelNoise(5, torch.tensor([1, -2]), vocab_start=3)
    wide = noise.dense(2, 33)
    assert wide.shape == (2, 33)
    assert wide.dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(noise.dense(2, 33, dtype=dtype), wide.to(dtype))
    double = noise.dense(2, 33, dtype=torch.float64)
    assert double.dtype == torch.float64
    torch.testing.assert_close(wide.double(), double, rtol=1e-6, atol=1e-6)
    assert not torch.equal(wide.double(), double)


def test_dense_of_empty_shapes() -> None:
    assert gk.GumbelNoise(1).dense(0, 5).shape == (0, 5)
    assert gk.GumbelNoise(1).dense(3, 0).shape == (3, 0)
    assert gk.GumbelNoise(1, torch.zeros(0, dtype=torch.int64)).dense(0, 5).shape == (0, 5)


def test_dense_is_what_the_reference_adds() -> None:
    logits = torch.zeros(3, 11, dtype=torch.float64)
    y = gk.reference.gumbel_softmax(logits, 1.0, noise=gk.GumbelNoise(9))
    torch.testing.assert_close(y, truth_noise(gk.GumbelNoise(9), 3, 11).softmax(-1))


def test_from_generator() -> None:
    make = gk.GumbelNoise.from_generator
    torch.manual_seed(0)
    first, second = make().seed, make().seed
    torch.manual_seed(0)
    assert make().seed == first != second
    generator = torch.Generator().manual_seed(0)
    state = torch.get_rng_state()
    third, fourth = make(generator).seed, make(generator).seed
    assert third != fourth
    assert make(torch.Generator().manual_seed(0)).seed == third
    assert torch.equal(torch.get_rng_state(), state), "the default generator moved although another was given"
    # All 64 bits are drawn: over 64 seeds each bit is seen as 0 and as 1 (false alarm: 64 * 2^-63).
    seeds = [int(make(generator).seed) % 2**64 for _ in range(64)]
    assert all({s >> bit & 1 for s in seeds} == {0, 1} for bit in range(64))


def test_copies_are_the_same_noise() -> None:
    noise = gk.GumbelNoise(SEED, torch.tensor([4, -5]), vocab_start=9)
    for twin in (copy.copy(noise), copy.deepcopy(noise), pickle.loads(pickle.dumps(noise))):
        assert torch.equal(twin.dense(2, 7), noise.dense(2, 7))
    assert "vocab_start=9" in repr(noise)


def test_dense_leaves_no_graph_and_no_state() -> None:
    state = torch.get_rng_state()
    g = gk.GumbelNoise(3).dense(2, 5)
    assert not g.requires_grad
    assert torch.equal(torch.get_rng_state(), state)


# --- the distribution of the noise


@pytest.mark.parametrize("seed", [0, SEED])
def test_noise_is_gumbel(seed: int) -> None:
    """Kolmogorov-Smirnov over 400,000 numbers, mean and variance. Each false alarm below 10^-4; the seeds are fixed."""
    g = gk.GumbelNoise(seed).dense(400, 1000, dtype=torch.float64).flatten().numpy()
    assert stats.kstest(g, "gumbel_r").pvalue > 1e-4
    n = len(g)
    assert abs(g.mean() - np.euler_gamma) < 3.9 * math.sqrt(math.pi**2 / 6 / n)
    # The fourth central moment of a Gumbel variable is (3 + 12/5) variance^2.
    assert abs(g.var() - math.pi**2 / 6) < 3.9 * math.sqrt(4.4 / n) * math.pi**2 / 6


def test_tokens_and_rows_are_independent() -> None:
    """Correlation of neighbours in token, row and seed, 10^5 pairs each. False alarm below 10^-4 each; fixed seed."""
    a = gk.GumbelNoise(5).dense(100, 1001, dtype=torch.float64)
    pairs = {
        "token": (a[:, 1:], a[:, :-1]),
        "block": (a[:, 4:], a[:, :-4]),
        "row": (a[1:], a[:-1]),
        "seed": (a, gk.GumbelNoise(6).dense(100, 1001, dtype=torch.float64)),
    }
    for name, (x, y) in pairs.items():
        correlation = np.corrcoef(x.flatten().numpy(), y.flatten().numpy())[0, 1]
        assert abs(correlation) < 3.9 / math.sqrt(x.numel()), name


class Operations(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_numbers_on_the_host_are_not_copied_to_the_device() -> None:
    """A copy of tau would wait for a GPU, and one of the seed cannot be captured in a graph."""
    device = torch.device("meta")  # any that is not the host
    with Operations() as ran:
        moved = [
            seed_on(torch.tensor(2**62 + 1), device),
            canonical_tau(torch.tensor(0.5, dtype=torch.float64), (3, 5), device, torch.float32),
        ]
    assert [(x.device, x.dtype, x.shape) for x in moved] == [
        (device, torch.int64, torch.Size([])),
        (device, torch.float32, torch.Size([3])),
    ]
    assert set(ran.names).isdisjoint({"_to_copy", "copy_"}), ran.names
