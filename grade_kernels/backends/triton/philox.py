"""Device functions of the noise contract (`grade_kernels.noise`): Philox words, and noise from words.

All of them take tiles of any shape, `[lanes]` or `[rows, columns]`. Four neighbouring tokens share one Philox call:
`words` takes the tile of groups (token id >> 2) and returns a tile four times as wide, in which word `v & 3` stands at
token `v`.

Noise comes in a scaled form, `n = log2(E / ln 2)`, so that `g = SHIFT - LN2 * n`: the factor is absorbed by the fused
multiply-add with the logit, and the shift, which is the same for all tokens, is added once per row.

Multiply-adds that must be one rounding are written as `fma`, since whether Triton fuses the others is a setting.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grade_kernels import noise

DOMAIN_GUMBEL = tl.constexpr(noise.DOMAIN_GUMBEL)
DOMAIN_REFINE = tl.constexpr(noise.DOMAIN_REFINE)
DOMAIN_SUPPORT = tl.constexpr(noise.DOMAIN_SUPPORT)
REFINE_BELOW = tl.constexpr(noise.REFINE_BELOW)

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
SHIFT = tl.constexpr(0.36651292058166435)  # -ln(ln 2)
WIDE_PRODUCT = tl.constexpr("{ .reg .b64 p; mul.wide.u32 p, $2, $3; mov.b64 {$1, $0}, p; }")


@triton.jit
def load_key(p_seed):
    """The two key words of a 0-d int64 seed."""
    seed = tl.load(p_seed).to(tl.uint64, bitcast=True)
    return seed.to(tl.uint32), (seed >> 32).to(tl.uint32)


@triton.jit
def split_row(row):
    """The two counter words of int64 row identities."""
    row = row.to(tl.uint64, bitcast=True)
    return row.to(tl.uint32), (row >> 32).to(tl.uint32)


@triton.jit
def _round(c0, c1, c2, c3, k0, k1, FAST: tl.constexpr):
    """Counter and key after one round. A single wide multiply gives both words of a product; apart they would be two."""
    if FAST:
        # LLVM would widen what follows to 64 bits, and add up high words that are zero. So the product is written in PTX.
        high0, low0 = tl.inline_asm_elementwise(
            WIDE_PRODUCT, "=r,=r,r,r", [c0, 0xD2511F53], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1
        )
        high1, low1 = tl.inline_asm_elementwise(
            WIDE_PRODUCT, "=r,=r,r,r", [c2, 0xCD9E8D57], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1
        )
    else:
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        high0, low0 = (p0 >> 32).to(tl.uint32), p0.to(tl.uint32)
        high1, low1 = (p1 >> 32).to(tl.uint32), p1.to(tl.uint32)
    k = tl.add(k0, 0x9E3779B9, sanitize_overflow=False), tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return high1 ^ (c1 ^ k0), low1, high0 ^ (c3 ^ k1), low0, k[0], k[1]


@triton.jit
def philox(c0, c1, c2, c3, k0, k1, FAST: tl.constexpr, RARE: tl.constexpr = False):
    """Philox4x32-10. Counter and key are uint32 and broadcast, so what all threads share stays scalar.

    FAST: compiled for NVIDIA. RARE: seldom reached, so that code should be short rather than fast.
    """
    if FAST and not RARE:
        for _ in tl.static_range(10):
            c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1, FAST)
    else:
        # Unrolled, this would take long to compile: some of Triton's passes take time with the square of a kernel's length.
        # So it is a loop. Where it is not rare, which is on AMD, LLVM unrolls it afterwards.
        none = tl.zeros((c0 ^ c1 ^ c2 ^ c3).shape, tl.uint32)
        c0, c1, c2, c3 = c0 | none, c1 | none, c2 | none, c3 | none
        for _ in range(10):
            c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1, FAST)
    return c0, c1, c2, c3


@triton.jit
def words(
    groups, row_lo, row_hi, k0, k1, DOMAIN: tl.constexpr, FAST: tl.constexpr, RARE: tl.constexpr = False
):  # fmt: skip
    """Words `[..., 4 * G]` of token groups `[..., G]` (uint32), and the least word of each group.

    Row counters and key broadcast to the groups. The least words tell whether any word needs refinement. They have the layout
    of the groups, so that asking them moves nothing between threads.
    """
    w0, w1, w2, w3 = philox(groups, row_lo, row_hi, tl.full((), DOMAIN, tl.uint32), k0, k1, FAST, RARE)
    quads = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    least = tl.minimum(tl.minimum(w0, w1), tl.minimum(w2, w3))
    return tl.reshape(quads, w0.shape[:-1] + [4 * w0.shape[-1]]), least


@triton.jit
def log2(x, FAST: tl.constexpr):
    """Logarithm of float32, NaN for negative numbers.

    NVIDIA's instruction has an absolute error of 2^-22 in (0.5, 2) and a relative one of 2^-22 elsewhere; Triton's own
    function there is twenty instructions more.
    """
    if FAST:
        y = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )  # fmt: skip
    else:
        y = tl.log2(x)
    return y


@triton.jit
def scaled_noise(w, fine, DTYPE: tl.constexpr, FAST: tl.constexpr, REFINE: tl.constexpr):
    """n = log2(E / ln 2), of which Gumbel noise is SHIFT - LN2 * n; never infinite or NaN.

    w, fine: words of DOMAIN_GUMBEL and DOMAIN_REFINE (read only with REFINE). DTYPE: float32 or float64.
    FAST: compiled for NVIDIA. REFINE: use `fine` where w < REFINE_BELOW; without it the caller knows that none is.
    """
    # A conversion of u would lose the digits of 1 - u where u is near 1. As a signed number the word is its distance from
    # the nearer end. So y is -u for words below 2^31 and 1 - u for the others, accurate at either end.
    y = tl.fma(w.to(tl.int32, bitcast=True).to(DTYPE), -(2.0**-32), -(2.0**-33))
    if REFINE:
        u = tl.fma(w.to(DTYPE), 2.0**-32, (fine.to(DTYPE) + 0.5) * 2.0**-64)
        y = tl.where(w < REFINE_BELOW, -u, y)
    if DTYPE == tl.float64:
        # For y < 0, E = -log(1 - u). 1 - u is exact, but where u is small its logarithm loses digits: there, the series.
        p = tl.full(y.shape, -1.0 / 9.0, DTYPE)
        for i in tl.static_range(8):
            p = tl.fma(-p, y, tl.full((), -1.0 / (8 - i), DTYPE))
        e = tl.where(y < 0, tl.where(y > -(2.0**-6), y * p, -tl.log(1.0 - tl.abs(y))), -tl.log(tl.abs(y)))
        n = tl.log2(e * LOG2E)
    else:
        # E = y p ln 2 with a polynomial p; relative error 7e-8 near 0, where winners are, and 2e-7 at most.
        p = tl.fma(y, 1.578389196529861, 1.333184071297368)
        p = tl.fma(p, y, 0.9788293455245592)
        p = tl.fma(p, y, -0.10669454257452884)
        p = tl.fma(p, y, 0.3838636089568017)
        p = tl.fma(p, y, -0.4795022625729261)
        p = tl.fma(p, y, 0.721378239005198)
        p = tl.fma(p, y, -1.44269493566251)
        # For y < 0, E is y p ln 2 and log2(y) is NaN, which maximum ignores. For y > 0, E is -log(y) and y p is negative.
        n = log2(tl.maximum(y * p, -log2(y, FAST)), FAST)
    return n


@triton.jit
def row_stream(seed, row_ids, i_n):
    """What all words of row i_n are drawn from: the row's counter words and the key."""
    k0, k1 = load_key(seed)
    row_lo, row_hi = split_row(i_n if row_ids is None else tl.load(row_ids + i_n))
    return row_lo, row_hi, k0, k1


@triton.jit
def strip_noise(b_group, stream, DTYPE: tl.constexpr, FAST: tl.constexpr, REFINE: tl.constexpr):
    """Scaled noise `[..., 4 * G]` of token groups `[..., G]`, and the groups' least words (see `words`)."""
    row_lo, row_hi, k0, k1 = stream
    w, least = words(b_group, row_lo, row_hi, k0, k1, DOMAIN_GUMBEL, FAST)
    fine = w
    if REFINE:
        fine, _ = words(b_group, row_lo, row_hi, k0, k1, DOMAIN_REFINE, FAST, RARE=True)
    return scaled_noise(w, fine, DTYPE, FAST, REFINE), least
