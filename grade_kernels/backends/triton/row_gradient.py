"""`softmax_backward` of the rule `ste` over tiles of rows: the gradient of the logits, and of tau.

A row that is one tile takes one kernel: it is read once, and its noise drawn once. Of a longer row a first kernel leaves each
split's sums of w and w * dy, and a second reads the row again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grade_kernels.backends.records import Rows
from grade_kernels.backends.triton.philox import SHIFT
from grade_kernels.backends.triton.row_tiles import (
    WRITTEN,
    load_slots,
    locate,
    row_offsets,
    row_streams,
    row_taus,
    score_slots,
    store_slots,
    tile_options,
)
from grade_kernels.backends.triton.scores import rate_of
from grade_kernels.backends.triton.sizes import TritonSizes
from grade_kernels.backends.triton.strips import sum_splits
from grade_kernels.backends.triton.targets import launching


@triton.jit
def _load_both(
    logits, dy, o_l, o_dy, s_lv, s_dyv, first, V, m_n, GROUPS: tl.constexpr, SLOTS: tl.constexpr, SKEW: tl.constexpr,
    EVEN: tl.constexpr, DTYPE: tl.constexpr, NEAR_L: tl.constexpr, UNIT_L: tl.constexpr, NEAR_DY: tl.constexpr,
    UNIT_DY: tl.constexpr,
):  # fmt: skip
    """The slots of logits, and those of dy, which are 0 where a token is masked: there it may be infinite."""
    b_l = load_slots(
        logits, o_l, s_lv, first, V, m_n, float("-inf"), GROUPS, SLOTS, SKEW, EVEN, NEAR_L, UNIT_L, DTYPE
    )  # fmt: skip
    b_raw = load_slots(dy, o_dy, s_dyv, first, V, m_n, 0.0, GROUPS, SLOTS, SKEW, EVEN, NEAR_DY, UNIT_DY, DTYPE)
    b_dy = ()
    for i_j in tl.static_range(SLOTS):
        b_dy = b_dy + (tl.where(b_l[i_j] == float("-inf"), 0.0, b_raw[i_j]),)
    return b_l, b_dy


@triton.jit
def _weigh(b_s, r_pivot, r_rate, SLOTS: tl.constexpr):
    """Distances of the scores from the row's best, and their weights."""
    b_d = ()
    b_w = ()
    for i_j in tl.static_range(SLOTS):
        b_d = b_d + (b_s[i_j] - r_pivot[:, None],)
        b_w = b_w + (tl.exp2(b_d[i_j] * r_rate[:, None]),)
    return b_d, b_w


@triton.jit
def _gradient(b_l, b_dy, b_d, b_w, r_pivot, r_factor, r_mean, b_moment, SLOTS: tl.constexpr, DTAU: tl.constexpr):
    """The slots of the gradient, and `b_moment` plus their products with the distances."""
    r_masked = (r_pivot * 0.0)[:, None]  # exactly 0; in a row without a distribution NaN
    b_dl = ()
    for i_j in tl.static_range(SLOTS):
        b_g = b_w[i_j] * r_factor[:, None] * (b_dy[i_j] - r_mean[:, None])
        if DTAU:
            b_moment += tl.where(b_d[i_j] == float("-inf"), 0.0, b_g * b_d[i_j])  # masked, or as good as
        b_dl = b_dl + (tl.where(b_l[i_j] == float("-inf"), r_masked, b_g),)
    return b_dl, b_moment


@triton.jit(do_not_specialize=["A", "B", "V", "group_start"])
def row_tile_backward_kernel(
    dy, logits, tau, seed, row_ids, score_max, out, dtau, s_dya, s_dyv, s_dyb, s_la, s_lv, s_lb, s_outa, s_outv, s_outb,
    s_tau, A, B, V, group_start,
    FLAT: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr, RUN: tl.constexpr, GROUPS: tl.constexpr,
    SLOTS: tl.constexpr, SKEW: tl.constexpr, EVEN: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
    NEAR_L: tl.constexpr, UNIT_L: tl.constexpr, NEAR_DY: tl.constexpr, UNIT_DY: tl.constexpr, NEAR_OUT: tl.constexpr,
    UNIT_OUT: tl.constexpr,
):  # fmt: skip
    """Rows that are one tile; `dtau` is None where it is not wanted."""
    DTAU: tl.constexpr = dtau is not None
    o_n, o_a, o_b, m_n = locate(tl.program_id(0), A, B, FLAT, BA, BB, RUN)
    stream = row_streams(seed, row_ids, o_n, m_n)
    o_l = row_offsets(o_a, o_b, s_la, s_lb, FLAT, NEAR_L, UNIT_L)
    o_dy = row_offsets(o_a, o_b, s_dya, s_dyb, FLAT, NEAR_DY, UNIT_DY)
    b_l, b_dy = _load_both(
        logits, dy, o_l, o_dy, s_lv, s_dyv, 0, V, m_n, GROUPS, SLOTS, SKEW, EVEN, DTYPE, NEAR_L, UNIT_L, NEAR_DY,
        UNIT_DY
    )  # fmt: skip
    r_pivot = tl.load(score_max + o_n, mask=m_n, other=0.0) - SHIFT
    r_tau = row_taus(tau, o_n, s_tau, m_n)
    r_rate = rate_of(r_tau)
    b_s = score_slots(b_l, 0, group_start, stream, GROUPS, SLOTS, DTYPE, FAST)
    b_d, b_w = _weigh(b_s, r_pivot, r_rate, SLOTS)
    b_total = tl.zeros((BA * BB, GROUPS), DTYPE)
    b_dot = tl.zeros((BA * BB, GROUPS), DTYPE)
    for i_j in tl.static_range(SLOTS):
        b_total += b_w[i_j]
        b_dot = tl.fma(b_w[i_j], b_dy[i_j], b_dot)
    r_total = tl.sum(b_total, 1)
    r_mean = tl.sum(b_dot, 1) / r_total
    b_moment = tl.zeros((BA * BB, GROUPS), DTYPE)
    b_dl, b_moment = _gradient(b_l, b_dy, b_d, b_w, r_pivot, 1.0 / r_total / r_tau, r_mean, b_moment, SLOTS, DTAU)
    o_out = row_offsets(o_a, o_b, s_outa, s_outb, FLAT, NEAR_OUT, UNIT_OUT)
    store_slots(out, o_out, s_outv, 0, V, m_n, b_dl, GROUPS, SLOTS, SKEW, EVEN, NEAR_OUT, UNIT_OUT)
    if DTAU:
        tl.store(dtau + o_n, -tl.sum(b_moment, 1) / r_tau, mask=m_n)


@triton.jit(do_not_specialize=["A", "B", "V", "group_start"])
def row_sums_kernel(
    dy, logits, tau, seed, row_ids, score_max, totals, dots, s_dya, s_dyv, s_dyb, s_la, s_lv, s_lb, s_tau, A, B, V,
    group_start,
    FLAT: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr, RUN: tl.constexpr, GROUPS: tl.constexpr,
    SLOTS: tl.constexpr, SKEW: tl.constexpr, EVEN: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr, STEPS: tl.constexpr,
    SPLITS: tl.constexpr, NEAR_L: tl.constexpr, UNIT_L: tl.constexpr, NEAR_DY: tl.constexpr, UNIT_DY: tl.constexpr,
):  # fmt: skip
    """One split of rows: its sums of w and of w * dy, each `[N, SPLITS]`."""
    i_s = tl.program_id(0) % SPLITS
    o_n, o_a, o_b, m_n = locate(tl.program_id(0) // SPLITS, A, B, FLAT, BA, BB, RUN)
    TOKENS: tl.constexpr = 4 * GROUPS
    stream = row_streams(seed, row_ids, o_n, m_n)
    o_l = row_offsets(o_a, o_b, s_la, s_lb, FLAT, NEAR_L, UNIT_L)
    o_dy = row_offsets(o_a, o_b, s_dya, s_dyb, FLAT, NEAR_DY, UNIT_DY)
    r_pivot = tl.load(score_max + o_n, mask=m_n, other=0.0) - SHIFT
    r_tau = row_taus(tau, o_n, s_tau, m_n)
    r_rate = rate_of(r_tau)
    b_total = tl.zeros((BA * BB, GROUPS), DTYPE)
    b_dot = tl.zeros((BA * BB, GROUPS), DTYPE)
    lo = i_s * (STEPS * TOKENS)
    for first in range(lo, tl.minimum(lo + STEPS * TOKENS, V + SKEW), TOKENS):
        b_l, b_dy = _load_both(
            logits, dy, o_l, o_dy, s_lv, s_dyv, first, V, m_n, GROUPS, SLOTS, SKEW, EVEN, DTYPE, NEAR_L, UNIT_L,
            NEAR_DY, UNIT_DY
        )  # fmt: skip
        b_s = score_slots(b_l, first, group_start, stream, GROUPS, SLOTS, DTYPE, FAST)
        b_w = _weigh(b_s, r_pivot, r_rate, SLOTS)[1]
        for i_j in tl.static_range(SLOTS):
            b_total += b_w[i_j]
            b_dot = tl.fma(b_w[i_j], b_dy[i_j], b_dot)
    tl.store(totals + o_n * SPLITS + i_s, tl.sum(b_total, 1), mask=m_n)
    tl.store(dots + o_n * SPLITS + i_s, tl.sum(b_dot, 1), mask=m_n)


@triton.jit(do_not_specialize=["A", "B", "V", "group_start"])
def row_apply_kernel(
    dy, logits, tau, seed, row_ids, score_max, totals, dots, out, partial_dtau, s_dya, s_dyv, s_dyb, s_la, s_lv, s_lb,
    s_outa, s_outv, s_outb, s_tau, A, B, V, group_start,
    FLAT: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr, RUN: tl.constexpr, GROUPS: tl.constexpr,
    SLOTS: tl.constexpr, SKEW: tl.constexpr, EVEN: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr, STEPS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, NEAR_L: tl.constexpr, UNIT_L: tl.constexpr, NEAR_DY: tl.constexpr,
    UNIT_DY: tl.constexpr, NEAR_OUT: tl.constexpr, UNIT_OUT: tl.constexpr,
):  # fmt: skip
    """One split of rows of the gradient, and of dtau (`partial_dtau` `[N, SPLITS]`) unless that is None."""
    DTAU: tl.constexpr = partial_dtau is not None
    i_s = tl.program_id(0) % SPLITS
    o_n, o_a, o_b, m_n = locate(tl.program_id(0) // SPLITS, A, B, FLAT, BA, BB, RUN)
    TOKENS: tl.constexpr = 4 * GROUPS
    stream = row_streams(seed, row_ids, o_n, m_n)
    o_l = row_offsets(o_a, o_b, s_la, s_lb, FLAT, NEAR_L, UNIT_L)
    o_dy = row_offsets(o_a, o_b, s_dya, s_dyb, FLAT, NEAR_DY, UNIT_DY)
    o_out = row_offsets(o_a, o_b, s_outa, s_outb, FLAT, NEAR_OUT, UNIT_OUT)
    r_pivot = tl.load(score_max + o_n, mask=m_n, other=0.0) - SHIFT
    r_tau = row_taus(tau, o_n, s_tau, m_n)
    r_rate = rate_of(r_tau)
    o_s = tl.arange(0, BLOCK_S)
    p_p = (o_n * SPLITS)[:, None] + o_s[None, :]
    m_p = m_n[:, None] & (o_s < SPLITS)[None, :]
    r_total = tl.sum(tl.load(totals + p_p, mask=m_p, other=0.0), 1)  # of [BM, BLOCK_S], as that below
    r_mean = tl.sum(tl.load(dots + p_p, mask=m_p, other=0.0), 1) / r_total
    b_moment = tl.zeros((BA * BB, GROUPS), DTYPE)
    lo = i_s * (STEPS * TOKENS)
    for first in range(lo, tl.minimum(lo + STEPS * TOKENS, V + SKEW), TOKENS):
        b_l, b_dy = _load_both(
            logits, dy, o_l, o_dy, s_lv, s_dyv, first, V, m_n, GROUPS, SLOTS, SKEW, EVEN, DTYPE, NEAR_L, UNIT_L,
            NEAR_DY, UNIT_DY
        )  # fmt: skip
        b_s = score_slots(b_l, first, group_start, stream, GROUPS, SLOTS, DTYPE, FAST)
        b_d, b_w = _weigh(b_s, r_pivot, r_rate, SLOTS)
        b_dl, b_moment = _gradient(
            b_l, b_dy, b_d, b_w, r_pivot, 1.0 / r_total / r_tau, r_mean, b_moment, SLOTS, DTAU
        )  # fmt: skip
        store_slots(out, o_out, s_outv, first, V, m_n, b_dl, GROUPS, SLOTS, SKEW, EVEN, NEAR_OUT, UNIT_OUT)
    if DTAU:
        tl.store(partial_dtau + o_n * SPLITS + i_s, -tl.sum(b_moment, 1) / r_tau, mask=m_n)


def softmax_backward(
    dy: torch.Tensor, rows: Rows, score_max: torch.Tensor, needs_dtau: bool, out: torch.Tensor, sizes: TritonSizes
) -> torch.Tensor:
    """`Backend.softmax_backward` of the rule `ste`."""
    dtau = (torch.empty_like if needs_dtau else torch.zeros_like)(rows.tau, memory_format=torch.contiguous_format)
    if len(dtau) == 0:
        return dtau
    options, grid, tile = tile_options(sizes, rows, dy=dy, out=out)
    options |= {"dy": dy, "score_max": score_max.contiguous()}
    with launching(out):
        if tile.splits == 0:
            row_tile_backward_kernel[grid](**options, out=out, dtau=dtau if needs_dtau else None)
            return dtau
        written = {name: options.pop(name) for name in WRITTEN}
        shape = len(dtau), tile.splits
        totals, dots, partial = (torch.empty(shape, dtype=dtau.dtype, device=dtau.device) for _ in range(3))
        options |= {"totals": totals, "dots": dots, "STEPS": tile.steps, "SPLITS": tile.splits}
        row_sums_kernel[grid](**options)
        row_apply_kernel[grid](
            **options, **written, out=out, partial_dtau=partial if needs_dtau else None,
            BLOCK_S=triton.next_power_of_2(tile.splits),
        )  # fmt: skip
        if needs_dtau:
            sum_splits(partial, dtau)
    return dtau
