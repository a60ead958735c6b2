"""What csrc/cpu/simd.h, noise.h and products/bf16_split.inl say of their functions: greatest errors and valid arguments.

Every instruction set that the processor has is compiled and called by itself (`tests.support.simd_host`). Arguments are a
lattice of all bit patterns of the valid range, so every exponent is seen, and an octave where the error is greatest.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.support import simd_host

SMALLEST = 2.0**-126  # normal number


@pytest.fixture(params=simd_host.ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    reason = simd_host.why_not(request.param)
    if reason is not None:
        pytest.skip(reason)
    return request.param


def floats(low: float, high: float, step: int) -> np.ndarray:
    """Every step-th float32 number from low up to high, both positive."""
    first, last = (int(np.float32(x).view(np.uint32)) for x in (low, high))
    return np.arange(first, last, step, dtype=np.uint32).view(np.float32)


def signed(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x, -x])


def words(step: int) -> np.ndarray:
    """Words from all over, and all of the smallest and of the largest."""
    everywhere = np.arange(0, 2**32, step, dtype=np.uint64).astype(np.uint32)
    ends = np.arange(2**16, dtype=np.uint32)
    return np.concatenate([ends, everywhere, ~ends])


def ulps(found: np.ndarray, truth: np.ndarray) -> float:
    """The greatest distance in units of float32's spacing at the truth."""
    _, exponent = np.frexp(np.abs(truth))
    return float(np.max(np.abs(found - truth) / np.ldexp(1.0, exponent - 24)))


def relative(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.max(np.abs(found - truth) / np.abs(truth)))


def exponential(w: np.ndarray) -> np.ndarray:
    """E of words in float64, from the nearer end of the unit interval."""
    w = w.astype(np.float64)
    return np.where(w < 2**31, -np.log1p(-(w + 0.5) / 2**32), -np.log((2.0**32 - w - 0.5) / 2**32))


def test_reciprocal(isa):
    x = np.concatenate([floats(SMALLEST, 2.0**126, 9973), floats(1, 2, 17)])
    assert ulps(simd_host.call(isa, "reciprocal", x, np.float32), 1 / x.astype(np.float64)) < 0.53


def test_log1p_core(isa):
    x = np.concatenate(
        [floats(2.0**-40, 0.5, 997), -floats(2.0**-40, 0.25, 997), floats(0.25, 0.5, 13), [0.0, 0.5, -0.25]]
    )
    x = x.astype(np.float32)
    found, truth = simd_host.call(isa, "log1p_core", x, np.float32), np.log1p(x.astype(np.float64))
    assert found[x == 0] == 0
    assert ulps(found[x != 0], truth[x != 0]) < 1.1
    assert relative(found[x != 0], truth[x != 0]) < 8.2e-8


def test_vlog(isa):
    x = np.concatenate([floats(SMALLEST, 3.4e38, 9973), floats(0.5, 2, 31)])
    found, truth = simd_host.call(isa, "vlog", x, np.float32), np.log(x.astype(np.float64))
    assert (found[x == 1] == 0).all()
    assert ulps(found[x != 1], truth[x != 1]) < 1.1


def test_vexp2(isa):
    x = np.concatenate(
        [floats(2.0**-30, 128, 997), -floats(2.0**-30, 126, 997), signed(floats(0.25, 1, 31)), [0.0, -126.0]]
    )
    x = x.astype(np.float32)
    found, truth = simd_host.call(isa, "vexp2", x, np.float32), np.exp2(x.astype(np.float64))
    assert ulps(found, truth) < 1.3
    assert (found >= SMALLEST).all()
    beyond = np.array([np.nextafter(np.float32(-126), np.float32(-127)), -1e4, -3e38, -np.inf, np.nan], np.float32)
    assert (simd_host.call(isa, "vexp2", beyond, np.float32) == 0).all()


@pytest.mark.parametrize("cap", [0.5, 1.0, 30.0])
def test_softcapped(isa, cap):
    x = signed(floats(2.0**-30, 200, 997)) * np.float32(cap / 4)
    found = simd_host.call(isa, "softcapped", x, np.float32, parameter=cap)
    truth = cap * np.tanh(x.astype(np.float64) / cap)
    assert ulps(found, truth) < 6
    assert np.max(np.abs(found - truth)) < 1.6e-7 * cap
    special = simd_host.call(
        isa, "softcapped", np.array([-np.inf, np.nan, np.inf, 0], np.float32), np.float32, parameter=cap
    )
    np.testing.assert_array_equal(special, np.array([-np.inf, np.nan, cap, 0], np.float32))


def test_to_float(isa):
    w = words(9973)
    np.testing.assert_array_equal(simd_host.call(isa, "to_float", w, np.float32), w.astype(np.float32))


def test_exponential(isa):
    w = np.concatenate(
        [words(9973), np.arange(2**30, 2**30 + 2**24, 31, dtype=np.uint32)]
    )  # the worst: u just above 1/4
    found, truth = simd_host.call(isa, "exponential_unrefined", w, np.float32), exponential(w)
    assert relative(found, truth) < 2.4e-7
    assert relative(found[w < 2**20], truth[w < 2**20]) < 6e-8


def test_gumbel_bound(isa):
    """It bounds the noise that 32 more bits refine, too: u is at least w / 2^32."""
    w = words(9973)
    bound = simd_host.call(isa, "gumbel_bound", w, np.float32).astype(np.float64)
    noise = np.where(w < 256, -np.log(np.maximum(w, 2.0**-33) / 2.0**32), -np.log(exponential(w)))
    assert np.min(bound - noise) > -1e-5
    above = bound + np.log((w.astype(np.float64) + 0.5) / 2**32)
    assert np.max(above[w >= 4096]) < 0.06


def test_reduce_sum(isa):
    lanes = simd_host.LANES[isa]
    x = np.random.default_rng(0).normal(size=(4096, lanes)).astype(np.float32)
    found = simd_host.call(isa, "reduce_sum", x.ravel(), np.float32)[: len(x)]
    exact = x.astype(np.float64)
    roundings = np.log2(lanes)
    assert np.max(np.abs(found - exact.sum(1)) / np.abs(exact).sum(1)) <= roundings * 2.0**-24


def test_loads_are_exact(isa):
    bits = np.arange(2**16, dtype=np.uint16)
    half = simd_host.call(isa, "load float16", bits, np.float32)
    np.testing.assert_array_equal(half, bits.view(np.float16).astype(np.float32))
    brain = simd_host.call(isa, "load bfloat16", bits, np.float32)
    np.testing.assert_array_equal(brain.view(np.uint32), bits.astype(np.uint32) << 16)
    whole = np.arange(-128, 128, dtype=np.int8)
    np.testing.assert_array_equal(simd_host.call(isa, "load int8", whole, np.float32), whole.astype(np.float32))


def test_stores_round_to_nearest(isa):
    x = np.concatenate([signed(floats(2.0**-149, np.inf, 9973)), [np.nan, np.inf, -np.inf, 0.0, 3e38]]).astype(
        np.float32
    )
    ties = (np.arange(2**16, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    half_ties = (np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)[:-1]).astype(np.float64)
    half_ties = ((half_ties + np.append(half_ties[1:], 65504.0)) / 2).astype(np.float32)
    x = np.concatenate([x, ties, half_ties])
    with np.errstate(over="ignore"):
        half = simd_host.call(isa, "store float16", x, np.uint16).view(np.float16)
        np.testing.assert_array_equal(half, x.astype(np.float16))
    bits = x.view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    brain = simd_host.call(isa, "store bfloat16", x, np.uint16)
    number = ~np.isnan(x)
    np.testing.assert_array_equal(brain[number], rounded[number])
    assert np.isnan((brain[~number].astype(np.uint32) << 16).view(np.float32)).all()
    whole = np.arange(-128, 128, dtype=np.float32)
    np.testing.assert_array_equal(simd_host.call(isa, "store int8", whole, np.int8), whole.astype(np.int8))


@pytest.mark.skipif(simd_host.why_not("avx512") is not None or not simd_host.has_bfloat16(), reason="needs AVX512_BF16")
@pytest.mark.parametrize(("low", "high"), [(2.0**-103, 2.0**-101), (0.5, 4.0), (2.0**126, float.fromhex("0x1.ffp127"))])
def test_splits_into_bfloat16(low, high):
    def values(parts: np.ndarray) -> np.ndarray:
        return (parts.astype(np.uint32) << 16).view(np.float32)

    x = signed(floats(low, high, 37))
    exact = x.astype(np.float64)
    two = values(simd_host.call("avx512", "split_in_two", x, np.uint16, parts=2))
    assert np.max(np.abs(two.astype(np.float64).sum(1) - exact) / np.abs(exact)) < 2.0**-17
    three = values(simd_host.call("avx512", "split_in_three", x, np.uint16, parts=3))
    np.testing.assert_array_equal(three.astype(np.float64).sum(1), exact)
    for parts in (two, three):
        assert (np.abs(parts[parts != 0]) >= SMALLEST).all(), "a subnormal part would be taken for zero"
    brain = values((x.view(np.uint32) >> 16).astype(np.uint16))
    assert (simd_host.call("avx512", "split_in_two", brain, np.uint16, parts=2)[:, 1] & 0x7FFF == 0).all()
