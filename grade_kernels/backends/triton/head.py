"""Tiles of a head's logits: the matrix product, and what the kernels that consume it do with a tile.

A program owns BM hidden rows and a split of the vocabulary, SPLIT tokens, which it takes in tiles of BN. A tile leaves
the tensor cores as `[BM, BN]` in registers, a row in as many threads as THREADS says. It is taken apart into pieces
of one group of four tokens in each of these threads, as four tiles `[BM, THREADS]`, one for each token of a group: the
four tokens of a Philox call then lie in one thread, and words meet logits without any exchange. What a thread learns of
its tokens it keeps to itself until the end of the split, so that pieces pass one after the other and take few registers.
NVIDIA's accumulators give a thread pairs of neighbouring columns, so there the columns of the tile are permuted: rows of
the head are loaded in the order that makes two pairs four neighbouring tokens.

Sizes do not depend on the device's size, and of the batch only on whether it is more than a tile's rows. Splits are the same
in either case, and a thread meets a row's groups in the same order, so a row's result is the same in every batch.
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
from grade_kernels.backends.triton.tiles import INTERPRETED, target_options
from grade_kernels.noise import seed_on

SPLIT = 640  # tokens of a program
# A maximum of nothing, in units of log2. Finite, since inf - inf is NaN; and where float32 is no coarser than that a
# product of logit and rate and its rounded self differ by a few units, for weights are powers of that difference, too.
FLOOR = tl.constexpr(-1e8)
NOWHERE = tl.constexpr(0x7FFFFFFF)


class Config(NamedTuple):
    """Sizes that a kernel is compiled for.

    Attributes:
        BM, BN, BK: a tile's rows and columns, and a step of the width.
        MORE: columns beside BN, a product of their own with the same rows of hidden; both are powers of two.
        ORDERED: a group of tokens waits for the statistics of the one before, which large tiles' registers ask for.
    """

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int
    MORE: int = 0
    ORDERED: bool = False

    @property
    def columns(self) -> int:
        """All columns of a tile."""
        return self.BN + self.MORE

    def __str__(self) -> str:
        more = f"+{self.MORE}" if self.MORE else ""
        return f"{self.BM}x{self.BN}{more}x{self.BK}x{self.num_warps}x{self.num_stages}"


# Registers leave room for two programs on a multiprocessor: one's epilogue hides behind the other's product.
NARROW = Config(128, 64, 32, 4, 4)
PAIR = Config(128, 32, 32, 4, 4)  # two products per tile
WIDE = Config(64, 64, 16, 8, 2)  # float32 is multiplied in true float32, which no tensor core does
# By a compute capability's first figures, 0 outside NVIDIA, and products per tile. An AMD compute unit has 64 KiB for its
# programs, so that two stages are several programs. Where NVIDIA's warps multiply by themselves, Triton lays four of them
# one below the other over 32 columns, so that a row is in one of them, but two by two over 64. Ampere's addresses of another
# stage would be spilled.
SMALL = {
    (0, 1): Config(128, 64, 32, 4, 2),
    (8, 1): Config(128, 32, 32, 4, 3, MORE=32),
    (8, 2): Config(128, 32, 32, 4, 3),
    (12, 1): Config(128, 32, 32, 4, 4, MORE=32, ORDERED=True),
}
# The same for more rows than one tile has. The cache feeds small tiles more slowly than tensor cores multiply. Two thirds of
# Hopper's registers hold the product, so that one program fits. A thread of a row meets the same groups in the same order
# as in small ones.
LARGE = {
    (0, 2): Config(128, 64, 32, 4, 2),
    (8, 2): Config(128, 32, 32, 8, 3, MORE=32),
    (9, 1): Config(128, 256, 32, 8, 3, MORE=64, ORDERED=True),
    (9, 2): Config(128, 128, 32, 8, 3, ORDERED=True),
    (12, 2): Config(128, 32, 32, 8, 4, MORE=32),
}


def config(dtype: torch.dtype, products: int = 1, capability: int = 0, many: bool = False) -> Config:
    """Tile sizes for a dtype, a number of products per tile, a compute capability (0 outside NVIDIA), and `many_rows`."""
    if dtype == torch.float32:
        return WIDE
    key = capability // 10, products
    small = SMALL.get(key, NARROW if products == 1 else PAIR)
    return LARGE.get(key, small) if many else small


def many_rows(heads: tuple[Head, ...]) -> bool:
    """Whether there is more than one tile of rows, and nothing that takes registers which `LARGE` tiles have not."""
    return heads[0].hidden.shape[0] > NARROW.BM and all(h.bias is None and h.softcap is None for h in heads)


def target() -> tuple[str, int]:
    """Name of the Triton backend that kernels are launched on, and its compute capability (0 outside NVIDIA)."""
    if INTERPRETED:
        return "interpreter", 0
    active = triton.runtime.driver.active.get_current_target()
    return active.backend, active.arch if active.backend == "cuda" else 0


def tile_options(sizes: Config, dtype: torch.dtype, backend: str, capability: int) -> dict[str, Any]:
    """Arguments that describe tiles, and compiler options."""
    # Tensor cores up to Hopper's and those of the smaller Blackwells give four threads of a row pairs of columns; data
    # centre Blackwell's (10.x and 11.x) give a thread a row, and AMD's two threads four neighbouring columns.
    permuted = dtype != torch.float32 and backend != "hip" and not 100 <= capability < 120
    if dtype == torch.float32:
        threads = sizes.BN // 4
    else:
        threads = 4 if permuted else 2 if backend == "hip" else 1
    options = target_options(backend)
    if backend == "cuda" and not permuted:
        options["maxnreg"] = 248  # else ptxas makes room for another program, and spills for it
    return {
        **sizes._asdict(),
        "TILES": SPLIT // sizes.columns,
        "THREADS": threads,
        "PERMUTED": permuted,
        "TARGET": backend,
        **options,
    }


def head_options(vocab_start: int, *heads: Head) -> dict[str, Any]:
    """Arguments that the kernels over a head, or over a head and a reference's, share."""
    head = heads[0]
    rows, width = head.hidden.shape
    backend, capability = target()
    sizes = config(head.hidden.dtype, len(heads), capability, many_rows(heads))
    skew = vocab_start & 3
    return {
        "N": rows,
        "V": head.weight.shape[0],
        "H": width,
        "softcap": head.softcap,
        "group_start": (vocab_start >> 2) & 0xFFFFFFFF,
        "SKEW": skew,
        "EVEN_K": is_even(width, sizes.BK),
        **tile_options(sizes, head.hidden.dtype, backend, capability),
    }


def is_even(width: int, step: int) -> bool:
    """Whether a product of this width takes whole steps. There is always one, so that of no width is masked."""
    return width > 0 and width % step == 0


def split_count(vocab: int, vocab_start: int) -> int:
    """Splits of a vocabulary whose first token has this global id."""
    return triton.cdiv(vocab + (vocab_start & 3), SPLIT)


def empties(count: int, *shape: int, device: torch.device) -> list[torch.Tensor]:
    """Tensors of float32 that are aligned whatever their shape, as parts of one tensor are not: Triton compiles a kernel
    anew where other arguments are.
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
    """Maximum in which NaN wins: it is how a bad row is known."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_max(b_x):
    """Maximum `[BM]` of a tile's rows, NaN if any is."""
    return tl.reduce(b_x, 1, nan_max)


@triton.jit
def _factor(p, m_k, EVEN_K: tl.constexpr):
    """A step of a matrix, 0 beyond its width."""
    if EVEN_K:
        b = tl.load(p)
    else:
        b = tl.load(p, mask=m_k, other=0.0)
    return b.to(tl.float32) if INTERPRETED else b  # NumPy has no bfloat16


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
        p_more = weight + o_v[1].to(tl.int64)[:, None] * s_wv + o_k[None, :] * s_wk
        b_more = tl.zeros((BM, o_v[1].shape[0]), tl.float32)
    # At least one, known to the compiler: it would clear the accumulators twice.
    for i_k in range(0, tl.maximum(tl.cdiv(H, BK), 1)):
        m_k = (i_k * BK + o_k < H)[None, :]
        b_a, b_b = _factor(p_a, m_k, EVEN_K), _factor(p_b, m_k, EVEN_K)
        b_acc = tl.dot(b_a, tl.trans(b_b), b_acc, input_precision="ieee")
        p_a += BK * s_hk
        p_b += BK * s_wk
        if len(o_v) == 2:
            b_more = tl.dot(b_a, tl.trans(_factor(p_more, m_k, EVEN_K)), b_more, input_precision="ieee")
            p_more += BK * s_wk
    if len(o_v) == 2:
        return b_acc, b_more
    else:
        return (b_acc,)


@triton.jit
def columns(BN: tl.constexpr, THREADS: tl.constexpr, PERMUTED: tl.constexpr):
    """The token that each column of a tile holds."""
    o = tl.arange(0, BN)
    if PERMUTED:
        o = o // (4 * THREADS) * (4 * THREADS) + o // 2 % THREADS * 4 + o // (2 * THREADS) % 2 * 2 + o % 2
    return o


@triton.jit
def _halved(b_x, PIECES: tl.constexpr):
    """`[BM, T, PIECES]` as PIECES tiles `[BM, T]`."""
    if PIECES == 1:
        return (tl.reshape(b_x, [b_x.shape[0], b_x.shape[1]]),)
    else:
        b_x = tl.reshape(b_x, [b_x.shape[0], b_x.shape[1], 2, PIECES // 2])
        low, high = tl.split(tl.permute(b_x, [0, 1, 3, 2]))
        return _halved(low, PIECES // 2) + _halved(high, PIECES // 2)


@triton.jit
def pieces(b_acc, BM: tl.constexpr, BN: tl.constexpr, THREADS: tl.constexpr, PERMUTED: tl.constexpr):
    """A tile in pieces of one group per thread and row, each as its four tokens `[BM, THREADS]`."""
    PIECES: tl.constexpr = BN // (4 * THREADS)
    if PERMUTED:
        b_acc = tl.permute(tl.reshape(b_acc, [BM, PIECES, 2, THREADS, 2]), [0, 3, 1, 2, 4])
    else:
        b_acc = tl.permute(tl.reshape(b_acc, [BM, PIECES, THREADS, 2, 2]), [0, 2, 1, 3, 4])
    even, odd = tl.split(b_acc)
    b_0, b_2 = tl.split(even)
    b_1, b_3 = tl.split(odd)
    b_0, b_1, b_2, b_3 = _halved(b_0, PIECES), _halved(b_1, PIECES), _halved(b_2, PIECES), _halved(b_3, PIECES)
    tile = ()
    for i in tl.static_range(PIECES):
        tile += (b_0[i], b_1[i], b_2[i], b_3[i])
    return tile


@triton.jit
def logits(
    p_h, s_hk, weight, s_wv, s_wk, bias, softcap, H, V, first, o_n,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, MORE: tl.constexpr, EVEN_K: tl.constexpr,
    THREADS: tl.constexpr, PERMUTED: tl.constexpr,
):  # fmt: skip
    """Logits of tokens `first .. first + BN + MORE - 1` in `pieces`, -inf where there is no such token."""
    o_c = (first + columns(BN, THREADS, PERMUTED),)
    if MORE:
        o_c += (first + BN + columns(MORE, THREADS, PERMUTED),)
    o_v = ()
    for i in tl.static_range(len(o_c)):
        o_v += (tl.minimum(tl.maximum(o_c[i], 0), V - 1),)
    parts = product(p_h, s_hk, weight, s_wv, s_wk, H, o_n, o_v, BM, BK, EVEN_K)
    tile = ()
    for i in tl.static_range(len(parts)):
        b_l = parts[i]
        if bias is not None:
            b_l += tl.load(bias + o_v[i])[None, :]
        if softcap is not None:
            # tanh; what cancels is a rounding error of the cap, and near zero, where that is more than a logit's own, a
            # series.
            b_y = b_l * (1.0 / softcap)
            b_capped = softcap - 2.0 * softcap / (1.0 + tl.exp2(b_y * (2.0 * LOG2E)))
            b_y *= b_y
            b_capped = tl.where(b_y < 1e-3, tl.fma(b_l * b_y, -1 / 3, b_l), b_capped)
            b_l = tl.where(b_l == -float("inf"), b_l, b_capped)  # a masked logit stays masked
        if (first < 0) | (first + (BN + MORE) > V):
            b_l = tl.where(((o_c[i] >= 0) & (o_c[i] < V))[None, :], b_l, float("-inf"))
        tile += pieces(b_l, BM, b_l.shape[1], THREADS, PERMUTED)
    return tile


@triton.jit
def largest(x):
    """Maximum of tiles, NaN if any is."""
    m = x[0]
    for i in tl.static_range(1, len(x)):
        m = nan_max(m, x[i])
    return m


@triton.jit
def total_of(x):
    """Sum of tiles, in pairs."""
    if len(x) == 1:
        return x[0]
    else:
        return total_of(x[: len(x) // 2]) + total_of(x[len(x) // 2 :])


@triton.jit
def row_total(b_max, b_sum):
    """Maximum, in units of log2, and sum relative to it of rows from their threads'."""
    m_max = tl.max(b_max, 1)
    return m_max, tl.sum(b_sum * tl.exp2(b_max - m_max[:, None]), 1)


@triton.jit
def distances(x, rate, top):
    """`x * rate - top` of tiles."""
    found = ()
    for i in tl.static_range(len(x)):
        found += (tl.fma(x[i], rate, -top),)
    return found


@triton.jit
def powers(x):
    """2 to the power of tiles."""
    found = ()
    for i in tl.static_range(len(x)):
        found += (tl.exp2(x[i]),)
    return found


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
def uniform(x, TARGET: tl.constexpr):
    """A scalar that is kept once for a warp: ptxas takes what comes from memory for a thread's own. From sm_80 on."""
    if TARGET == "cuda":
        x = tl.inline_asm_elementwise(
            "redux.sync.or.b32 $0, $1, 0xffffffff;", "=r,r", [x], dtype=x.dtype, is_pure=True, pack=1
        )
    return x


@triton.jit
def after(x, done, zero):
    """x, computed after `done`, by a number that is always 0 but not to the compiler.

    ptxas likes to put off a group's statistics for as long as nothing needs them, until registers run out.
    """
    for i in tl.static_range(len(done)):
        x |= (done[i].to(tl.int32, bitcast=True) & zero).to(tl.uint32, bitcast=True)
    return x


@triton.jit
def _put(p_slots, position, capacity, b_e, b_h, b_x, o_v, TARGET: tl.constexpr):
    """Write those of a tile whose weight e exceeds the hurdle h: the score's bits above, the token below."""
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
            [p_slots.to(tl.int64), position, capacity, b_e, b_h, b_x.to(tl.int32, bitcast=True), o_v],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        packed = (b_x.to(tl.int32, bitcast=True).to(tl.int64) << 32) | o_v.to(tl.int64)
        tl.store(p_slots + position, packed, mask=(b_e > b_h) & (position < capacity))


@triton.jit
def collect(
    slots, s_slots, o_n, count, capacity, threshold, w, e, x, o_v, THREADS: tl.constexpr, TARGET: tl.constexpr
):  # fmt: skip
    """Append a group's candidates (words w, weights e, scores x) to each row's slots in token order; the new counts."""
    if TARGET == "cuda" and THREADS <= 4:
        count = tl.inline_asm_elementwise(
            COLLECT[THREADS], COLLECT_OPERANDS,
            (count,) + e + w + x
            + (o_v, o_n.to(tl.int32)[:, None], slots.to(tl.int64), s_slots * 8, capacity, threshold),
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        h = ()
        for i in tl.static_range(4):
            # What a weight must exceed: its word's uniform number times eps * bound / 2^32.
            h += (tl.mul(w[i], 0x9E3779B1, sanitize_overflow=False).to(tl.float32) * threshold,)
        p_slots = slots + (o_n * s_slots)[:, None]
        n = tl.zeros_like(count)
        for i in tl.static_range(4):
            n += (e[i] > h[i]).to(tl.int32)
        position = count + tl.cumsum(n, 1) - n
        for i in tl.static_range(4):
            _put(p_slots, position, capacity, e[i], h[i], x[i], o_v + i, TARGET)
            position += (e[i] > h[i]).to(tl.int32)
        count += tl.sum(n, 1)[:, None]
    return count
