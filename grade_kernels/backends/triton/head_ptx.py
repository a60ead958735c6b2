"""What the kernels of the head do rarely, in PTX: Triton branches for a whole program, these blocks for a warp.

A block of PTX looks at one group of four tokens in every thread of a warp. It asks whether any thread has something to do.
Seldom one has. If none has, the block jumps to its end.
"""

from __future__ import annotations

import struct

import triton.language as tl

from grade_kernels import noise

__all__ = ["COLLECT", "COLLECT_OPERANDS", "REFINE", "REFINE_OPERANDS"]


def _refine() -> str:
    """Scaled noise, refined where words are below REFINE_BELOW. Operands:

    $0 to $3 out: the noise of the group's four tokens
    $4 to $7 in: the same before refinement
    $8 to $11 in: their words
    $12 in: the group, a counter word
    $13 in: the row's low counter word
    $14 in: the row's high counter word
    $15 in: the first key word
    $16 in: the second key word
    """
    lines = [
        ".reg .pred any;",
        ".reg .b32 least, c0, c1, c2, c3, k0, k1, high, low, other;",
        ".reg .b64 wide;",
        ".reg .f32 coarse, fine;",
        *(f"mov.b32 ${i}, ${4 + i};" for i in range(4)),
        "min.u32 least, $8, $9; min.u32 least, least, $10; min.u32 least, least, $11;",
        f"setp.lt.u32 any, least, {noise.REFINE_BELOW};",
        *_skip_unless("any"),
        f"mov.b32 c0, $12; mov.b32 c1, $13; mov.b32 c2, $14; mov.b32 c3, {noise.DOMAIN_REFINE};",
        "mov.b32 k0, $15; mov.b32 k1, $16;",
    ]
    for _ in range(10):  # Philox4x32-10 in place
        lines += [
            f"mul.wide.u32 wide, c0, {0xD2511F53}; mov.b64 {{low, high}}, wide;",
            "xor.b32 other, c3, k1; xor.b32 high, high, other; mov.b32 c3, low;",
            f"mul.wide.u32 wide, c2, {0xCD9E8D57}; mov.b64 {{low, other}}, wide;",
            "xor.b32 other, other, c1; xor.b32 c0, other, k0; mov.b32 c1, low; mov.b32 c2, high;",
            f"add.u32 k0, k0, {0x9E3779B9}; add.u32 k1, k1, {0xBB67AE85};",
        ]
    for i in range(4):
        # For w < 256, E = -log1p(-u) is u within 3e-8 of it. So log2(E) changes as log2(u) does.
        lines += [
            f"cvt.rn.f32.u32 coarse, ${8 + i}; cvt.rn.f32.u32 fine, c{i}; add.f32 fine, fine, {_float(0.5)};",
            f"fma.rn.f32 fine, fine, {_float(2.0**-32)}, coarse; add.f32 coarse, coarse, {_float(0.5)};",
            "lg2.approx.ftz.f32 fine, fine; lg2.approx.ftz.f32 coarse, coarse; sub.f32 fine, fine, coarse;",
            f"setp.lt.u32 any, ${8 + i}, {noise.REFINE_BELOW};",
            f"@any add.f32 ${i}, ${i}, fine;",
        ]
    return _block(lines)


def _collect(threads: int) -> str:
    """Write down the tokens whose weight exceeds a hurdle, in token order, and count them. Operands:

    $0 out: the row's candidates after this group
    $1 in: the row's candidates before it
    $2 to $5 in: the weights of the group's four tokens
    $6 to $9 in: their words
    $10 to $13 in: their scores
    $14 in: the group's first token
    $15 in: the row
    $16 in: where the slots of row 0 begin; a slot is a token (4 bytes) and its score's bits (4 bytes)
    $17 in: bytes from one row's slots to the next row's
    $18 in: slots of a row
    $19 in: the factor from a word's spread number, 0 to 2^32, to its hurdle

    `threads` neighbouring threads hold neighbouring groups of one row. Otherwise their ranks would be wrong. The block
    checks it. If it is not so, the count is set to 2^30: the row is taken for one that overflowed, and takes the dense
    backward.
    """
    lines = [
        ".reg .pred any, p0, p1, p2, p3, room;",
        ".reg .b32 lane, first, peers, before, n, b0, b1, b2, b3, at, token, other;",
        ".reg .b64 start, slot;",
        ".reg .f32 h0, h1, h2, h3;",
        "mov.b32 $0, $1;",
        *(f"mul.lo.u32 n, ${6 + i}, {0x9E3779B1}; cvt.rn.f32.u32 h{i}, n; mul.f32 h{i}, h{i}, $19;" for i in range(4)),
        "setp.gt.f32 any, $2, h0;",
        *(f"setp.gt.or.f32 any, ${2 + i}, h{i}, any;" for i in range(1, 4)),
        *_skip_unless("any"),
        f"mov.u32 lane, %laneid; and.b32 first, lane, {32 - threads}; sub.u32 lane, lane, first;",
        f"shl.b32 peers, {2**threads - 1}, first;",
        "mov.u32 before, %lanemask_lt; and.b32 before, before, peers;",
        "shfl.sync.idx.b32 token, $14, first, 31, 0xffffffff;",
        "mad.lo.u32 token, lane, 4, token; setp.ne.u32 any, token, $14;",
        "shfl.sync.idx.b32 other, $15, first, 31, 0xffffffff; setp.ne.or.u32 any, other, $15, any;",
        f"vote.sync.any.pred any, any, 0xffffffff; selp.b32 $0, {2**30}, $0, any;",
        "mad.wide.s32 start, $15, $17, $16;",
        "mov.b32 at, $0; mov.b32 token, $14;",
    ]
    # at becomes where this thread's candidates go: behind those of the row's threads before it.
    for i in range(4):
        lines += [
            f"setp.gt.f32 p{i}, ${2 + i}, h{i}; vote.sync.ballot.b32 b{i}, p{i}, 0xffffffff;",
            f"and.b32 n, b{i}, peers; popc.b32 n, n; add.u32 $0, $0, n;",
            f"and.b32 n, b{i}, before; popc.b32 n, n; add.u32 at, at, n;",
        ]
    for i in range(4):
        lines += [
            f"setp.lt.and.s32 room, at, $18, p{i}; mad.wide.s32 slot, at, 8, start;",
            f"@room st.global.v2.b32 [slot], {{token, ${10 + i}}};",
            f"@p{i} add.u32 at, at, 1;",
            "add.u32 token, token, 1;",
        ]
    return _block(lines)


def _skip_unless(predicate: str) -> list[str]:
    return [f"vote.sync.any.pred {predicate}, {predicate}, 0xffffffff;", f"@!{predicate} bra.uni DONE;"]


def _float(value: float) -> str:
    """A constant of float32."""
    return f"0f{int.from_bytes(struct.pack('<f', value), 'little'):08X}"


def _block(lines: list[str]) -> str:
    return "\n".join(["{", *lines, "DONE:", "}"])


REFINE = tl.constexpr(_refine())
REFINE_OPERANDS = tl.constexpr(",".join(["=&f"] * 4 + ["f"] * 4 + ["r"] * 9))
# By the number of threads that share a row.
COLLECT = tl.constexpr({threads: _collect(threads) for threads in (1, 4)})
COLLECT_OPERANDS = tl.constexpr(
    ",".join(["=&r", "r"] + ["f"] * 4 + ["r"] * 4 + ["f"] * 4 + ["r", "r", "l", "r", "r", "f"])
)
