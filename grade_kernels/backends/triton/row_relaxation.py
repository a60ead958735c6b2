"""`gumbel_softmax` over tiles of rows: `softmax((l + g) / tau)`, or with hard the one-hot sample, and `score_max`.

A row that is one tile takes one kernel. The noise is drawn once: score, the row's largest, weights, their sum, quotients.
Of a longer row a first kernel finds each split's best score, with the weights' sum counted from it or its token, and a
second draws the noise again and writes.

A row that holds NaN, +inf or only -inf is known by what it does to these numbers. A soft row's sum becomes NaN. A hard row's
best score is infinite, or its token is -1, which stands for NaN and is less than any.
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
    slot_tokens,
    store_slots,
    tile_options,
)
from grade_kernels.backends.triton.scores import rate_of, weighted_sum
from grade_kernels.backends.triton.sizes import TritonSizes
from grade_kernels.backends.triton.targets import launching

NO_TOKEN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _peak(b_s, SLOTS: tl.constexpr):
    """The best score of each group; NaN wins."""
    b_peak = b_s[0]
    for i_j in tl.static_range(1, SLOTS):
        b_peak = tl.maximum(b_peak, b_s[i_j], propagate_nan=tl.PropagateNan.ALL)
    return b_peak


@triton.jit
def _token_of(b_s, r_best, first, GROUPS: tl.constexpr, SLOTS: tl.constexpr, SKEW: tl.constexpr):
    """The first token `[BM]` that has the best score `[BM]`; -1 if any score is NaN."""
    b_v = tl.full(b_s[0].shape, NO_TOKEN, tl.int32)
    for i_j in tl.static_range(SLOTS):
        o_v = slot_tokens(first, SLOTS - 1 - i_j, GROUPS, SKEW)
        b_v = tl.where(b_s[SLOTS - 1 - i_j] == r_best[:, None], o_v, b_v)
    b_peak = _peak(b_s, SLOTS)
    return tl.min(tl.where(b_peak != b_peak, -1, b_v), 1)


@triton.jit
def _is_bad_sample(r_best, r_v):
    return (r_v < 0) | (tl.abs(r_best) == float("inf"))


@triton.jit
def _one_hot(
    r_v, r_bad, first, GROUPS: tl.constexpr, SLOTS: tl.constexpr, SKEW: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """The slots of one_hot(r_v), NaN in a row without a distribution."""
    nan = tl.full((), float("nan"), DTYPE)
    r_one, r_zero = tl.where(r_bad, nan, 1.0), tl.where(r_bad, nan, 0.0)
    b_y = ()
    for i_j in tl.static_range(SLOTS):
        o_v = slot_tokens(first, i_j, GROUPS, SKEW)
        b_y = b_y + (tl.where(o_v == r_v[:, None], r_one[:, None], r_zero[:, None]),)
    return b_y


@triton.jit(do_not_specialize=["A", "B", "V", "group_start"])
def row_tile_kernel(
    logits, tau, seed, row_ids, out, score_max, s_la, s_lv, s_lb, s_outa, s_outv, s_outb, s_tau, A, B, V, group_start,
    HARD: tl.constexpr, FLAT: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr, RUN: tl.constexpr, GROUPS: tl.constexpr,
    SLOTS: tl.constexpr, SKEW: tl.constexpr, EVEN: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
    NEAR_L: tl.constexpr, UNIT_L: tl.constexpr, NEAR_OUT: tl.constexpr, UNIT_OUT: tl.constexpr,
):  # fmt: skip
    """Rows that are one tile."""
    o_n, o_a, o_b, m_n = locate(tl.program_id(0), A, B, FLAT, BA, BB, RUN)
    stream = row_streams(seed, row_ids, o_n, m_n)
    o_row = row_offsets(o_a, o_b, s_la, s_lb, FLAT, NEAR_L, UNIT_L)
    b_l = load_slots(
        logits, o_row, s_lv, 0, V, m_n, float("-inf"), GROUPS, SLOTS, SKEW, EVEN, NEAR_L, UNIT_L, DTYPE
    )  # fmt: skip
    b_s = score_slots(b_l, 0, group_start, stream, GROUPS, SLOTS, DTYPE, FAST)
    r_best = tl.max(_peak(b_s, SLOTS), 1)
    if HARD:
        r_v = _token_of(b_s, r_best, 0, GROUPS, SLOTS, SKEW)
        r_bad = _is_bad_sample(r_best, r_v)
        b_y = _one_hot(r_v, r_bad, 0, GROUPS, SLOTS, SKEW, DTYPE)
    else:
        r_tau = row_taus(tau, o_n, s_tau, m_n)
        r_rate = rate_of(r_tau)
        b_w = ()
        b_sum = tl.zeros((BA * BB, GROUPS), DTYPE)
        for i_j in tl.static_range(SLOTS):
            # Scaled scores could overflow, and their difference would cancel more digits. So the difference comes first.
            b_w = b_w + (tl.exp2((b_s[i_j] - r_best[:, None]) * r_rate[:, None]),)
            b_sum += b_w[i_j]
        r_total = tl.sum(b_sum, 1)
        r_bad = r_total != r_total
        r_factor = (1.0 / r_total)[:, None]
        b_y = ()
        for i_j in tl.static_range(SLOTS):
            b_y = b_y + (b_w[i_j] * r_factor,)
    o_out = row_offsets(o_a, o_b, s_outa, s_outb, FLAT, NEAR_OUT, UNIT_OUT)
    store_slots(out, o_out, s_outv, 0, V, m_n, b_y, GROUPS, SLOTS, SKEW, EVEN, NEAR_OUT, UNIT_OUT)
    tl.store(score_max + o_n, tl.where(r_bad, float("nan"), r_best + SHIFT), mask=m_n)


@triton.jit(do_not_specialize=["A", "B", "V", "group_start"])
def row_scan_kernel(
    logits, tau, seed, row_ids, best, found, s_la, s_lv, s_lb, s_tau, A, B, V, group_start,
    HARD: tl.constexpr, FLAT: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr, RUN: tl.constexpr, GROUPS: tl.constexpr,
    SLOTS: tl.constexpr, SKEW: tl.constexpr, EVEN: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
    STEPS: tl.constexpr, SPLITS: tl.constexpr, LOWEST: tl.constexpr, NEAR_L: tl.constexpr, UNIT_L: tl.constexpr,
):  # fmt: skip
    """One split of rows: `best` `[N, SPLITS]`, the best score, and `found`, its token or the sum of weights from it."""
    i_s = tl.program_id(0) % SPLITS
    o_n, o_a, o_b, m_n = locate(tl.program_id(0) // SPLITS, A, B, FLAT, BA, BB, RUN)
    TOKENS: tl.constexpr = 4 * GROUPS
    stream = row_streams(seed, row_ids, o_n, m_n)
    o_row = row_offsets(o_a, o_b, s_la, s_lb, FLAT, NEAR_L, UNIT_L)
    r_tau = row_taus(tau, o_n, s_tau, m_n)
    r_rate = rate_of(r_tau)
    b_best = tl.full((BA * BB, GROUPS), float("-inf"), DTYPE)
    b_v = tl.full((BA * BB, GROUPS), NO_TOKEN, tl.int32)
    b_sum = tl.zeros((BA * BB, GROUPS), DTYPE)
    lo = i_s * (STEPS * TOKENS)
    for first in range(lo, tl.minimum(lo + STEPS * TOKENS, V + SKEW), TOKENS):
        b_l = load_slots(
            logits, o_row, s_lv, first, V, m_n, float("-inf"), GROUPS, SLOTS, SKEW, EVEN, NEAR_L, UNIT_L, DTYPE
        )  # fmt: skip
        b_s = score_slots(b_l, first, group_start, stream, GROUPS, SLOTS, DTYPE, FAST)
        if HARD:
            for i_j in tl.static_range(SLOTS):
                b_v = tl.where(b_s[i_j] > b_best, slot_tokens(first, i_j, GROUPS, SKEW), b_v)
                b_best = tl.maximum(b_best, b_s[i_j], propagate_nan=tl.PropagateNan.ALL)
        else:
            b_top = tl.maximum(b_best, _peak(b_s, SLOTS), propagate_nan=tl.PropagateNan.ALL)
            # A lane that has seen only -inf would compute inf - inf. So it counts from a finite number.
            b_pivot = tl.maximum(b_top, LOWEST, propagate_nan=tl.PropagateNan.ALL)
            b_sum *= tl.exp2((b_best - b_pivot) * r_rate[:, None])
            for i_j in tl.static_range(SLOTS):
                b_sum += tl.exp2((b_s[i_j] - b_pivot) * r_rate[:, None])
            b_best = b_top
    r_best = tl.max(b_best, 1)
    p_p = o_n * SPLITS + i_s
    tl.store(best + p_p, r_best, mask=m_n)
    if HARD:
        b_v = tl.where(b_best == r_best[:, None], b_v, NO_TOKEN)
        tl.store(found + p_p, tl.min(tl.where(b_best != b_best, -1, b_v), 1), mask=m_n)
    else:
        b_pivot = tl.maximum(b_best, LOWEST, propagate_nan=tl.PropagateNan.ALL)
        r_pivot = tl.maximum(r_best, LOWEST)[:, None]
        tl.store(found + p_p, weighted_sum(b_sum, tl.exp2((b_pivot - r_pivot) * r_rate[:, None]), 1), mask=m_n)


@triton.jit(do_not_specialize=["A", "B", "V", "group_start"])
def row_write_kernel(
    logits, tau, seed, row_ids, best, found, out, score_max, s_la, s_lv, s_lb, s_outa, s_outv, s_outb, s_tau, A, B, V,
    group_start,
    HARD: tl.constexpr, FLAT: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr, RUN: tl.constexpr, GROUPS: tl.constexpr,
    SLOTS: tl.constexpr, SKEW: tl.constexpr, EVEN: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
    STEPS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, LOWEST: tl.constexpr, NEAR_L: tl.constexpr,
    UNIT_L: tl.constexpr, NEAR_OUT: tl.constexpr, UNIT_OUT: tl.constexpr,
):  # fmt: skip
    """One split of rows, from what `row_scan_kernel` left of all splits."""
    i_s = tl.program_id(0) % SPLITS
    o_n, o_a, o_b, m_n = locate(tl.program_id(0) // SPLITS, A, B, FLAT, BA, BB, RUN)
    TOKENS: tl.constexpr = 4 * GROUPS
    o_s = tl.arange(0, BLOCK_S)
    p_p = (o_n * SPLITS)[:, None] + o_s[None, :]
    m_p = m_n[:, None] & (o_s < SPLITS)[None, :]
    b_best = tl.load(best + p_p, mask=m_p, other=float("-inf"))  # [BM, BLOCK_S]
    r_best = tl.max(b_best, 1)
    r_tau = row_taus(tau, o_n, s_tau, m_n)
    r_rate = rate_of(r_tau)
    if HARD:
        b_v = tl.load(found + p_p, mask=m_p, other=NO_TOKEN)  # [BM, BLOCK_S]
        # A split that holds NaN may have lost it by its maximum. Its token still tells.
        r_v = tl.min(tl.where((b_best == r_best[:, None]) | (b_v < 0), b_v, NO_TOKEN), 1)
        r_bad = _is_bad_sample(r_best, r_v)
        r_factor = r_rate
    else:
        b_sum = tl.load(found + p_p, mask=m_p, other=0.0)  # [BM, BLOCK_S]
        b_pivot = tl.maximum(b_best, LOWEST)
        b_scale = tl.exp2((b_pivot - tl.maximum(r_best, LOWEST)[:, None]) * r_rate[:, None])
        r_total = weighted_sum(b_sum, b_scale, 1)
        r_bad = (r_total != r_total) | (r_best == float("-inf"))
        r_factor = (1.0 / tl.where(r_bad, float("nan"), r_total))[:, None]
        r_v = tl.zeros((BA * BB,), tl.int32)
    if i_s == 0:
        tl.store(score_max + o_n, tl.where(r_bad, float("nan"), r_best + SHIFT), mask=m_n)
    stream = row_streams(seed, row_ids, o_n, m_n)
    o_row = row_offsets(o_a, o_b, s_la, s_lb, FLAT, NEAR_L, UNIT_L)
    o_out = row_offsets(o_a, o_b, s_outa, s_outb, FLAT, NEAR_OUT, UNIT_OUT)
    lo = i_s * (STEPS * TOKENS)
    for first in range(lo, tl.minimum(lo + STEPS * TOKENS, V + SKEW), TOKENS):
        if HARD:
            b_y = _one_hot(r_v, r_bad, first, GROUPS, SLOTS, SKEW, DTYPE)
        else:
            b_l = load_slots(
                logits, o_row, s_lv, first, V, m_n, float("-inf"), GROUPS, SLOTS, SKEW, EVEN, NEAR_L, UNIT_L, DTYPE
            )  # fmt: skip
            b_s = score_slots(b_l, first, group_start, stream, GROUPS, SLOTS, DTYPE, FAST)
            b_y = ()
            for i_j in tl.static_range(SLOTS):
                b_y = b_y + (tl.exp2((b_s[i_j] - r_best[:, None]) * r_rate[:, None]) * r_factor,)
        store_slots(out, o_out, s_outv, first, V, m_n, b_y, GROUPS, SLOTS, SKEW, EVEN, NEAR_OUT, UNIT_OUT)


def gumbel_softmax(rows: Rows, hard: bool, out: torch.Tensor, sizes: TritonSizes) -> torch.Tensor:
    """`Backend.gumbel_softmax`."""
    count, dtype = len(rows.tau), rows.tau.dtype
    score_max = torch.empty(count, dtype=dtype, device=out.device)
    if count == 0:
        return score_max
    options, grid, tile = tile_options(sizes, rows, out=out)
    options["HARD"] = hard
    with launching(out):
        if tile.splits == 0:
            row_tile_kernel[grid](**options, out=out, score_max=score_max)
            return score_max
        best = torch.empty(count, tile.splits, dtype=dtype, device=out.device)
        options |= {
            "best": best, "found": torch.empty_like(best, dtype=torch.int32 if hard else dtype),
            "STEPS": tile.steps, "SPLITS": tile.splits, "LOWEST": torch.finfo(dtype).min,
        }  # fmt: skip
        written = {name: options.pop(name) for name in WRITTEN}
        row_scan_kernel[grid](**options)
        row_write_kernel[grid](
            **options, **written, out=out, score_max=score_max, BLOCK_S=triton.next_power_of_2(tile.splits)
        )  # fmt: skip
    return score_max
