"""The simulator of PTX, instruction by instruction, against NumPy; and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.support.ptx.memory import ExecutionError
from tests.support.ptx.program import PtxError
from tests.support.ptx.snippets import compute, launch, module

Array = npt.NDArray[Any]
COUNT = 128
u4, u8, i4, i8, f4, f8 = np.uint32, np.uint64, np.int32, np.int64, np.float32, np.float64


def numbers(dtype: npt.DTypeLike, seed: int) -> Array:
    """Of every size, and the special ones."""
    generator = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    if kind.kind == "f":
        spread = {2: 8, 4: 30, 8: 200}[kind.itemsize]
        found = generator.standard_normal(COUNT) * 2.0 ** generator.integers(-spread, spread, COUNT)
        found[:12] = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 0.5, 2.0, 1e-8, 3.0, -0.0]
        return generator.permutation(found).astype(kind)
    limits = np.iinfo(kind)
    found = generator.integers(limits.min, limits.max, COUNT, dtype=kind, endpoint=True)
    found[:40] >>= generator.integers(0, 8 * kind.itemsize, 40).astype(kind)
    found[40:44] = [0, 1, limits.max, limits.min]
    return generator.permutation(found)


def same(found: Array, truth: Array) -> None:
    """Equal bits; any NaN is any other."""
    assert found.dtype == truth.dtype
    np.testing.assert_array_equal(found, truth)
    if found.dtype.kind == "f":
        assert np.array_equal(np.signbit(found[~np.isnan(found)]), np.signbit(truth[~np.isnan(truth)]))


def shifted(a: Array, n: Array, left: bool) -> Array:
    bits = 8 * a.itemsize
    out = [
        (int(x) << int(k) if left else int(x) >> int(k)) if k < bits else (-1 if x < 0 and not left else 0)
        for x, k in zip(a, n, strict=True)
    ]
    return np.array([x & ((1 << bits) - 1) for x in out], f"u{a.itemsize}").view(a.dtype)


def whole(function: Callable[..., int], *given: Array, dtype: npt.DTypeLike) -> Array:
    """By Python's integers, cut to the dtype."""
    bits = 8 * np.dtype(dtype).itemsize
    found = [function(*(int(x) for x in each)) & ((1 << bits) - 1) for each in zip(*given, strict=True)]
    return np.array(found, f"u{bits // 8}").view(dtype)


def plus(a: int, b: int, c: int) -> int:
    return a * b + c


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGERS = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul.lo": lambda a, b: a * b,
    "min": min, "max": max, "div": truncated, "rem": lambda a, b: a - truncated(a, b) * b,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name: str, kind: str) -> None:
    dtype = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}")
    a, b = numbers(dtype, 0), numbers(dtype, 1)
    if name in ("div", "rem"):
        b[b == 0] = 7
    same(compute(f"{name}.{kind} %d, %x0, %x1;", [a, b], dtype), whole(INTEGERS[name], a, b, dtype=dtype))


@pytest.mark.parametrize("kind", ["u16", "u32", "s32"])
def test_wide_and_high_products(kind: str) -> None:
    width = int(kind[1:]) // 8
    dtype, twice = (np.dtype(f"{'i' if kind[0] == 's' else 'u'}{w}") for w in (width, 2 * width))
    a, b, c = numbers(dtype, 0), numbers(dtype, 1), numbers(twice, 2)
    same(compute(f"mul.wide.{kind} %d, %x0, %x1;", [a, b], twice), whole(lambda x, y: x * y, a, b, dtype=twice))
    same(compute(f"mad.wide.{kind} %d, %x0, %x1, %x2;", [a, b, c], twice), whole(plus, a, b, c, dtype=twice))
    if width == 4:
        same(compute(f"mul.hi.{kind} %d, %x0, %x1;", [a, b], dtype), whole(lambda x, y: x * y >> 32, a, b, dtype=dtype))


@pytest.mark.parametrize("kind", ["u64", "s64"])
def test_high_products_of_64_bits(kind: str) -> None:
    dtype = np.dtype("i8" if kind == "s64" else "u8")
    a, b, c = (numbers(dtype, seed) for seed in range(3))
    same(compute(f"mul.hi.{kind} %d, %x0, %x1;", [a, b], dtype), whole(lambda x, y: x * y >> 64, a, b, dtype=dtype))
    same(compute(f"mad.lo.{kind} %d, %x0, %x1, %x2;", [a, b, c], dtype), whole(plus, a, b, c, dtype=dtype))


@pytest.mark.parametrize("width", [2, 4, 8])
def test_bits(width: int) -> None:
    dtype = np.dtype(f"u{width}")
    a, b = numbers(dtype, 0), numbers(dtype, 1)
    for name, truth in (("and", a & b), ("or", a | b), ("xor", a ^ b)):
        same(compute(f"{name}.b{8 * width} %d, %x0, %x1;", [a, b], dtype), truth)
    same(compute(f"not.b{8 * width} %d, %x0;", [a], dtype), ~a)
    amounts = np.random.default_rng(2).integers(0, 8 * width + 9, COUNT, dtype=u4)
    same(compute(f"shl.b{8 * width} %d, %x0, %x1;", [a, amounts], dtype), shifted(a, amounts, True))
    same(compute(f"shr.u{8 * width} %d, %x0, %x1;", [a, amounts], dtype), shifted(a, amounts, False))
    signed = a.view(f"i{width}")
    same(compute(f"shr.s{8 * width} %d, %x0, %x1;", [signed, amounts], signed.dtype), shifted(signed, amounts, False))


def test_pieces_of_words() -> None:
    a, b, c = (numbers(u4, seed) for seed in range(3))
    for start, length in ((0, 8), (3, 9), (24, 8), (30, 9), (5, 0), (0, 32)):
        truth = whole(lambda x, s=start, n=length: x >> s & ((1 << n) - 1), a, dtype=u4)
        same(compute(f"bfe.u32 %d, %x0, {start}, {length};", [a], u4), truth)
        mask = ((1 << length) - 1) << start
        truth = whole(lambda x, y, s=start, m=mask: y & ~m | x << s & m, a, b, dtype=u4)
        same(compute(f"bfi.b32 %d, %x0, %x1, {start}, {length};", [a, b], u4), truth)

        def signed(x: int, s: int = start, n: int = length) -> int:
            if n == 0:
                return 0
            n, sign = min(n, 32 - s), x >> min(s + n - 1, 31) & 1
            return (x >> s & ((1 << n) - 1)) - (sign << n)

        same(compute(f"bfe.s32 %d, %x0, {start}, {length};", [a.view(i4)], i4), whole(signed, a, dtype=i4))
    both = b.astype(u8) << u8(32) | a
    for n in (0, 7, 31):
        same(compute(f"shf.l.wrap.b32 %d, %x0, %x1, {n};", [a, b], u4), (both << u8(n) >> u8(32)).astype(u4))
        same(compute(f"shf.r.wrap.b32 %d, %x0, %x1, {n};", [a, b], u4), (both >> u8(n)).astype(u4))
    table = 0b11101000  # two of three
    same(compute(f"lop3.b32 %d, %x0, %x1, %x2, {table};", [a, b, c], u4), a & b | a & c | b & c)
    same(compute("popc.b32 %d, %x0;", [a], u4), whole(int.bit_count, a, dtype=u4))
    bytes_of = both[:, None].view(np.uint8).reshape(COUNT, 8)
    found = compute("prmt.b32 %d, %x0, %x1, 0x5410;", [a, b], u4)
    same(found, np.ascontiguousarray(bytes_of[:, [0, 1, 4, 5]]).view(u4)[:, 0])
    found = compute("prmt.b32 %d, %x0, %x1, 0xF2B7;", [a, b], u4)
    sign = np.where(bytes_of[:, [3, 7]] & 128, 255, 0).astype(np.uint8)
    truth = np.stack([bytes_of[:, 7], sign[:, 0], bytes_of[:, 2], sign[:, 1]], 1)
    same(found, np.ascontiguousarray(truth).view(u4)[:, 0])


@pytest.mark.parametrize(("kind", "dtype"), [("f32", f4), ("f64", f8)])
def test_floating_point(kind: str, dtype: npt.DTypeLike) -> None:
    a, b = numbers(dtype, 0), numbers(dtype, 1)
    with np.errstate(all="ignore"):
        for name, truth in (("add", a + b), ("sub", a - b), ("mul", a * b), ("div.rn", a / b), ("add.rn", a + b)):
            same(compute(f"{name}.{kind} %d, %x0, %x1;", [a, b], dtype), truth)
        for name, truth in (("neg", -a), ("abs", np.abs(a)), ("sqrt.rn", np.sqrt(a)), ("rcp.rn", 1 / a)):
            same(compute(f"{name}.{kind} %d, %x0;", [a], dtype), truth)
    # The other number beside a NaN; and +0 is above -0.
    a[:4], b[:4] = [0.0, -0.0, math.nan, 1.0], [-0.0, 0.0, 1.0, math.nan]
    one_nan = np.where(np.isnan(a), b, np.where(np.isnan(b), a, np.maximum(a, b)))
    one_nan[:2] = 0.0
    same(compute(f"max.{kind} %d, %x0, %x1;", [a, b], dtype), one_nan)
    one_nan = np.where(np.isnan(a), b, np.where(np.isnan(b), a, np.minimum(a, b)))
    one_nan[:2] = -0.0
    same(compute(f"min.{kind} %d, %x0, %x1;", [a, b], dtype), one_nan)
    if kind == "f32":
        any_nan = np.where(np.isnan(a) | np.isnan(b), np.nan, np.maximum(a, b)).astype(dtype)
        any_nan[:2] = 0.0
        same(compute("max.NaN.f32 %d, %x0, %x1;", [a, b], dtype), any_nan)


def rounded(exact: Fraction, dtype: npt.DTypeLike) -> np.floating[Any]:
    """To the nearest number of the dtype, half-way to even, by a search among neighbours."""
    kind = np.dtype(dtype).type
    guess = kind(float(exact))
    around = [guess, np.nextafter(guess, kind(-np.inf)), np.nextafter(guess, kind(np.inf))]
    distances = [abs(Fraction(float(x)) - exact) for x in around]
    best = min(distances)
    nearest = [x for x, d in zip(around, distances, strict=True) if d == best]
    return next((x for x in nearest if not int(np.array(x).view(f"u{np.dtype(dtype).itemsize}")) & 1), nearest[0])


@pytest.mark.parametrize(("kind", "dtype"), [("f32", f4), ("f64", f8)])
def test_fma_is_rounded_once(kind: str, dtype: npt.DTypeLike) -> None:
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal(COUNT).astype(dtype) for _ in range(2))
    c = (-a * b * (1 + generator.integers(-2, 3, COUNT) * 2.0**-20)).astype(dtype)  # what is lost becomes all there is
    c[::4] = generator.standard_normal(len(c[::4]))
    # A product just above a point half-way between two numbers of float32: rounded twice, it goes down.
    a[0], b[0], c[0] = 1 + 2**-12, 2.0**-12 * (1 - 2.0**-12), 1.0
    truth = [
        rounded(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)), dtype)
        for x, y, z in zip(a, b, c, strict=True)
    ]
    same(compute(f"fma.rn.{kind} %d, %x0, %x1, %x2;", [a, b, c], dtype), np.array(truth, dtype))


def test_fma_between_two_numbers() -> None:
    """Half-way in float64, and above it in truth."""
    a = np.full(32, 2.0**-24 + 2.0**-47, f4)
    b, c = np.ones(32, f4), np.full(32, 1.0, f4)
    truth = rounded(Fraction(float(a[0])) + 1, f4)
    assert truth > 1
    same(compute("fma.rn.f32 %d, %x0, %x1, %x2;", [a, b, c], f4), np.full(32, truth))
    tiny = np.full(32, 2.0**-60, f4)
    half = np.full(32, 1 + 2.0**-23, f4)  # (1 + 2^-23) 2^-24: beyond float64's last bit beside 1
    found = compute("fma.rn.f32 %d, %x0, %x1, %x2;", [half, np.full(32, 2.0**-24, f4), c], f4)
    same(found, np.full(32, rounded(Fraction(float(half[0])) * Fraction(2) ** -24 + 1, f4)))
    found = compute("fma.rn.f32 %d, %x0, %x1, %x2;", [tiny, b, half], f4)
    same(found, half)


def test_denormals_are_flushed_where_asked() -> None:
    x = np.array([1e-40, -1e-40, 1e-30, 0.0] * 32, f4)
    one = np.ones(COUNT, f4)
    zero = np.where(np.abs(x) < 1e-38, np.copysign(f4(0), x), x)
    same(compute("fma.rn.ftz.f32 %d, %x0, %x1, %x2;", [x, one, np.copysign(f4(0), x)], f4), zero)
    same(compute("fma.rn.f32 %d, %x0, %x1, %x2;", [x, one, np.copysign(f4(0), x)], f4), x)
    same(compute("abs.ftz.f32 %d, %x0;", [x], f4), np.abs(zero))


@pytest.mark.parametrize(
    ("opcode", "function", "relative"),
    [
        ("ex2.approx.ftz.f32", np.exp2, 2.0**-22), ("lg2.approx.ftz.f32", np.log2, 2.0**-22),
        ("rcp.approx.ftz.f32", lambda x: 1 / x, 2.0**-23), ("sqrt.approx.ftz.f32", np.sqrt, 2.0**-23),
        ("rsqrt.approx.ftz.f32", lambda x: x**-0.5, 2.0**-22.4),
    ],
)  # fmt: skip
def test_approximations(opcode: str, function: Callable[[Array], Array], relative: float) -> None:
    x = (2.0 ** np.random.default_rng(0).uniform(-6, 6, COUNT)).astype(f4)
    truth = function(x.astype(f8))
    found = compute(f"{opcode} %d, %x0;", [x], f4)
    assert (np.abs(found - truth) <= relative * np.maximum(np.abs(truth), 1 if "lg2" in opcode else 0)).all()
    special = np.array([0.0, -0.0, math.inf, -math.inf, math.nan] + [1.0] * 27, f4)
    with np.errstate(all="ignore"):
        truth = 1 / np.sqrt(special) if "rsqrt" in opcode else function(special)
        same(compute(f"{opcode} %d, %x0;", [special], f4), truth.astype(f4))


def test_quotients_and_reciprocals() -> None:
    a, b = (np.random.default_rng(seed).standard_normal(COUNT) for seed in range(2))
    found = compute("div.full.f32 %d, %x0, %x1;", [a.astype(f4), b.astype(f4)], f4)
    np.testing.assert_allclose(found, a.astype(f4).astype(f8) / b.astype(f4), rtol=2.0**-22)
    found = compute("rcp.approx.ftz.f64 %d, %x0;", [b], f8)
    np.testing.assert_allclose(found, 1 / b, rtol=2.0**-19)
    assert (found.view(u8) & u8(0xFFFFFFFF) == 0).all()


COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


KINDS = {"u32": u4, "s32": i4, "u64": u8, "s64": i8, "f32": f4, "f64": f8, "f16": np.float16}


@pytest.mark.parametrize(("kind", "dtype"), KINDS.items())
@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons(name: str, kind: str, dtype: npt.DTypeLike) -> None:
    a, b = numbers(dtype, 0), numbers(dtype, 1)
    b[::3] = a[::3]
    truth = COMPARISONS[name](a, b)
    if kind[0] == "f":
        nan = np.isnan(a) | np.isnan(b)
        truth &= ~nan
        body = f"setp.{name}u.{kind} %q0, %x0, %x1; selp.b32 %d, 1, 0, %q0;"
        same(compute(body, [a, b], u4), (truth | nan | (COMPARISONS[name](a, b))).astype(u4))
        same(compute(f"setp.num.{kind} %q0, %x0, %x1; selp.b32 %d, 1, 0, %q0;", [a, b], u4), (~nan).astype(u4))
        same(compute(f"setp.nan.{kind} %q0, %x0, %x1; selp.b32 %d, 1, 0, %q0;", [a, b], u4), nan.astype(u4))
    same(compute(f"setp.{name}.{kind} %q0, %x0, %x1; selp.b32 %d, 1, 0, %q0;", [a, b], u4), truth.astype(u4))
    body = f"setp.{name}.{kind} %q1, %x1, %x1; setp.{name}.and.{kind} %q0|%q2, %x0, %x1, %q1;"
    own = COMPARISONS[name](b, b) & ~(b != b)
    opposite = ~truth & own
    same(compute(f"{body} selp.b32 %d, 1, 0, %q0;", [a, b], u4), (truth & own).astype(u4))
    same(compute(f"{body} selp.b32 %d, 1, 0, %q2;", [a, b], u4), opposite.astype(u4))


def test_predicates() -> None:
    a, b = numbers(i4, 0), numbers(i4, 1)
    p, q = a > 0, b > 0
    for name, truth in (("and", p & q), ("or", p | q), ("xor", p ^ q)):
        body = f"setp.gt.s32 %q0, %x0, 0; setp.gt.s32 %q1, %x1, 0; {name}.pred %q2, %q0, %q1; not.pred %q3, %q2;"
        same(compute(f"{body} selp.b32 %d, 7, -1, %q2;", [a, b], i4), np.where(truth, 7, -1).astype(i4))
        same(compute(f"{body} selp.b32 %d, 7, -1, %q3;", [a, b], i4), np.where(truth, -1, 7).astype(i4))
    body = "setp.gt.s32 %q0, %x0, 0; mov.b32 %d, 5; @%q0 mov.b32 %d, %x1; @!%q0 add.s32 %d, %d, 1;"
    same(compute(body, [a, b], i4), np.where(p, b, 6).astype(i4))


def test_moves() -> None:
    a, b = numbers(u4, 0), numbers(u4, 1)
    both = b.astype(u8) << u8(32) | a
    same(compute("mov.b64 %d, {%x0, %x1};", [a, b], u8), both)
    same(compute("mov.b64 {_, %d}, %x0;", [both], u4), b)
    same(compute("{ .reg .b32 t; mov.b64 {%d, t}, %x0; add.s32 %d, %d, t; }", [both], u4), a + b)
    low, high = numbers(np.uint16, 0), numbers(np.uint16, 1)
    same(compute("mov.b32 %d, {%x0, %x1};", [low, high], u4), high.astype(u4) << u4(16) | low)
    same(compute("mov.f32 %d, 0f3F800000;", [a], f4), np.ones(COUNT, f4))
    same(compute("mov.b64 %d, 0d3FF8000000000000;", [a], f8), np.full(COUNT, 1.5))
    same(compute("mov.u32 %d, %tid.x;", [a], u4), np.arange(COUNT, dtype=u4))


def test_conversions() -> None:
    a, wide = numbers(i4, 0), numbers(i8, 1)
    same(compute("cvt.s64.s32 %d, %x0;", [a], i8), a.astype(i8))
    same(compute("cvt.u64.u32 %d, %x0;", [a.view(u4)], u8), a.view(u4).astype(u8))
    same(compute("cvt.u32.u64 %d, %x0;", [wide.view(u8)], u4), wide.astype(u4))
    same(compute("cvt.u16.u32 %d, %x0;", [a.view(u4)], np.uint16), a.astype(np.uint16))
    same(compute("cvt.u32.u16 %d, %x0;", [numbers(np.uint16, 3)], u4), numbers(np.uint16, 3).astype(u4))
    for kind, given in (("s32", a), ("u32", a.view(u4)), ("s64", wide), ("u64", wide.view(u8))):
        same(compute(f"cvt.rn.f32.{kind} %d, %x0;", [given], f4), given.astype(f4))
        same(compute(f"cvt.rn.f64.{kind} %d, %x0;", [given], f8), given.astype(f8))
    x, y = numbers(f4, 4), numbers(f8, 5)
    with np.errstate(all="ignore"):
        same(compute("cvt.f64.f32 %d, %x0;", [x], f8), x.astype(f8))
        same(compute("cvt.rn.f32.f64 %d, %x0;", [y], f4), y.astype(f4))
        same(compute("cvt.rn.f16.f32 %d, %x0;", [x], np.float16), x.astype(np.float16))
        same(compute("cvt.f32.f16 %d, %x0;", [x.astype(np.float16)], f4), x.astype(np.float16).astype(f4))
        packed = compute("cvt.rn.f16x2.f32 %d, %x0, %x1;", [x, numbers(f4, 6)], u4)
        same(packed.view(np.float16).reshape(-1, 2)[:, 1], x.astype(np.float16))
    import torch

    truth = torch.from_numpy(x).bfloat16()
    found = compute("cvt.rn.bf16.f32 %d, %x0;", [x], np.uint16)
    same(compute("cvt.f32.bf16 %d, %x0;", [found], f4), truth.float().numpy())
    packed = compute("cvt.rn.bf16x2.f32 %d, %x1, %x0;", [x, numbers(f4, 6)], u4).view(np.uint16).reshape(-1, 2)
    assert np.array_equal(packed[:, 0], found)
    limits = np.array([1.5, -1.5, 3e9, -3e9, math.nan, math.inf, 1e30, -1e30] * 16)
    truth_s32 = np.array([1, -1, 2**31 - 1, -(2**31), 0, 2**31 - 1, 2**31 - 1, -(2**31)] * 16, i4)
    same(compute("cvt.rzi.s32.f64 %d, %x0;", [limits], i4), truth_s32)


@pytest.mark.parametrize(("mode", "clamp"), [("bfly", 31), ("up", 0), ("down", 31), ("idx", 31)])
@pytest.mark.parametrize("amount", [0, 1, 5, 16])
def test_shuffles(mode: str, clamp: int, amount: int) -> None:
    x = numbers(u4, 0)
    lane, warp = np.arange(COUNT) % 32, np.arange(COUNT) // 32 * 32
    source = {"bfly": lane ^ amount, "up": lane - amount, "down": lane + amount, "idx": np.full(COUNT, amount)}[mode]
    inside = (source >= 0) & (source < 32)
    source = np.where(inside, source, lane) + warp
    same(compute(f"shfl.sync.{mode}.b32 %d, %x0, {amount}, {clamp}, -1;", [x], u4), x[source])
    body = f"shfl.sync.{mode}.b32 %d|%q0, %x0, {amount}, {clamp}, -1; selp.b32 %d, 1, 0, %q0;"
    same(compute(body, [x], u4), inside.astype(u4))


def test_shuffles_within_a_part_of_a_warp() -> None:
    x = numbers(u4, 0)
    segment = np.arange(COUNT) // 8 * 8
    same(compute("shfl.sync.idx.b32 %d, %x0, 3, 0x181f, -1;", [x], u4), x[segment + 3])
    inside = np.arange(COUNT) % 8 >= 2
    truth = x[np.arange(COUNT) - np.where(inside, 2, 0)]
    same(compute("shfl.sync.up.b32 %d, %x0, 2, 0x1800, -1;", [x], u4), truth)


def test_votes_and_reductions() -> None:
    x = numbers(i4, 0)
    by_warp = x.reshape(-1, 32)
    for kind, view in (("s32", by_warp), ("u32", by_warp.view(u4))):
        for name, function in (("min", np.min), ("max", np.max), ("add", np.sum)):
            truth = np.repeat(function(view, axis=1).astype(view.dtype), 32)
            same(compute(f"redux.sync.{name}.{kind} %d, %x0, -1;", [view.reshape(-1)], view.dtype), truth)
    for name, function in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
        truth = np.repeat(function.reduce(by_warp.view(u4), axis=1), 32)
        same(compute(f"redux.sync.{name}.b32 %d, %x0, -1;", [x.view(u4)], u4), truth)
    positive = by_warp > 0
    positive[1], positive[2] = True, False
    given = np.where(positive, 1, 0).astype(i4).reshape(-1)
    body = "setp.gt.s32 %q0, %x0, 0; vote.sync.{}.pred %q1, %q0, -1; selp.b32 %d, 1, 0, %q1;"
    for name, truth in (
        ("any", positive.any(1)),
        ("all", positive.all(1)),
        ("uni", positive.all(1) | ~positive.any(1)),
    ):
        same(compute(body.format(name), [given], u4), np.repeat(truth, 32).astype(u4))
    bits = (positive.astype(u8) << np.arange(32, dtype=u8)).sum(1).astype(u4)
    same(compute("setp.gt.s32 %q0, %x0, 0; vote.sync.ballot.b32 %d, %q0, -1;", [given], u4), np.repeat(bits, 32))
    body = "mov.b32 %d, 0; setp.gt.s32 %q0, %x0, 0; @%q0 activemask.b32 %d;"
    same(compute(body, [given], u4), np.where(given > 0, np.repeat(bits, 32), u4(0)))


def test_branches_meet_again() -> None:
    """A loop whose number of rounds differs by thread, a way that lies apart in the text, and a shuffle behind both."""
    n = np.random.default_rng(0).integers(0, 50, COUNT, dtype=u4)
    body = """
    mov.b32 %d, 0; mov.b32 %i, 0;
LOOP:
    setp.ge.u32 %q0, %i, %x0;
    @%q0 bra DONE;
    add.s32 %d, %d, %i; add.s32 %i, %i, 1;
    bra LOOP;
DONE:
    and.b32 %i, %x0, 1; setp.eq.b32 %q1, %i, 1;
    @%q1 bra ODD;
BOTH:
    shfl.sync.bfly.b32 %i, %d, 1, 31, -1;
    bar.sync 0;
    add.s32 %d, %d, %i;
    bra.uni END;
ODD:
    add.s32 %d, %d, 1000;
    bra BOTH;
END:
"""
    alone = n.astype(i8) * (n.astype(i8) - 1) // 2 + np.where(n & 1, 1000, 0)
    truth = alone + alone.reshape(-1, 2)[:, ::-1].reshape(-1)
    same(compute(body, [n], u4, ".reg .b32 %i;"), truth.astype(u4))


# Memory


SHARED = ".reg .b32 %a; .reg .b32 %b<9>; .reg .pred %q<4>; .reg .b64 %w<9>;"


def shared(body: str, arrays: list[Array], threads: int = 64, size: int = 4096, **how: Any) -> None:
    launch(module(f"mul.lo.s32 %a, %tid, 4; {body}", SHARED, len(arrays), threads, size), arrays, threads, **how)


EXCHANGE = """
    mad.wide.u32 %at0, %tid, 4, %p0; ld.global.b32 %b0, [%at0];
    mov.b32 %b4, memory; add.s32 %b1, %b4, %a; st.shared.b32 [%b1], %b0;
    {barrier}
    xor.b32 %b2, %a, 128; add.s32 %b2, %b4, %b2; ld.shared.b32 %b3, [%b2];
    mad.wide.u32 %at1, %tid, 4, %p1; st.global.b32 [%at1], %b3;
"""


def test_shared_memory_and_barriers() -> None:
    x, out = numbers(u4, 0)[:64], np.zeros(64, u4)
    shared(EXCHANGE.format(barrier="bar.sync 0;"), [x, out])
    same(out, x.reshape(2, 32)[::-1].reshape(-1))
    with pytest.raises(ExecutionError, match=r"race: a read of what another thread wrote|nobody wrote"):
        shared(EXCHANGE.format(barrier=""), [x, out])


def test_a_write_of_what_others_still_read() -> None:
    x, out = numbers(u4, 0)[:64], np.zeros(64, u4)
    again = EXCHANGE.format(barrier="bar.sync 0;") + "{} st.shared.b32 [%b1], %b0;"
    shared(again.format("bar.sync 0;"), [x, out])
    with pytest.raises(ExecutionError, match="race: a write of what another thread read"):
        shared(again.format(""), [x, out])


ONE = "setp.eq.u32 %q0, %tid, 3;"


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("ld.shared.b32 %b0, [memory];", "shared memory: a read of bytes that nobody wrote"),
        ("st.shared.b32 [memory+4096], %tid;", "outside of the block's 4096 bytes"),
        ("add.s32 %b0, %a, 2; st.shared.b32 [%b0], %tid;", "not aligned to 4 bytes"),
        ("ld.global.b32 %b0, [%p0+256];", "global memory: a read outside of every buffer"),
        ("ld.global.b32 %b0, [%p0+-4];", "global memory: a read outside of every buffer"),
        ("ld.global.b32 %b0, [%p1];", "global memory: a read of bytes that nobody wrote"),
        ("st.global.b32 [%p1+256], %tid;", "global memory: a write outside of every buffer"),
        ("st.global.b32 [%p1], %tid;", "threads disagree"),
        ("st.shared.b32 [memory], %tid;", "threads disagree"),
        (
            f"{ONE} @%q0 st.global.b32 [%p1], 1; setp.eq.u32 %q0, %tid, 4; @%q0 st.global.b32 [%p1], 2;",
            "another thread wrote another value",
        ),
        (f"{ONE} @%q0 st.global.b32 [%p0], 1; @!%q0 ld.global.b32 %b0, [%p0];", "race: a read of what another thread wrote"),
        (f"{ONE} @!%q0 ld.global.b32 %b0, [%p0]; @%q0 st.global.b32 [%p0], 1;", "race: a write of what another thread read"),
        (f"{ONE} @%q0 bra L; bar.sync 0; L:", "some threads of block 0 never reach|a part of warp 0"),
        ("setp.ge.u32 %q0, %tid, 32; @%q0 bra L; bar.sync 0; L:", "never reach"),
        (f"{ONE} @%q0 bra L; shfl.sync.bfly.b32 %b0, %a, 1, 31, -1; L:", "waits for threads that are elsewhere"),
        ("L: bra L;", "does not end"),
    ],
)  # fmt: skip
def test_what_is_refused(body: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.ptx.machine.MOST_STEPS", 1000)
    with pytest.raises(ExecutionError, match=what):
        shared(body, [np.zeros(64, u4), np.zeros(64, u4)], unwritten=[1])


def test_one_value_from_many_threads_is_no_fault() -> None:
    out = np.zeros(64, u4)
    shared(
        "st.global.b32 [%p0], 7; st.shared.b32 [memory], 7; bar.sync 0; ld.shared.b32 %b0, [memory];"
        "mad.wide.u32 %at0, %tid, 4, %p0; setp.ne.u32 %q0, %tid, 0; @%q0 st.global.b32 [%at0], %b0;", [out]
    )  # fmt: skip
    assert (out == 7).all()


@pytest.mark.parametrize("barrier", ["", "bar.sync 0;"])
def test_blocks_are_not_ordered(barrier: str) -> None:
    """A barrier is one block's own."""
    body = f"mov.u32 %b0, %ctaid.x; st.global.b32 [%p0], %b0; {barrier}"
    with pytest.raises(ExecutionError, match=r"another thread wrote another value|disagree"):
        shared(body, [np.zeros(64, u4)], blocks=3)
    last = "mov.u32 %b0, %ctaid.x; setp.eq.u32 %q0, %b0, 2;"
    body = f"{last} @!%q0 ld.global.b32 %b1, [%p0]; {barrier} @%q0 st.global.b32 [%p0], 1;"
    with pytest.raises(ExecutionError, match="a race: a write of what another thread read"):
        shared(body, [np.zeros(64, u4)], blocks=3)


def test_a_block_may_change_what_it_has_read() -> None:
    """In place, behind a barrier."""
    x = np.arange(192, dtype=u4)
    body = """
    mov.u32 %b0, %ctaid.x; mad.lo.s32 %b0, %b0, 64, %tid; mad.wide.u32 %at0, %b0, 4, %p0;
    xor.b32 %b1, %b0, 32; mad.wide.u32 %at1, %b1, 4, %p0;
    ld.global.b32 %b2, [%at0]; ld.global.b32 %b3, [%at1]; {} add.s32 %b2, %b2, %b3; st.global.b32 [%at0], %b2;
"""
    truth = x + x.reshape(3, 2, 32)[:, ::-1].reshape(-1)
    shared(body.format("bar.sync 0;"), [x], blocks=3)
    same(x, truth)
    with pytest.raises(ExecutionError, match="a race: a write of what another thread read"):
        shared(body.format(""), [x], blocks=3)


def test_vectors_of_words() -> None:
    x, out = numbers(u4, 0).repeat(2), np.zeros(256, u4)
    shared(
        "mad.wide.u32 %at0, %tid, 16, %p0; mad.wide.u32 %at1, %tid, 16, %p1; mul.lo.s32 %b0, %tid, 16;"
        "ld.global.nc.L1::evict_first.v4.b32 {%b1, %b2, %b3, %b4}, [%at0]; st.shared.v4.b32 [%b0], {%b4, %b3, %b2, %b1};"
        "ld.shared.v2.b64 {%w0, %w1}, [%b0]; st.global.v2.b64 [%at1], {%w1, %w0};", [x, out]
    )  # fmt: skip
    same(out, x.reshape(-1, 2, 2)[:, :, ::-1].reshape(-1))


COPY = """
    mul.lo.s32 %b0, %tid, 16; mad.wide.u32 %at0, %tid, 16, %p0;
    cp.async.cg.shared.global [%b0 + 0], [%at0 + 0], 0x10, {taken}; cp.async.commit_group;
    cp.async.cg.shared.global [%b0 + 1024], [%at0 + 1024], 0x10, 16; cp.async.commit_group;
    cp.async.wait_group {left}; {barrier}
    xor.b32 %b1, %b0, 512; ld.shared.v4.b32 {{%b2, %b3, %b4, %b5}}, [%b1{second}];
    mad.wide.u32 %at1, %tid, 16, %p1; st.global.v4.b32 [%at1], {{%b2, %b3, %b4, %b5}};
"""


def test_copies_beside_the_threads() -> None:
    x, out = np.arange(512, dtype=u4), np.zeros(256, u4)
    how = {"taken": "16", "left": "1", "barrier": "bar.sync 0;", "second": ""}
    shared(COPY.format(**how), [x, out])
    truth = x[:256].reshape(2, 128)[::-1].reshape(-1)
    same(out, truth)
    shared(COPY.format(**how | {"left": "0", "second": " + 1024"}), [x, out])
    same(out, truth + u4(256))
    shared(COPY.format(**how | {"taken": "8"}), [x, out])
    same(out, np.where(np.arange(256) % 4 < 2, truth, 0).astype(u4))
    with pytest.raises(ExecutionError, match="whose copy nobody waited for"):
        shared(COPY.format(**how | {"left": "2"}), [x, out])
    with pytest.raises(ExecutionError, match="whose copy nobody waited for"):
        shared(COPY.format(**how | {"second": " + 1024"}), [x, out])
    with pytest.raises(ExecutionError, match="race"):
        shared(COPY.format(**how | {"barrier": ""}), [x, out])


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count: int, trans: str) -> None:
    """Four matrices of 8 by 8, a row of 16 bytes for each thread's address."""
    x, out = np.arange(256, dtype=np.uint16), np.zeros((32, count), u4)
    names = ", ".join(f"%b{i + 1}" for i in range(count))
    stores = " ".join(f"st.global.b32 [%at1+{4 * i}], %b{i + 1};" for i in range(count))
    shared(
        "mad.wide.u32 %at0, %tid, 16, %p0; mul.lo.s32 %b0, %tid, 16;"
        "ld.global.v4.b32 {%b1, %b2, %b3, %b4}, [%at0]; st.shared.v4.b32 [%b0], {%b1, %b2, %b3, %b4}; bar.sync 0;"
        f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{names}}}, [%b0];"
        f"mad.wide.u32 %at1, %tid, {4 * count}, %p1; {stores}", [x, out], threads=32,
    )  # fmt: skip
    matrices = x.reshape(4, 8, 8)
    if trans:
        matrices = matrices.transpose(0, 2, 1)
    for i in range(count):
        same(np.ascontiguousarray(out[:, i]).view(np.uint16), np.ascontiguousarray(matrices[i]).reshape(-1))


@pytest.mark.parametrize(
    ("inner", "kind"), [(16, "bf16"), (16, "f16"), (8, "bf16"), (8, "f16"), (8, "tf32"), (4, "tf32")]
)
def test_mma(inner: int, kind: str) -> None:
    """Fragments laid out as the manual of PTX has them, by its formulas for the row and the column of each element."""
    generator = np.random.default_rng(0)
    a, b, c = (generator.integers(-8, 9, shape) for shape in ((16, inner), (inner, 8), (16, 8)))
    lane = np.arange(32)
    group, member = lane // 4, lane % 4
    each = 1 if kind == "tf32" else 2

    def packed(values: Array) -> Array:
        if kind == "tf32":
            return values.astype(f4).view(u4)[..., 0]
        parts = values.astype(np.float16).view(np.uint16)
        if kind == "bf16":
            parts = (values.astype(f4).view(u4) >> u4(16)).astype(np.uint16)
        return np.ascontiguousarray(parts).view(u4)[..., 0]

    registers_a, registers_b = 16 * inner // 32 // each, 8 * inner // 32 // each
    e = np.arange(each)
    fragments = []
    for i in range(registers_a):
        rows, columns = group + 8 * (i % 2), each * member[:, None] + e + 4 * each * (i // 2)
        fragments.append(packed(a[rows[:, None], columns]))
    for i in range(registers_b):
        fragments.append(packed(b[each * member[:, None] + e + 4 * each * i, group[:, None]]))
    rows = [group, group, group + 8, group + 8]
    columns = [2 * member, 2 * member + 1, 2 * member, 2 * member + 1]
    fragments += [c[r, k].astype(f4).view(u4) for r, k in zip(rows, columns, strict=True)]
    given, out = np.stack(fragments, 1), np.zeros((32, 4), f4)
    count = given.shape[1]
    names = [f"%v{i}" for i in range(count)]
    loads = " ".join(f"ld.global.b32 {name}, [%at0+{4 * i}];" for i, name in enumerate(names))
    x, y, z = names[:registers_a], names[registers_a:-4], names[-4:]
    d = ["%d0", "%d1", "%d2", "%d3"]
    parts = ", ".join("{" + ", ".join(v) + "}" for v in (d, x, y, z))
    stores = " ".join(f"st.global.b32 [%at1+{4 * i}], {name};" for i, name in enumerate(d))
    product = f"mma.sync.aligned.m16n8k{inner}.row.col.f32.{kind}.{kind}.f32 {parts};"
    body = f"mad.wide.u32 %at0, %tid, {4 * count}, %p0; mad.wide.u32 %at1, %tid, 16, %p1; {loads} {product} {stores}"
    launch(module(body, f".reg .b32 %v<{count}>; .reg .b32 %d<4>;", 2, 32), [given, out], 32)
    truth = a @ b + c
    for i in range(4):
        same(out[:, i], truth[rows[i], columns[i]].astype(f4))


@pytest.mark.parametrize(
    "line",
    [
        "frobnicate.b32 %b0, %b1;", "add.sat.s32 %b0, %b1, %b2;", "atom.global.add.u32 %b0, [%p0], 1;", "bar.sync 1;",
        "cvt.rp.f32.s32 %b0, %b1;", "ld.local.b32 %b0, [%b1];", "mov.b32 %b0, %clock;", "add.s32 %b0, %b1;",
    ],
)  # fmt: skip
def test_what_is_unknown_is_said(line: str) -> None:
    with pytest.raises((PtxError, KeyError), match=line.split()[0].split(".")[0] if "clock" not in line else "clock"):
        shared(line, [np.zeros(64, u4)])
