"""`sample`: the Gumbel-max token of each row, and the statistics of its distribution, in one pass over the logits.

Scan: one program per row and split keeps, lane by lane, the best score so far and the tile in which it rose; nothing
crosses threads before the end of the split. Pick: one program per row combines the splits in a fixed order and looks
at the winning tile again to say which token it was. There are no atomics, so two runs agree bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grade_kernels.backends.native import contiguous
from grade_kernels.backends.records import Noise, Sample
from grade_kernels.backends.triton.philox import LOG2E, REFINE_BELOW, SHIFT, row_stream, strip_noise
from grade_kernels.backends.triton.scores import score, weighted_sum
from grade_kernels.backends.triton.sizes import TritonSizes
from grade_kernels.backends.triton.strips import launch_options, load_strip, split_bounds
from grade_kernels.backends.triton.targets import launching
from grade_kernels.dtypes import compute_dtype
from grade_kernels.noise import seed_on


@triton.jit
def _scan(
    p_row, s_v, V, group_start, stream, strip_lo, strip_hi, state,
    SKEW: tl.constexpr, LANES: tl.constexpr, STRIPS: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
    ALIGNED: tl.constexpr, LSE: tl.constexpr, MASKED: tl.constexpr, REFINE: tl.constexpr,
):  # fmt: skip
    """Fold strips, STRIPS at a time, into the lanes' state: best score, its tile, least word, max and sum of logits.

    A tile is known by its first strip.
    """
    b_best, b_tile, b_low, b_max, b_sum = state
    o_group = (group_start + tl.arange(0, LANES // 4).to(tl.uint32)).to(tl.int32, bitcast=True)
    for i_t in range(strip_lo, strip_hi, STRIPS):
        b_l = ()
        b_top = b_max
        for i_r in tl.static_range(STRIPS):
            first = (i_t + i_r) * LANES - SKEW
            b_l = b_l + (load_strip(p_row, s_v, first, V, float("-inf"), LANES, DTYPE, ALIGNED, MASKED),)  # [LANES]
            if LSE:
                b_top = tl.maximum(b_top, b_l[i_r])
        if LSE:
            b_sum *= tl.exp2((b_max - b_top) * LOG2E)
            b_max = b_top
        b_peak = tl.full((LANES,), float("-inf"), DTYPE)
        for i_r in tl.static_range(STRIPS):
            b_group = (o_group + (i_t + i_r) * (LANES // 4)).to(tl.uint32, bitcast=True)
            b_n, b_least = strip_noise(b_group, stream, DTYPE, FAST, REFINE)
            b_low = tl.minimum(b_low, b_least)
            b_s = score(b_n, b_l[i_r])
            # A plain maximum would drop NaN, by which a bad row is known.
            b_peak = tl.maximum(b_peak, b_s, propagate_nan=tl.PropagateNan.ALL)
            if LSE:
                b_sum += tl.exp2((b_l[i_r] - b_max) * LOG2E)
        # An index for each logit would cost two more instructions. So only the tile is noted, and the pick kernel looks
        # for the token in it.
        b_tile = tl.where(b_peak > b_best, i_t, b_tile)
        b_best = tl.maximum(b_best, b_peak, propagate_nan=tl.PropagateNan.ALL)
    return b_best, b_tile, b_low, b_max, b_sum


@triton.jit(do_not_specialize=["group_start"])
def sample_scan_kernel(
    logits, seed, row_ids, best, tile, top, total, s_n, s_v, V, group_start,
    LOWEST: tl.constexpr, SKEW: tl.constexpr, LANES: tl.constexpr, STRIPS: tl.constexpr, TILES: tl.constexpr,
    SPLITS: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One split of one row into the partial results `[N, SPLITS]`: best score, its tile, max and sum of the logits."""
    i_p = tl.program_id(0).to(tl.int64)
    i_n, i_s = i_p // SPLITS, (i_p % SPLITS).to(tl.int32)
    LSE: tl.constexpr = top is not None
    stream = row_stream(seed, row_ids, i_n)
    group_start = group_start.to(tl.uint32)
    p_row = logits + i_n * s_n
    lo, full, hi = split_bounds(i_s, V, SKEW, LANES, STRIPS, TILES)
    fresh = (
        tl.full((LANES,), float("-inf"), DTYPE),
        tl.full((LANES,), 0, tl.int32) + lo,
        tl.full((LANES // 4,), 0xFFFFFFFF, tl.uint32),
        # A lane that has seen only -inf would compute inf - inf with a maximum of -inf.
        tl.full((LANES,), LOWEST, DTYPE),
        tl.zeros((LANES,), DTYPE),
    )
    state = _scan(
        p_row, s_v, V, group_start, stream, strip_lo=lo, strip_hi=full, state=fresh, SKEW=SKEW, LANES=LANES,
        STRIPS=STRIPS, DTYPE=DTYPE, FAST=FAST, ALIGNED=ALIGNED, LSE=LSE, MASKED=False, REFINE=False,
    )  # fmt: skip
    state = _scan(
        p_row, s_v, V, group_start, stream, strip_lo=full, strip_hi=hi, state=state, SKEW=SKEW, LANES=LANES,
        STRIPS=1, DTYPE=DTYPE, FAST=FAST, ALIGNED=ALIGNED, LSE=LSE, MASKED=True, REFINE=False,
    )  # fmt: skip
    if tl.min(state[2].to(tl.int64), 0) < REFINE_BELOW:
        # One split in two thousand holds such a word. It is scanned again; the others pay one minimum per word.
        state = _scan(
            p_row, s_v, V, group_start, stream, strip_lo=lo, strip_hi=hi, state=fresh, SKEW=SKEW, LANES=LANES,
            STRIPS=1, DTYPE=DTYPE, FAST=FAST, ALIGNED=ALIGNED, LSE=LSE, MASKED=True, REFINE=True,
        )  # fmt: skip
    b_best, b_tile, _, b_max, b_sum = state
    r_best = tl.max(b_best, 0)
    if tl.max((b_best != b_best).to(tl.int32), 0) > 0:
        r_best = tl.full((), float("nan"), DTYPE)
    tl.store(best + i_p, r_best)
    tl.store(tile + i_p, tl.min(tl.where(b_best == r_best, b_tile, 0x7FFFFFFF), 0))
    if LSE:
        r_max = tl.max(b_max, 0)
        tl.store(top + i_p, r_max)
        tl.store(total + i_p, weighted_sum(b_sum, tl.exp2((b_max - r_max) * LOG2E), 0))


@triton.jit(do_not_specialize=["group_start"])
def sample_pick_kernel(
    logits, seed, row_ids, best, tile, top, total, ids, score_max, logit_max, logit_sum, s_n, s_v, V, group_start,
    SKEW: tl.constexpr, LANES: tl.constexpr, STRIPS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
    DTYPE: tl.constexpr, FAST: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Combine the splits of one row, and find its token in the tile that holds the best score."""
    i_n = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BLOCK_S)
    m_s = o_s < SPLITS
    b_best = tl.load(best + i_n * SPLITS + o_s, mask=m_s, other=float("-inf"))  # [BLOCK_S]
    b_tile = tl.load(tile + i_n * SPLITS + o_s, mask=m_s, other=0x7FFFFFFF)  # [BLOCK_S]
    r_best = tl.max(b_best, 0)
    is_bad = (tl.max((b_best != b_best).to(tl.int32), 0) > 0) | (tl.abs(r_best) == float("inf"))
    # A bad row has no best score, and its id could lie outside of the vocabulary. So it looks at the first tile.
    i_t = tl.min(tl.where(b_best == r_best, b_tile, 0x7FFFFFFF), 0)
    i_t = tl.where(is_bad, 0, i_t)

    stream = row_stream(seed, row_ids, i_n)
    p_row = logits + i_n * s_n
    first = i_t * LANES - SKEW
    o_v = first + tl.arange(0, STRIPS * LANES)
    o_group = tl.arange(0, STRIPS * LANES // 4).to(tl.uint32)
    b_group = group_start.to(tl.uint32) + (i_t * (LANES // 4)).to(tl.uint32) + o_group
    b_l = load_strip(
        p_row, s_v, first, V, float("-inf"), STRIPS * LANES, DTYPE, ALIGNED, MASKED=True
    )  # [STRIPS * LANES]
    b_n, b_least = strip_noise(b_group, stream, DTYPE, FAST, REFINE=False)
    if tl.min(b_least.to(tl.int64), 0) < REFINE_BELOW:
        b_n, b_least = strip_noise(b_group, stream, DTYPE, FAST, REFINE=True)
    b_s = score(b_n, b_l)
    i_v = tl.min(tl.where(b_s == tl.max(b_s, 0), o_v, V - 1), 0)
    tl.store(ids + i_n, tl.maximum(i_v, 0).to(tl.int64))

    nan = tl.full((), float("nan"), DTYPE)
    tl.store(score_max + i_n, tl.where(is_bad, nan, r_best + SHIFT))
    if top is not None:
        b_top = tl.load(top + i_n * SPLITS + o_s, mask=m_s, other=float("-inf"))  # [BLOCK_S]
        b_total = tl.load(total + i_n * SPLITS + o_s, mask=m_s, other=0.0)  # [BLOCK_S]
        r_top = tl.max(b_top, 0)
        r_total = weighted_sum(b_total, tl.exp2((b_top - r_top) * LOG2E), 0)
        tl.store(logit_max + i_n, tl.where(is_bad, nan, r_top))
        tl.store(logit_sum + i_n, tl.where(is_bad, nan, r_total))


def sample(logits: torch.Tensor, noise: Noise, logsumexp: bool, sizes: TritonSizes) -> Sample:
    """`Backend.sample`."""
    rows = logits.shape[0]
    dtype, device = compute_dtype(logits.dtype), logits.device
    ids = torch.empty(rows, dtype=torch.int64, device=device)
    score_max = torch.empty(rows, dtype=dtype, device=device)
    logit_max, logit_sum = (torch.empty(rows if logsumexp else 0, dtype=dtype, device=device) for _ in range(2))
    found = Sample(ids, score_max, logit_max, logit_sum)
    if rows == 0:
        return found
    options = launch_options(sizes, noise.vocab_start, logits)
    tiles, splits = options.pop("TILES"), options["SPLITS"]
    best = torch.empty(rows, splits, dtype=dtype, device=device)
    shared = {
        "logits": logits, "s_n": logits.stride(0), "s_v": logits.stride(1),
        "seed": seed_on(noise.seed, device), "row_ids": contiguous(noise.row_ids),
        "best": best, "tile": torch.empty(rows, splits, dtype=torch.int32, device=device),
        "top": torch.empty_like(best) if logsumexp else None, "total": torch.empty_like(best) if logsumexp else None,
        **options,
    }  # fmt: skip
    with launching(logits):
        sample_scan_kernel[(rows * splits,)](**shared, TILES=tiles, LOWEST=torch.finfo(dtype).min)
        sample_pick_kernel[(rows,)](**shared, **found._asdict(), BLOCK_S=triton.next_power_of_2(splits))
    return found
