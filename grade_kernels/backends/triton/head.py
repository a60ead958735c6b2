"""Tiles of a head's logits: the matrix product, and what the kernels that consume it do with a tile.

A program owns BM hidden rows and a split of the vocabulary, SPLIT tokens, which it takes in tiles of BN. A tile leaves
the tensor cores as `[BM, BN]` in registers and is taken apart into four quarters `[BM, BN // 4]`, quarter j holding
the tokens `4 * group + j`: the four tokens of a Philox call then lie in one thread, and words meet logits without any
exchange. NVIDIA's accumulators give a thread pairs of neighbouring columns, so there the columns of the tile are
permuted: rows of the head are loaded in the order that gives each of the four threads of a row a run of neighbouring
tokens.

Sizes depend on neither the batch nor the device's size, so a row's result is the same in every batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from grade_kernels.backends import Head
from grade_kernels.backends.triton.philox import LOG2E
from grade_kernels.backends.triton.tiles import INTERPRETED, target_options

SPLIT = 512  # tokens of a program
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # a maximum of nothing; finite, since inf - inf is NaN
NOWHERE = tl.constexpr(0x7FFFFFFF)


class Config(NamedTuple):
    """Sizes that a kernel is compiled for."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int


# By how many rows there are at most. The first leaves room for two programs on a multiprocessor, so that one's epilogue
# hides behind the other's product; the second halves what the head costs to read, and its registers leave room for one.
NARROW = ((64, Config(64, 64, 64, 4, 4)), (None, Config(128, 64, 64, 8, 3)))
PAIR = Config(64, 32, 64, 4, 3)  # two products per tile
# float32 is multiplied in true float32, which no tensor core does: small tiles of fused multiply-adds.
WIDE = ((None, Config(64, 64, 16, 8, 2)),)


def config(rows: int, dtype: torch.dtype, products: int = 1) -> Config:
    """Tile sizes for a number of rows."""
    if dtype == torch.float32:
        return WIDE[0][1]
    return PAIR if products > 1 else next(c for most, c in NARROW if most is None or rows <= most)


def configurations(dtype: torch.dtype, products: int = 1) -> list[Config]:
    """Everything that `config` may return for a dtype, the one for many rows last."""
    if dtype == torch.float32:
        return [sizes for _, sizes in WIDE]
    return [PAIR] if products > 1 else [sizes for _, sizes in NARROW]


def target() -> tuple[str, int]:
    """Name of the Triton backend that kernels are launched on, and its compute capability (0 outside NVIDIA)."""
    if INTERPRETED:
        return "interpreter", 0
    active = triton.runtime.driver.active.get_current_target()
    return active.backend, active.arch if active.backend == "cuda" else 0


def tile_options(sizes: Config, dtype: torch.dtype, backend: str, capability: int) -> dict[str, Any]:
    """Arguments that describe tiles, and compiler options."""
    # Tensor cores up to Hopper's, and those of the smaller Blackwells; data centre Blackwell's (10.x and 11.x) give a
    # thread whole rows, AMD's four neighbouring columns.
    permuted = dtype != torch.float32 and backend == "cuda" and not 100 <= capability < 120
    return {
        **sizes._asdict(),
        "TILES": SPLIT // sizes.BN,
        "PERMUTED": permuted,
        "TARGET": backend,
        **target_options(backend),
    }


def head_options(head: Head, vocab_start: int, products: int = 1) -> dict[str, Any]:
    """Arguments that the kernels over a head share."""
    rows, width = head.hidden.shape
    sizes = config(rows, head.hidden.dtype, products)
    skew = vocab_start & 3
    return {
        "N": rows,
        "V": head.weight.shape[0],
        "H": width,
        "softcap": head.softcap,
        "group_start": (vocab_start >> 2) & 0xFFFFFFFF,
        "SKEW": skew,
        "EVEN_K": width % sizes.BK == 0,
        **tile_options(sizes, head.hidden.dtype, *target()),
    }


def split_count(vocab: int, vocab_start: int) -> int:
    """Splits of a vocabulary whose first token has this global id."""
    return triton.cdiv(vocab + (vocab_start & 3), SPLIT)


def noise_arguments(
    head: Head, seed: torch.Tensor, row_ids: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Seed and row identities where and how the kernels read them."""
    return seed.to(head.hidden.device, non_blocking=True), None if row_ids is None else row_ids.contiguous()


@triton.jit
def nan_max(a, b):
    """Maximum in which NaN wins: it is how a bad row is known."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_max(b_x):
    """Maximum `[BM]` of a tile's rows, NaN if any is."""
    return tl.reduce(b_x, 1, nan_max)


@triton.jit
def product(
    p_h, s_hk, weight, s_wv, s_wk, H, o_n, o_v,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """`hidden[o_n] @ weight[o_v].T` in float32; p_h points to the rows of hidden."""
    o_k = tl.arange(0, BK)
    p_a = p_h[:, None] + o_k[None, :] * s_hk
    p_b = weight + o_v.to(tl.int64)[:, None] * s_wv + o_k[None, :] * s_wk
    b_acc = tl.zeros((BM, BN), tl.float32)
    for i_k in range(0, tl.cdiv(H, BK)):
        if EVEN_K:
            b_a = tl.load(p_a)
            b_b = tl.load(p_b)
        else:
            m_k = (i_k * BK + o_k < H)[None, :]
            b_a = tl.load(p_a, mask=m_k, other=0.0)
            b_b = tl.load(p_b, mask=m_k, other=0.0)
        if INTERPRETED:  # NumPy has no bfloat16
            b_a, b_b = b_a.to(tl.float32), b_b.to(tl.float32)
        b_acc = tl.dot(b_a, tl.trans(b_b), b_acc, input_precision="ieee")
        p_a += BK * s_hk
        p_b += BK * s_wk
    return b_acc


@triton.jit
def columns(BN: tl.constexpr, PERMUTED: tl.constexpr):
    """The token that each column of a tile holds."""
    o = tl.arange(0, BN)
    if PERMUTED:
        half = o % (BN // 2)
        o = half % 8 // 2 * (BN // 4) + half // 8 * 4 + o // (BN // 2) * 2 + o % 2
    return o


@triton.jit
def quarters(b_acc, BM: tl.constexpr, BN: tl.constexpr, PERMUTED: tl.constexpr):
    """A tile as four `[BM, BN // 4]`, one for each token of a group."""
    if PERMUTED:
        b_acc = tl.permute(tl.reshape(b_acc, [BM, 2, BN // 16, 4, 2]), [0, 3, 2, 1, 4])
    even, odd = tl.split(tl.reshape(b_acc, [BM, BN // 4, 2, 2]))
    b_0, b_2 = tl.split(even)
    b_1, b_3 = tl.split(odd)
    return b_0, b_1, b_2, b_3


@triton.jit
def finish(b_l, bias, softcap, o_v, V, EDGE: tl.constexpr):
    """Logits of a quarter whose tokens are o_v `[BN // 4]`; with EDGE, tokens that do not exist get -inf."""
    m_v = (o_v >= 0) & (o_v < V)
    if bias is not None:
        if EDGE:
            b_l += tl.load(bias + o_v, mask=m_v, other=0.0)[None, :]
        else:
            b_l += tl.load(bias + o_v)[None, :]
    if softcap is not None:
        # tanh; what cancels near zero is a rounding error of the cap, no more than a logit's own.
        b_capped = softcap - 2.0 * softcap / (1.0 + tl.exp2(b_l * (2.0 * LOG2E / softcap)))
        b_l = tl.where(b_l == -float("inf"), b_l, b_capped)  # a masked logit stays masked
    if EDGE:
        b_l = tl.where(m_v[None, :], b_l, float("-inf"))
    return b_l


@triton.jit
def logits(
    p_h, s_hk, weight, s_wv, s_wk, bias, softcap, H, V, first, o_n,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, PERMUTED: tl.constexpr,
):  # fmt: skip
    """Quarters of the logits of tokens `first .. first + BN - 1`, -inf where there is no such token."""
    o_v = tl.minimum(tl.maximum(first + columns(BN, PERMUTED), 0), V - 1)
    b_acc = product(p_h, s_hk, weight, s_wv, s_wk, H, o_n, o_v, BM, BN, BK, EVEN_K)
    b_0, b_1, b_2, b_3 = quarters(b_acc, BM, BN, PERMUTED)
    o_g = first + 4 * tl.arange(0, BN // 4)
    if (first < 0) | (first + BN > V):
        b_0 = finish(b_0, bias, softcap, o_g, V, True)
        b_1 = finish(b_1, bias, softcap, o_g + 1, V, True)
        b_2 = finish(b_2, bias, softcap, o_g + 2, V, True)
        b_3 = finish(b_3, bias, softcap, o_g + 3, V, True)
    else:
        b_0 = finish(b_0, bias, softcap, o_g, V, False)
        b_1 = finish(b_1, bias, softcap, o_g + 1, V, False)
        b_2 = finish(b_2, bias, softcap, o_g + 2, V, False)
        b_3 = finish(b_3, bias, softcap, o_g + 3, V, False)
    return b_0, b_1, b_2, b_3


@triton.jit
def weights(b_0, b_1, b_2, b_3, top, rate):
    """exp2((x - top) * rate) of quarters, top and rate `[BM]` (or rate a number)."""
    return (
        tl.exp2((b_0 - top[:, None]) * rate), tl.exp2((b_1 - top[:, None]) * rate),
        tl.exp2((b_2 - top[:, None]) * rate), tl.exp2((b_3 - top[:, None]) * rate),
    )  # fmt: skip


@triton.jit
def beside(x, b_y, TARGET: tl.constexpr):
    """x, laid out over the threads as b_y is and computed after it.

    Otherwise words that meet no logit (their minimum, say) would be drawn a second time in a layout of their own, and
    the others before the product, whose registers they would take.
    """
    x, b_y = tl.broadcast(x, b_y)
    if TARGET == "cuda":
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", [x, b_y], dtype=x.dtype, is_pure=True, pack=1)
    elif TARGET == "hip":
        x = tl.inline_asm_elementwise("v_mov_b32 $0, $1", "=v,v,v", [x, b_y], dtype=x.dtype, is_pure=True, pack=1)
    return x


@triton.jit
def hurdle(w, threshold):
    """What a weight must exceed: its word's uniform number times the threshold, eps * bound / 2^32."""
    return tl.mul(w, 0x9E3779B1, sanitize_overflow=False).to(tl.float32) * threshold[:, None]


@triton.jit
def put(p_slots, position, capacity, b_e, b_h, b_x, o_v, TARGET: tl.constexpr):
    """Write those of a quarter whose weight e exceeds the hurdle h: the score's bits above, the token below."""
    if TARGET == "cuda":
        # Triton's store would first move everything to another layout through shared memory.
        tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            .reg .b64 a;
            setp.gt.f32 p, $4, $5;
            setp.lt.and.s32 p, $2, $3, p;
            mad.wide.s32 a, $2, 8, $1;
            @p st.global.v2.b32 [a], {$7, $6};
            mov.b32 $0, 0;
            }""",
            "=r,l,r,r,f,f,r,r",
            [p_slots.to(tl.int64)[:, None], position, capacity, b_e, b_h, b_x.to(tl.int32, bitcast=True), o_v[None, :]],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        packed = (b_x.to(tl.int32, bitcast=True).to(tl.int64) << 32) | o_v[None, :].to(tl.int64)
        tl.store(p_slots[:, None] + position, packed, mask=(b_e > b_h) & (position < capacity))


@triton.jit
def collect(
    p_slots, count, capacity, threshold, w_0, w_1, w_2, w_3, e_0, e_1, e_2, e_3, x_0, x_1, x_2, x_3, o_g,
    TARGET: tl.constexpr,
):  # fmt: skip
    """Append a tile's candidates (words w, weights e, scores x) to each row's slots in token order; the new counts."""
    h_0, h_1, h_2, h_3 = hurdle(w_0, threshold), hurdle(w_1, threshold), hurdle(w_2, threshold), hurdle(w_3, threshold)
    n_0 = (e_0 > h_0).to(tl.int32)
    n_01 = n_0 + (e_1 > h_1).to(tl.int32)
    n_012 = n_01 + (e_2 > h_2).to(tl.int32)
    n = n_012 + (e_3 > h_3).to(tl.int32)
    position = count[:, None] + tl.cumsum(n, 1) - n
    put(p_slots, position, capacity, e_0, h_0, x_0, o_g, TARGET)
    put(p_slots, position + n_0, capacity, e_1, h_1, x_1, o_g + 1, TARGET)
    put(p_slots, position + n_01, capacity, e_2, h_2, x_2, o_g + 2, TARGET)
    put(p_slots, position + n_012, capacity, e_3, h_3, x_3, o_g + 3, TARGET)
    return count + tl.sum(n, 1)
