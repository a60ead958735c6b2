"""Rows of given logits `[A, V, B]` of any strides, several to a program: what their kernels and launchers agree on.

Row `a * B + b` is `logits[a, :, b]`. A tile is BM rows times GROUPS groups of four tokens that share a Philox call. The four
tokens of a group are blocks of their own, `[BM, GROUPS]` each and called slots, so a group's noise never leaves its thread.
A vocabulary of three tokens or fewer has as many slots as tokens. Triton lays a block out along the dimension in which
addresses follow one another. So neighbouring threads take the tokens of a row where those are neighbours in memory, and
neighbouring rows where V is not the last dimension.

A row that fits is one tile: it is read once, and written from registers. A longer one is cut into splits of STEPS tiles. A
first kernel leaves each split's share, `[N, SPLITS]`, and a second reads the row again. These sizes depend on the
vocabulary, the dtype and the strides, never on the number of rows.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl

from grade_kernels.backends.native import contiguous
from grade_kernels.backends.records import Rows
from grade_kernels.backends.triton.philox import (
    DOMAIN_GUMBEL,
    DOMAIN_REFINE,
    REFINE_BELOW,
    load_key,
    philox,
    scaled_noise,
    split_row,
)
from grade_kernels.backends.triton.scores import score
from grade_kernels.backends.triton.sizes import TritonSizes
from grade_kernels.backends.triton.strips import TRITON_DTYPE, round_to
from grade_kernels.backends.triton.targets import Target, compiler_options, current_target
from grade_kernels.dtypes import compute_dtype
from grade_kernels.noise import seed_on

# What neighbours in a tensor's memory are.
NOTHING = tl.constexpr(0)
TOKENS = tl.constexpr(1)  # tokens of a row
ROWS = tl.constexpr(2)  # one token in neighbouring rows

WRITTEN = ("s_outa", "s_outv", "s_outb", "NEAR_OUT", "UNIT_OUT")  # options of the kernels that write `out`


class RowTile(NamedTuple):
    """A tile of rows.

    Attributes:
        rows: of a tile, BM.
        groups: of four tokens.
        steps: tiles of a split.
        splits: of a row; 0 if a row is one tile.
    """

    rows: int
    groups: int
    steps: int
    splits: int

    def warps(self, warp_size: int) -> int:
        """Warps of a program: four groups in a thread, so that its loads overlap."""
        return min(16, max(1, self.rows * self.groups // (4 * warp_size)))


def row_tile(width: int, across: bool, dtype: torch.dtype, sizes: TritonSizes) -> RowTile:
    """The tile for rows of `width` columns; across: neighbours in memory are of one token in neighbouring rows."""
    share = 2 if dtype == torch.float64 else 1  # of the registers
    groups = triton.next_power_of_2(triton.cdiv(width, 4))
    # With fewer rows a sector of 32 bytes would be read by several programs.
    least = max(8, 32 // dtype.itemsize) if across else 1
    step = sizes.tile_groups // share
    if 4 * groups * least * share <= sizes.tile_tokens:
        return RowTile(max(least, step // groups), groups, 1, 0)
    rows = 2 * least if across else 1
    # Rows that are read together fill a device sooner.
    split = sizes.row_split // 4 if across else sizes.row_split
    groups = step // rows
    steps = max(1, split // (4 * groups))
    return RowTile(rows, groups, steps, triton.cdiv(width, 4 * groups * steps))


class View(NamedTuple):
    """The rows of `[A, V, B]` tensors, as kernels count them.

    FLAT: all rows of each tensor lie at one stride, and are counted along A. Else tiles are BA by BB rows.
    """

    A: int
    B: int
    FLAT: bool

    @staticmethod
    def of(*tensors: torch.Tensor) -> View:
        """The view that serves tensors of one shape."""
        a, _, b = tensors[0].shape
        flat = a == 1 or b == 1 or all(t.stride(0) == b * t.stride(2) for t in tensors)
        return View(a * b, 1, True) if flat else View(a, b, False)

    def strides(self, x: torch.Tensor) -> tuple[int, int, int]:
        """Along A, V and B."""
        along_a, along_v, along_b = x.stride()
        if self.FLAT:
            return (along_a if x.shape[2] == 1 else along_b), along_v, 0
        return along_a, along_v, along_b

    def near(self, x: torch.Tensor) -> int:
        """What neighbours in memory are: NOTHING, TOKENS or ROWS."""
        along_a, along_v, along_b = self.strides(x)
        if along_v == 1 and x.shape[1] > 1:
            return TOKENS.value
        # One row alone is taken as it would be with others beside it.
        beside = 1 if self.A * self.B == 1 else along_a if self.FLAT else along_b
        return ROWS.value if beside == 1 else NOTHING.value

    def unit(self, x: torch.Tensor) -> int:
        """Neighbours in memory, up to 16 bytes of them, that lie in one aligned word wherever they begin."""
        along_a, along_v, along_b = self.strides(x)
        near = self.near(x)
        if near == NOTHING.value or x.data_ptr() % 16:
            return 1
        # Words may begin at every row, or at every token of a row.
        others = (along_a, along_b) if near == TOKENS.value else (along_v, 0 if self.FLAT else along_a)
        return math.gcd(16 // x.element_size(), *others)


def way(sizes: TritonSizes, vocab_start: int, *tensors: torch.Tensor) -> Literal["tile", "tiles", "strips"]:
    """How rows are taken: as one tile, as several, or as the kernels over strips read them best.

    Those read long rows whose tokens are neighbours in memory, one row to a program.
    """
    view, logits = View.of(*tensors), tensors[0]
    across = view.near(logits) == ROWS.value
    if row_tile(logits.shape[1] + (vocab_start & 3), across, logits.dtype, sizes).splits == 0:
        return "tile"
    plain = view.FLAT and all(view.near(t) == TOKENS.value for t in tensors)
    return "strips" if plain else "tiles"


def tile_options(sizes: TritonSizes, rows: Rows, **others: torch.Tensor) -> tuple[dict[str, Any], tuple[int], RowTile]:
    """Arguments that all kernels over tiles of rows share, their grid, and their tile.

    Other tensors are called as the kernels call them, and the logits l. A tensor x has the strides s_xa, s_xv and s_xb.
    NEAR_X says what its neighbours are, and UNIT_X divides its strides but for that of neighbours.
    """
    logits, tau, noise = rows
    options, programs, tile = tile_constants(sizes, current_target(), noise.vocab_start, l=logits, **others)
    options |= {
        "logits": logits, "tau": tau, "s_tau": tau.stride(0), "seed": seed_on(noise.seed, logits.device),
        "row_ids": contiguous(noise.row_ids),
    }  # fmt: skip
    return options, (programs,), tile


def tile_constants(
    sizes: TritonSizes, target: Target, vocab_start: int, **tensors: torch.Tensor
) -> tuple[dict[str, Any], int, RowTile]:
    """Those of the arguments that are no tensors, the number of programs, and their tile."""
    logits, view = tensors["l"], View.of(*tensors.values())
    vocab, skew = logits.shape[1], vocab_start & 3
    tile = row_tile(vocab + skew, view.near(logits) == ROWS.value, logits.dtype, sizes)
    slots = min(4, vocab + skew)
    along_b = 1 if view.FLAT else min(tile.rows, triton.next_power_of_2(view.B))
    along_a = tile.rows // along_b
    options: dict[str, Any] = {
        **view._asdict(), "V": vocab, "group_start": (vocab_start >> 2) & 0xFFFFFFFF,
        "BA": along_a, "BB": along_b, "RUN": math.gcd(4, view.A if view.FLAT else view.B), "GROUPS": tile.groups,
        "SLOTS": slots, "SKEW": skew,
        "EVEN": skew == 0 and vocab % (slots * tile.groups) == 0,
        "DTYPE": TRITON_DTYPE[compute_dtype(logits.dtype)], "FAST": target.backend == "cuda",
        **tile_compiler_options(tile, target),
    }  # fmt: skip
    for name, x in tensors.items():
        options |= zip((f"s_{name}a", f"s_{name}v", f"s_{name}b"), view.strides(x), strict=True)
        options |= {f"NEAR_{name.upper()}": view.near(x), f"UNIT_{name.upper()}": view.unit(x)}
    blocks = triton.cdiv(view.A, along_a) * triton.cdiv(view.B, along_b)
    return options, blocks * max(1, tile.splits), tile


def tile_compiler_options(tile: RowTile, target: Target) -> dict[str, Any]:
    """Warps, and compiler options, of kernels over tiles."""
    warps = tile.warps(target.warp_size)
    options = {"num_warps": warps, **compiler_options(target.backend)}
    if target.backend == "cuda" and target.capability < 90 and warps >= 8:
        # With more registers, as Ampere's code would take, one such program would fill a multiprocessor. It could load or
        # compute, not both.
        options["maxnreg"] = 128
    return options


@triton.jit
def _multiple(count, unit: tl.constexpr):
    """The same number, which is a multiple of `unit`, so that the compiler sees that it is one."""
    return count // unit * unit


@triton.jit
def locate(i_p, A, B, FLAT: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr, RUN: tl.constexpr):
    """Of the rows `[BM]` of a tile the numbers, the places along A and B, and which of them exist.

    RUN: of rows that follow one another, all or none exist. So they may be read as one word.
    """
    o_r = tl.arange(0, BA * BB)
    if FLAT:
        o_n = i_p.to(tl.int64) * (BA * BB) + o_r
        o_a = o_n
        o_b = o_n
        m_n = o_n < _multiple(A, RUN)
    else:
        blocks = tl.cdiv(B, BB)
        o_a = (i_p // blocks).to(tl.int64) * BA + o_r // BB
        o_b = (i_p % blocks).to(tl.int64) * BB + o_r % BB
        o_n = o_a * B + o_b
        m_n = (o_a < A) & (o_b < _multiple(B, RUN))
    return o_n, o_a, o_b, m_n


@triton.jit
def row_offsets(o_a, o_b, s_a, s_b, FLAT: tl.constexpr, NEAR: tl.constexpr, UNIT: tl.constexpr):
    """Where rows `[BM]` of a tensor begin."""
    if FLAT:
        if NEAR == ROWS:
            o_row = o_a
        else:
            o_row = o_a * _multiple(s_a, UNIT)
    else:
        if NEAR == ROWS:
            o_row = o_a * _multiple(s_a, UNIT) + o_b
        else:
            o_row = o_a * _multiple(s_a, UNIT) + o_b * _multiple(s_b, UNIT)
    return o_row


@triton.jit
def row_streams(seed, row_ids, o_n, m_n):
    """What the words of rows are drawn from: the rows' counter words `[BM, 1]` and the key."""
    k0, k1 = load_key(seed)
    if row_ids is None:
        row_lo, row_hi = split_row(o_n)
    else:
        row_lo, row_hi = split_row(tl.load(row_ids + o_n, mask=m_n, other=0))
    return row_lo[:, None], row_hi[:, None], k0, k1


@triton.jit
def row_taus(tau, o_n, s_tau, m_n):
    """Temperatures of rows `[BM]`."""
    return tl.load(tau + o_n * s_tau, mask=m_n, other=1.0)


@triton.jit
def slot_tokens(first, i_j: tl.constexpr, GROUPS: tl.constexpr, SKEW: tl.constexpr):
    """Tokens `[1, GROUPS]` of one slot, in a tile that begins at token `first - SKEW`."""
    return (first + 4 * tl.arange(0, GROUPS) + (i_j - SKEW))[None, :]


@triton.jit
def _exists(m_n, o_v, V, SKEW: tl.constexpr, EVEN: tl.constexpr):
    """Which elements there are; in an even vocabulary all of the rows that there are."""
    m = m_n[:, None]
    if not EVEN:
        m = m & (o_v < V)
        if SKEW:
            m = m & (o_v >= 0)
    return m


@triton.jit
def _apart(p_x, o_row, o_v, s_v, NEAR: tl.constexpr, UNIT: tl.constexpr):
    """Pointers `[BM, GROUPS]` to one slot."""
    if NEAR == ROWS:
        s_v = _multiple(s_v, UNIT)
    return p_x + (o_row[:, None] + o_v.to(tl.int64) * s_v)


@triton.jit
def load_slots(
    p_x, o_row, s_v, first, V, m_n, OTHER: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr, SKEW: tl.constexpr,
    EVEN: tl.constexpr, NEAR: tl.constexpr, UNIT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The slots of a tile in the compute dtype, OTHER where there is no such element."""
    BM: tl.constexpr = o_row.shape[0]
    if NEAR == TOKENS and SKEW == 0 and (SLOTS == 2 or SLOTS == 4) and UNIT >= SLOTS:
        # A group is one word.
        o_v = (first + tl.arange(0, SLOTS * GROUPS))[None, :]
        m = _exists(m_n, o_v, V, SKEW, EVEN)
        b_x = tl.load(p_x + (o_row[:, None] + o_v), mask=m, other=OTHER).to(DTYPE)  # [BM, SLOTS * GROUPS]
        if SLOTS == 4:
            b_even, b_odd = tl.split(tl.reshape(b_x, [BM, GROUPS, 2, 2]))
            b_0, b_2 = tl.split(b_even)
            b_1, b_3 = tl.split(b_odd)
            slots = (b_0, b_1, b_2, b_3)
        else:
            b_0, b_1 = tl.split(tl.reshape(b_x, [BM, GROUPS, 2]))
            slots = (b_0, b_1)
    else:
        slots = ()
        for i_j in tl.static_range(SLOTS):
            o_v = slot_tokens(first, i_j, GROUPS, SKEW)
            m = _exists(m_n, o_v, V, SKEW, EVEN)
            b_x = tl.load(_apart(p_x, o_row, o_v, s_v, NEAR, UNIT), mask=m, other=OTHER)  # [BM, GROUPS]
            slots = slots + (b_x.to(DTYPE),)
    return slots


@triton.jit
def _joined(slots, SLOTS: tl.constexpr):
    """The slots side by side; three of them as four, of which the last is none."""
    if SLOTS == 2:
        b_x = tl.join(slots[0], slots[1])
    else:
        b_x = tl.join(tl.join(slots[0], slots[2]), tl.join(slots[1], slots[SLOTS - 1]))
    return b_x


@triton.jit
def store_slots(
    p_x, o_row, s_v, first, V, m_n, slots, GROUPS: tl.constexpr, SLOTS: tl.constexpr, SKEW: tl.constexpr,
    EVEN: tl.constexpr, NEAR: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Write the slots of a tile, in the tensor's dtype."""
    BM: tl.constexpr = o_row.shape[0]
    b = ()
    for i_j in tl.static_range(SLOTS):
        b = b + (round_to(tl.broadcast_to(slots[i_j], [BM, GROUPS]), p_x.dtype.element_ty),)
    if NEAR == TOKENS and SLOTS > 1:
        # Written apart, each word would fill a part of a sector, and a cache would see every sector four times.
        WIDTH: tl.constexpr = (2 if SLOTS == 2 else 4) * GROUPS
        b_x = tl.reshape(_joined(b, SLOTS), [BM, WIDTH])
        o_v = (first + tl.arange(0, WIDTH) - SKEW)[None, :]
        tl.store(p_x + (o_row[:, None] + o_v), b_x, mask=_exists(m_n, o_v, V, SKEW, EVEN and SLOTS != 3))
    else:
        for i_j in tl.static_range(SLOTS):
            o_v = slot_tokens(first, i_j, GROUPS, SKEW)
            tl.store(_apart(p_x, o_row, o_v, s_v, NEAR, UNIT), b[i_j], mask=_exists(m_n, o_v, V, SKEW, EVEN))


@triton.jit
def _slot_noise(b_group, stream, SLOTS: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr, REFINE: tl.constexpr):
    """Scaled noise of the slots, and the least word of each group."""
    row_lo, row_hi, k0, k1 = stream
    w = philox(b_group, row_lo, row_hi, tl.full((), DOMAIN_GUMBEL, tl.uint32), k0, k1, FAST)
    fine = w
    if REFINE:
        fine = philox(b_group, row_lo, row_hi, tl.full((), DOMAIN_REFINE, tl.uint32), k0, k1, FAST, RARE=True)
    b_least = w[0]
    b_n = ()
    for i_j in tl.static_range(SLOTS):
        b_least = tl.minimum(b_least, w[i_j])
        b_n = b_n + (scaled_noise(w[i_j], fine[i_j], DTYPE, FAST, REFINE),)
    return b_n, b_least


@triton.jit
def score_slots(
    b_l, first, group_start, stream, GROUPS: tl.constexpr, SLOTS: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """Scores l + g of the slots `b_l`, but for the shift that all noise shares (SHIFT)."""
    b_group = (group_start.to(tl.uint32) + (first // 4 + tl.arange(0, GROUPS)).to(tl.uint32))[None, :]
    b_n, b_least = _slot_noise(b_group, stream, SLOTS, DTYPE, FAST, REFINE=False)
    if tl.min(tl.min(b_least.to(tl.int64), 1), 0) < REFINE_BELOW:
        # One tile in eight thousand holds such a word. Its noise is made again; the others pay one minimum.
        b_n, b_least = _slot_noise(b_group, stream, SLOTS, DTYPE, FAST, REFINE=True)
    b_s = ()
    for i_j in tl.static_range(SLOTS):
        b_s = b_s + (score(b_n[i_j], b_l[i_j]),)
    return b_s
