"""What instructions compute, on arrays with an element for each thread, or one element that all threads have.

Approximate instructions (`ex2.approx` and its kind) give the exact value, rounded once: within the error that the PTX
manual states, but not the bits of a GPU.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["HELPERS"]

Array = npt.NDArray[np.generic]

u2, u4, u8 = np.uint16, np.uint32, np.uint64
i2, i4, i8 = np.int16, np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64
_WIDER = {2: u4, 4: u8}
_SIGNED = {2: i2, 4: i4, 8: i8}


def ftz(x: Array) -> Array:
    """Numbers below the normal ones become zero, with their sign."""
    small = np.abs(x) < np.finfo(x.dtype).tiny
    return np.where(small, np.copysign(x.dtype.type(0), x), x) if small.any() else x


def fma4(a: Array, b: Array, c: Array) -> Array:
    """a b + c in float32, rounded once.

    In float64 the product is exact. Rounding the sum to float64 first matters only where that lies half-way between two
    numbers of float32; there it is moved towards what was lost.
    """
    p, c8 = a.astype(f8) * b, c.astype(f8)
    s = np.asarray(p + c8)
    half = (s.view(u8) & u8(0x1FFFFFFF)) == u8(0x10000000)
    if half.any():
        back = s - p
        lost = (p - (s - back)) + (c8 - back)
        s = np.where(half & (lost != 0) & np.isfinite(s), np.nextafter(s, np.where(lost > 0, np.inf, -np.inf)), s)
    return s.astype(f4)


def fma8(a: Array, b: Array, c: Array) -> Array:
    """a b + c in float64: the product's and the sum's own errors are added at the end."""
    p = a * b
    halves = []
    for x in (a, b):
        t = x * 134217729.0
        high = t - (t - x)
        halves.append((high, x - high))
    (ah, al), (bh, bl) = halves
    lost = ((ah * bh - p) + ah * bl + al * bh) + al * bl
    s = p + c
    back = s - p
    lost = lost + ((p - (s - back)) + (c - back))
    out = s + lost
    return np.where(np.isfinite(out), out, p + c)


def fmax(a: Array, b: Array) -> Array:
    """The other one beside a NaN; +0 is above -0."""
    out = np.fmax(a, b)
    return np.where((a == b) & (out == 0), a + b, out)


def fmin(a: Array, b: Array) -> Array:
    out = np.fmin(a, b)
    return np.where((a == b) & (out == 0), -(-a - b), out)


def nanmax(a: Array, b: Array) -> Array:
    """NaN beside a NaN."""
    out = np.maximum(a, b)
    return np.where((a == b) & (out == 0), a + b, out)


def nanmin(a: Array, b: Array) -> Array:
    out = np.minimum(a, b)
    return np.where((a == b) & (out == 0), -(-a - b), out)


def mulhi(a: Array, b: Array) -> Array:
    """The upper half of a product of unsigned or signed numbers."""
    width = a.dtype.itemsize
    if width < 8:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return (a.astype(wide) * b.astype(wide) >> wide(8 * width)).astype(a.dtype)
    x, y = a.view(u8), b.view(u8)
    low = u8(0xFFFFFFFF)
    x0, x1, y0, y1 = x & low, x >> u8(32), y & low, y >> u8(32)
    middle = x1 * y0 + (x0 * y0 >> u8(32))
    other = x0 * y1 + (middle & low)
    high = x1 * y1 + (middle >> u8(32)) + (other >> u8(32))
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, u8(0)) - np.where(b < 0, x, u8(0))
    return high.view(a.dtype)


def wide(a: Array, b: Array) -> Array:
    """The whole product of numbers of 16 or 32 bits."""
    to = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
    return a.astype(to) * b.astype(to)


def quotient(a: Array, b: Array) -> Array:
    """Rounded towards zero; by zero all bits are ones, as GPUs have it."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "i":
        out = a // safe
        out = out + ((a - out * safe != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)
    else:
        out = a // safe
    return np.where(b == 0, (~np.zeros(1, a.dtype)), out)


def remainder(a: Array, b: Array) -> Array:
    """Of `quotient`; it has the sign of a."""
    return np.where(b == 0, a, a - quotient(a, b) * b)


def shift_left(a: Array, n: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    return np.where(n >= bits, a.dtype.type(0), a << (n & u4(bits - 1)).astype(a.dtype))


def shift_right(a: Array, n: Array) -> Array:
    """Of signed numbers with the sign."""
    bits = 8 * a.dtype.itemsize
    return (
        a >> np.minimum(n, u4(bits - 1)).astype(a.dtype)
        if a.dtype.kind == "i"
        else np.where(n >= bits, a.dtype.type(0), a >> (n & u4(bits - 1)).astype(a.dtype))
    )


def bfe(a: Array, start: Array, length: Array) -> Array:
    """`length` bits of a from `start` on; of signed numbers the uppermost is the sign."""
    bits = 8 * a.dtype.itemsize
    start, length = start & u4(255), length & u4(255)
    asked = length
    length = np.where(start + length > bits, bits - np.minimum(start, bits), length) if a.dtype.kind == "i" else length
    length = length.astype(u4)
    plain = a.view(UNSIGNED[a.dtype.itemsize])
    one = plain.dtype.type(1)
    mask = np.where(length >= bits, ~plain.dtype.type(0), shift_left(np.broadcast_to(one, length.shape), length) - one)
    out = shift_right(plain, start) & mask
    if a.dtype.kind != "i":
        return out
    last = np.minimum(start + length - u4(1), u4(bits - 1))
    sign = (shift_right(plain, last) & one).astype(bool) & (asked > 0)
    return np.where(sign, out | ~mask, out).view(a.dtype)


def bfi(a: Array, b: Array, start: Array, length: Array) -> Array:
    """b with `length` bits from `start` on replaced by the lowest ones of a."""
    bits = 8 * a.dtype.itemsize
    start, length = start & u4(255), length & u4(255)
    one = a.dtype.type(1)
    mask = np.where(length >= bits, ~a.dtype.type(0), shift_left(np.broadcast_to(one, length.shape), length) - one)
    mask = shift_left(mask, start)
    return (b & ~mask) | (shift_left(a, start) & mask)


def funnel(low: Array, high: Array, n: Array, left: bool, clamp: bool) -> Array:
    """32 bits of high:low, shifted."""
    n = np.minimum(n, u4(32)) if clamp else n & u4(31)
    both = (high.astype(u8) << u8(32)) | low
    return (both >> (u8(32) - n if left else n.astype(u8))).astype(u4)


def prmt(a: Array, b: Array, selector: Array) -> Array:
    """Four bytes of b:a; the fourth bit of a choice spreads the byte's sign."""
    both = (b.astype(u8) << u8(32)) | a
    out = np.zeros(np.broadcast_shapes(both.shape, selector.shape), u4)
    for i in range(4):
        choice = selector >> u4(4 * i)
        byte = (both >> ((choice & u4(7)).astype(u8) * u8(8))).astype(u4) & u4(255)
        byte = np.where(choice & u4(8), np.where(byte & u4(128), u4(255), u4(0)), byte)
        out = out | (byte << u4(8 * i))
    return out


def lop3(a: Array, b: Array, c: Array, table: int) -> Array:
    """Any function of three bits, bit by bit."""
    out = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), a.dtype)
    for i in range(8):
        if table >> i & 1:
            out = out | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return out


def ex2(x: Array) -> Array:
    """`ex2.approx`: relative error at most 2^-22."""
    return np.exp2(x.astype(f8)).astype(x.dtype)


def lg2(x: Array) -> Array:
    """`lg2.approx`: absolute error at most 2^-22 near 1, relative elsewhere."""
    return np.log2(x.astype(f8)).astype(x.dtype)


def rcp_approx8(x: Array) -> Array:
    """`rcp.approx.ftz.f64` looks at the upper 32 bits alone, and gives no lower ones."""
    high = (x.view(u8) & u8(0xFFFFFFFF00000000)).view(f8)
    out = 1 / ftz(high)
    return ftz((out.view(u8) & u8(0xFFFFFFFF00000000)).view(f8))


def to_bf16(x: Array) -> Array:
    """The bits of float32 rounded to bfloat16, half-way cases to even."""
    bits = x.view(u4)
    out = ((bits + (u4(0x7FFF) + ((bits >> u4(16)) & u4(1)))) >> u4(16)).astype(u2)
    return np.where(np.isnan(x), u2(0x7FFF), out)


def from_bf16(bits: Array) -> Array:
    return (bits.astype(u4) << u4(16)).view(f4)


def to_int(x: Array, dtype: npt.DTypeLike, how: str) -> Array:
    """Floating point to integers: rounded, clamped to what there is; NaN is 0."""
    rounded = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[how](x.astype(f8))
    limits = np.iinfo(dtype)
    inside = (rounded >= float(limits.min)) & (rounded < float(limits.max) + 1)
    whole = np.where(inside, rounded, 0).astype(dtype)
    high, low = np.array(limits.max, dtype), np.array(limits.min, dtype)
    return np.where(inside, whole, np.where(np.isnan(x), np.array(0, dtype), np.where(rounded > 0, high, low)))


def halves(low: Array, high: Array) -> Array:
    """Two parts of a register, lower one first."""
    to = _WIDER[low.dtype.itemsize]
    return low.astype(to) | (high.astype(to) << to(8 * low.dtype.itemsize))


def popc(x: Array) -> Array:
    return np.bitwise_count(x).astype(u4)


UNSIGNED = {2: u2, 4: u4, 8: u8}
HELPERS = {
    name: thing
    for name, thing in globals().items()
    if callable(thing) and not name.startswith("_") and name != "annotations"
} | {"np": np, "where": np.where}
