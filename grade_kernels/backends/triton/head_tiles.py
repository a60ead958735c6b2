"""Tiles of a head's logits: the matrix product, and what the kernels that consume it do with a tile.

A program owns BM hidden rows and a split of the vocabulary, which it takes in tiles of BN (and BN2) columns. Tensor cores
leave a tile as `[BM, BN]` in registers, where THREADS threads share a row. The tile is taken apart into *pieces*. A piece
holds one group of four tokens for each of these threads, as four blocks `[BM, THREADS]`: the first tokens of all groups,
the second, and so on. The four tokens of a Philox call then lie in one thread, so words meet logits without any exchange.

A thread keeps what it learns of its tokens to itself until the end of the split. So pieces pass one after the other and
take few registers.

NVIDIA's accumulators give a thread pairs of neighbouring columns. Four tokens of a group would lie in two threads. So there
the columns are permuted: rows of the head are loaded in an order that makes a thread's two pairs four neighbouring tokens.

Sizes do not depend on how large a device is. Of the batch they depend only on whether it is more than a tile's rows. In
either case splits are the same and a thread meets a row's groups in the same order. So a row's result is the same in every
batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from grade_kernels.backends.native import contiguous
from grade_kernels.backends.records import Head, Noise
from grade_kernels.backends.triton.head_ptx import COLLECT, COLLECT_OPERANDS
from grade_kernels.backends.triton.philox import LOG2E, split_row
from grade_kernels.backends.triton.scores import weighted_sum
from grade_kernels.backends.triton.sizes import HeadTile, TritonSizes
from grade_kernels.backends.triton.targets import INTERPRETED, TRITON, Target, compiler_options, current_target
from grade_kernels.noise import seed_on

# Stands for a maximum of nothing, in units of log2. With -inf, inf - inf would be NaN. Much lower is no good either: weights
# are exp2 of differences from a maximum, and float32 numbers near -1e8 are already 8 apart.
FLOOR = tl.constexpr(-1e8)
NOWHERE = tl.constexpr(0x7FFFFFFF)


def many_rows(heads: tuple[Head, ...], sizes: TritonSizes) -> bool:
    """Whether there is more than one tile of rows, and no bias or softcap: they take registers that large tiles lack."""
    return heads[0].hidden.shape[0] > sizes.tiles[1].BM and all(h.bias is None and h.softcap is None for h in heads)


def tile_options(tile: HeadTile, dtype: torch.dtype, target: Target, head_split: int) -> dict[str, Any]:
    """Arguments that describe tiles, and compiler options."""
    # In the accumulators of tensor cores up to Hopper's, and of the smaller Blackwells', four threads of a row have pairs of
    # columns. Data centre Blackwell's (10.x and 11.x) give a thread a row. AMD's give two threads of a row four neighbouring
    # columns each.
    hip = target.backend == "hip"
    permuted = dtype != torch.float32 and not hip and not 100 <= target.capability < 120
    if dtype == torch.float32:
        threads = tile.BN // 4
    else:
        threads = 4 if permuted else 2 if hip else 1
    options = compiler_options(target.backend)
    if target.backend == "cuda" and not permuted:
        options["maxnreg"] = 248  # else ptxas makes room for another program, and spills for it
    return {
        **tile._asdict(),
        "TILES": head_split // tile.columns,
        "THREADS": threads,
        "PERMUTED": permuted,
        "TARGET": target.backend,
        **options,
    }


def head_options(sizes: TritonSizes, vocab_start: int, *heads: Head) -> dict[str, Any]:
    """Arguments that the kernels over a head, or over a head and a reference's, share."""
    head = heads[0]
    rows, width = head.hidden.shape
    target = current_target()
    tile = sizes.head_tile(head.hidden.dtype, len(heads), target.capability, many_rows(heads, sizes), TRITON)
    return {
        "hidden": head.hidden,
        "s_hn": head.hidden.stride(0),
        "s_hk": head.hidden.stride(1),
        "weight": head.weight,
        "s_wv": head.weight.stride(0),
        "s_wk": head.weight.stride(1),
        "bias": head.bias,
        "softcap": head.softcap,
        "N": rows,
        "V": head.weight.shape[0],
        "H": width,
        "group_start": (vocab_start >> 2) & 0xFFFFFFFF,
        "SKEW": vocab_start & 3,
        "EVEN_K": is_even(width, tile.BK),
        **tile_options(tile, head.hidden.dtype, target, sizes.head_split),
    }


def is_even(width: int, step: int) -> bool:
    """Whether a product of this width takes whole steps. There is always one step; for no width it is masked."""
    return width > 0 and width % step == 0


def split_count(vocab: int, vocab_start: int, head_split: int) -> int:
    """Splits of a vocabulary whose first token has this global id."""
    return triton.cdiv(vocab + (vocab_start & 3), head_split)


def empty_aligned(count: int, *shape: int, device: torch.device) -> list[torch.Tensor]:
    """Tensors of float32, each aligned to 16 bytes whatever its shape.

    Parts of one tensor would not be, and Triton compiles a kernel again for arguments that are not.
    """
    return [torch.empty(shape, dtype=torch.float32, device=device) for _ in range(count)]


class RowNoise(NamedTuple):
    """The noise of a batch of rows as kernels read it. Without row_ids their identities count on from first_row."""

    seed: torch.Tensor
    row_ids: torch.Tensor | None
    first_row: int
    vocab_start: int

    @staticmethod
    def of(noise: Noise, device: torch.device) -> RowNoise:
        """The noise of all rows, on their device."""
        return RowNoise(seed_on(noise.seed, device), contiguous(noise.row_ids), 0, noise.vocab_start)

    def batch(self, rows: slice) -> RowNoise:
        """The noise of some of the rows."""
        row_ids = None if self.row_ids is None else self.row_ids[rows]
        return self._replace(row_ids=row_ids, first_row=self.first_row + rows.start)

    def arguments(self) -> dict[str, Any]:
        """As kernels take it, but for vocab_start."""
        return {"seed": self.seed, "row_ids": self.row_ids, "first_row": self.first_row}


@triton.jit
def identities(row_ids, first_row, o_n):
    """The two counter words `[BM, 1]` of rows o_n."""
    if row_ids is None:
        # There are fewer than 2^32. That the other word is 0 is worth a register a row.
        row_lo = first_row.to(tl.uint32) + o_n.to(tl.uint32)
        return row_lo[:, None], tl.full((), 0, tl.uint32)
    else:
        row_lo, row_hi = split_row(tl.load(row_ids + o_n))
        return row_lo[:, None], row_hi[:, None]


@triton.jit
def nan_max(a, b):
    """Maximum in which NaN wins: a bad row is known by it."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_max(b_x):
    """Maximum `[BM]` of the rows of a block `[BM, _]`, NaN if any is."""
    return tl.reduce(b_x, 1, nan_max)


@triton.jit
def _factor(p_x, m_k, EVEN_K: tl.constexpr):
    """A step `[_, BK]` of a matrix, 0 beyond its width."""
    if EVEN_K:
        b_x = tl.load(p_x)
    else:
        b_x = tl.load(p_x, mask=m_k, other=0.0)
    return b_x.to(tl.float32) if INTERPRETED else b_x  # NumPy has no bfloat16


@triton.jit
def product(
    p_h, s_hk, weight, s_wv, s_wk, H, o_n, o_v,
    BM: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """`hidden[o_n] @ weight[o_v].T` in float32 for each of one or two o_v; p_h points to the rows of hidden."""
    o_k = tl.arange(0, BK)
    p_a = p_h[:, None] + o_k[None, :] * s_hk
    p_b = weight + o_v[0].to(tl.int64)[:, None] * s_wv + o_k[None, :] * s_wk
    b_acc = tl.zeros((BM, o_v[0].shape[0]), tl.float32)
    if len(o_v) == 2:
        p_b2 = weight + o_v[1].to(tl.int64)[:, None] * s_wv + o_k[None, :] * s_wk
        b_acc2 = tl.zeros((BM, o_v[1].shape[0]), tl.float32)
    # If the compiler did not know that there is a step, it would clear the accumulators twice.
    for i_k in range(0, tl.maximum(tl.cdiv(H, BK), 1)):
        m_k = (i_k * BK + o_k < H)[None, :]
        b_a, b_b = _factor(p_a, m_k, EVEN_K), _factor(p_b, m_k, EVEN_K)  # [BM, BK], [BN, BK]
        b_acc = tl.dot(b_a, tl.trans(b_b), b_acc, input_precision="ieee")
        p_a += BK * s_hk
        p_b += BK * s_wk
        if len(o_v) == 2:
            b_b2 = _factor(p_b2, m_k, EVEN_K)  # [BN2, BK]
            b_acc2 = tl.dot(b_a, tl.trans(b_b2), b_acc2, input_precision="ieee")
            p_b2 += BK * s_wk
    if len(o_v) == 2:
        return b_acc, b_acc2
    else:
        return (b_acc,)


@triton.jit
def columns(BN: tl.constexpr, THREADS: tl.constexpr, PERMUTED: tl.constexpr):
    """The token that each column of a tile holds, counted from the tile's first."""
    o_v = tl.arange(0, BN)
    if PERMUTED:
        # Column 2 THREADS h + 2 t + e of a piece is the e-th of the h-th pair of thread t: its token 4 t + 2 h + e.
        o_v = o_v // (4 * THREADS) * (4 * THREADS) + o_v // 2 % THREADS * 4 + o_v // (2 * THREADS) % 2 * 2 + o_v % 2
    return o_v


@triton.jit
def _halved(b_x, PIECES: tl.constexpr):
    """`[BM, THREADS, PIECES]` as PIECES blocks `[BM, THREADS]`."""
    if PIECES == 1:
        return (tl.reshape(b_x, [b_x.shape[0], b_x.shape[1]]),)
    else:
        b_x = tl.reshape(b_x, [b_x.shape[0], b_x.shape[1], 2, PIECES // 2])
        b_low, b_high = tl.split(tl.permute(b_x, [0, 1, 3, 2]))
        return _halved(b_low, PIECES // 2) + _halved(b_high, PIECES // 2)


@triton.jit
def pieces(b_acc, BM: tl.constexpr, BN: tl.constexpr, THREADS: tl.constexpr, PERMUTED: tl.constexpr):
    """A tile `[BM, BN]` in pieces of one group per thread and row, each as its four tokens `[BM, THREADS]`."""
    PIECES: tl.constexpr = BN // (4 * THREADS)
    if PERMUTED:
        b_acc = tl.permute(tl.reshape(b_acc, [BM, PIECES, 2, THREADS, 2]), [0, 3, 1, 2, 4])
    else:
        b_acc = tl.permute(tl.reshape(b_acc, [BM, PIECES, THREADS, 2, 2]), [0, 2, 1, 3, 4])
    b_even, b_odd = tl.split(b_acc)
    b_0, b_2 = tl.split(b_even)
    b_1, b_3 = tl.split(b_odd)
    b_0, b_1, b_2, b_3 = _halved(b_0, PIECES), _halved(b_1, PIECES), _halved(b_2, PIECES), _halved(b_3, PIECES)
    b_pieces = ()
    for i in tl.static_range(PIECES):
        b_pieces += (b_0[i], b_1[i], b_2[i], b_3[i])
    return b_pieces


@triton.jit
def softcapped(b_l, softcap):
    """softcap * tanh(l / softcap) of logits."""
    # tanh(y) = 1 - 2 / (1 + exp(2 y)). Its rounding error is one of the cap's. Near zero that is more than a logit's own, so
    # there a series takes its place.
    b_y = b_l * (1.0 / softcap)
    b_capped = softcap - 2.0 * softcap / (1.0 + tl.exp2(b_y * (2.0 * LOG2E)))
    b_y *= b_y
    b_capped = tl.where(b_y < 1e-3, tl.fma(b_l * b_y, -1 / 3, b_l), b_capped)
    return tl.where(b_l == -float("inf"), b_l, b_capped)  # a masked logit stays masked


@triton.jit
def logits(
    p_h, s_hk, weight, s_wv, s_wk, bias, softcap, H, V, first, o_n,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BN2: tl.constexpr, EVEN_K: tl.constexpr,
    THREADS: tl.constexpr, PERMUTED: tl.constexpr,
):  # fmt: skip
    """Logits of tokens `first .. first + BN + BN2 - 1` in `pieces`, -inf where there is no such token."""
    o_c = (first + columns(BN, THREADS, PERMUTED),)
    if BN2:
        o_c += (first + BN + columns(BN2, THREADS, PERMUTED),)
    o_v = ()
    for i in tl.static_range(len(o_c)):
        o_v += (tl.minimum(tl.maximum(o_c[i], 0), V - 1),)
    b_products = product(p_h, s_hk, weight, s_wv, s_wk, H, o_n, o_v, BM, BK, EVEN_K)
    b_pieces = ()
    for i in tl.static_range(len(b_products)):
        b_l = b_products[i]  # [BM, BN] or [BM, BN2]
        if bias is not None:
            b_l += tl.load(bias + o_v[i])[None, :]
        if softcap is not None:
            b_l = softcapped(b_l, softcap)
        if (first < 0) | (first + (BN + BN2) > V):
            b_l = tl.where(((o_c[i] >= 0) & (o_c[i] < V))[None, :], b_l, float("-inf"))
        b_pieces += pieces(b_l, BM, b_l.shape[1], THREADS, PERMUTED)
    return b_pieces


@triton.jit
def largest(b_x):
    """Maximum of blocks, NaN if any is."""
    b_max = b_x[0]
    for i in tl.static_range(1, len(b_x)):
        b_max = nan_max(b_max, b_x[i])
    return b_max


@triton.jit
def total_of(b_x):
    """Sum of blocks, in pairs."""
    if len(b_x) == 1:
        return b_x[0]
    else:
        return total_of(b_x[: len(b_x) // 2]) + total_of(b_x[len(b_x) // 2 :])


@triton.jit
def row_total(b_max, b_sum):
    """Maximum `[BM]`, in units of log2, and sum relative to it of rows, from those of their threads `[BM, THREADS]`."""
    r_max = tl.max(b_max, 1)
    return r_max, weighted_sum(b_sum, tl.exp2(b_max - r_max[:, None]), 1)


@triton.jit
def lower_bound(before_sum, o_n, m_n, eps, THREADS: tl.constexpr):
    """eps times what earlier launches know of the normaliser of rows o_n, `[BM, THREADS]`.

    Rows of a tile that do not exist are its last row once more. Each would write the last row's candidates again. No weight
    exceeds their bound, which is infinite.
    """
    r_sum = tl.load(before_sum + o_n, mask=m_n, other=float("inf"))  # [BM]
    return tl.broadcast_to((eps * r_sum)[:, None], r_sum.shape[0], THREADS)


@triton.jit
def distances(b_x, r_rate, b_top):
    """`x * rate - top` of blocks."""
    b_found = ()
    for i in tl.static_range(len(b_x)):
        b_found += (tl.fma(b_x[i], r_rate, -b_top),)
    return b_found


@triton.jit
def powers(b_x):
    """2 to the power of blocks."""
    b_found = ()
    for i in tl.static_range(len(b_x)):
        b_found += (tl.exp2(b_x[i]),)
    return b_found


@triton.jit
def in_layout_of(b_x, b_y, TARGET: tl.constexpr):
    """x, laid out over the threads as b_y is and computed after it.

    Words that meet no logit (the least of a group's, say) would otherwise be drawn a second time, in a layout of their own.
    The others would be drawn before the product, whose registers they would take.
    """
    b_x, b_y = tl.broadcast(b_x, b_y)
    if TARGET == "cuda":
        b_x = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r", [b_x, b_y], dtype=b_x.dtype, is_pure=True, pack=1
        )  # fmt: skip
    elif TARGET == "hip":
        b_x = tl.inline_asm_elementwise(
            "v_mov_b32 $0, $1", "=v,v,v", [b_x, b_y], dtype=b_x.dtype, is_pure=True, pack=1
        )  # fmt: skip
    return b_x


@triton.jit
def warp_scalar(x, TARGET: tl.constexpr):
    """A number that a warp keeps once. From sm_80 on.

    ptxas would give each thread a register for what comes from memory, though it is the same in all of them.
    """
    if TARGET == "cuda":
        x = tl.inline_asm_elementwise(
            "redux.sync.or.b32 $0, $1, 0xffffffff;", "=r,r", [x], dtype=x.dtype, is_pure=True, pack=1
        )
    return x


@triton.jit
def with_dependency(b_x, b_done, zero):
    """x, which can't be computed before the blocks in `done` are.

    ptxas would put off a group's statistics until something needs them, and registers would run out. So x is combined with
    `done & zero`. `zero` is always 0, which the compiler does not know.
    """
    for i in tl.static_range(len(b_done)):
        b_x |= (b_done[i].to(tl.int32, bitcast=True) & zero).to(tl.uint32, bitcast=True)
    return b_x


@triton.jit
def _put(p_slots, b_at, capacity, b_e, b_hurdle, b_x, o_v, TARGET: tl.constexpr):
    """Write those of a block whose weight e exceeds the hurdle: the score's bits above, the token below."""
    if TARGET == "cuda":
        # Triton's store would first move everything to another layout through shared memory.
        #   $0 out: nothing, but an output there must be
        #   $1 in: where the row's slots begin
        #   $2 in: the slot
        #   $3 in: how many slots there are
        #   $4 in: weight
        #   $5 in: hurdle
        #   $6 in: the score's bits
        #   $7 in: token
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
            [p_slots.to(tl.int64), b_at, capacity, b_e, b_hurdle, b_x.to(tl.int32, bitcast=True), o_v],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        b_packed = (b_x.to(tl.int32, bitcast=True).to(tl.int64) << 32) | o_v.to(tl.int64)
        tl.store(p_slots + b_at, b_packed, mask=(b_e > b_hurdle) & (b_at < capacity))


@triton.jit
def collect(
    slots, s_slots, o_n, b_count, capacity, b_threshold, b_w, b_e, b_x, o_v, THREADS: tl.constexpr, TARGET: tl.constexpr
):  # fmt: skip
    """Append a group's candidates (words w, weights e, scores x) to each row's slots in token order; the new counts."""
    if TARGET == "cuda" and THREADS <= 4:
        b_count = tl.inline_asm_elementwise(
            COLLECT[THREADS], COLLECT_OPERANDS,
            (b_count,) + b_e + b_w + b_x
            + (o_v, o_n.to(tl.int32)[:, None], slots.to(tl.int64), s_slots * 8, capacity, b_threshold),
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        b_hurdle = ()
        for i in tl.static_range(4):
            # What a weight must exceed: its word's uniform number times eps * bound / 2^32.
            b_hurdle += (tl.mul(b_w[i], 0x9E3779B1, sanitize_overflow=False).to(tl.float32) * b_threshold,)
        p_slots = slots + (o_n * s_slots)[:, None]
        b_number = tl.zeros_like(b_count)
        for i in tl.static_range(4):
            b_number += (b_e[i] > b_hurdle[i]).to(tl.int32)
        b_at = b_count + tl.cumsum(b_number, 1) - b_number
        for i in tl.static_range(4):
            _put(p_slots, b_at, capacity, b_e[i], b_hurdle[i], b_x[i], o_v + i, TARGET)
            b_at += (b_e[i] > b_hurdle[i]).to(tl.int32)
        b_count += tl.sum(b_number, 1)[:, None]
    return b_count
