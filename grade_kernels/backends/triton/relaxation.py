"""`softmax`: the relaxed sample `exp((l + g - max) / tau)`, its sum per row, and optionally its quotient.

Normalising takes two passes that both regenerate the noise. Writing the weights first and scaling them afterwards would
move more memory than the second pass computes, and would round narrow dtypes twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grade_kernels.backends.native import contiguous
from grade_kernels.backends.records import Noise
from grade_kernels.backends.triton.philox import LN2, LOG2E, REFINE_BELOW, SHIFT, load_key, split_row, strip_noise
from grade_kernels.backends.triton.tiles import (
    launch_options,
    launching,
    load_strip,
    split_bounds,
    store_strip,
    sum_splits,
)
from grade_kernels.dtypes import compute_dtype
from grade_kernels.noise import seed_on


@triton.jit
def _sweep(
    p_l, p_w, s_lv, s_wv, V, group_start, row_lo, row_hi, k0, k1, pivot, rate, factor, strip_lo, strip_hi, state,
    SKEW: tl.constexpr, LANES: tl.constexpr, STRIPS: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
    ALIGNED: tl.constexpr, WRITE: tl.constexpr, MASKED: tl.constexpr, REFINE: tl.constexpr,
):  # fmt: skip
    """Weights of some strips: written times factor (WRITE), and folded into the lanes' state (sum, least word)."""
    b_sum, b_low = state
    o_group = (group_start + tl.arange(0, LANES // 4).to(tl.uint32)).to(tl.int32, bitcast=True)
    for i_t in range(strip_lo, strip_hi, STRIPS):
        strips = ()
        for i_r in tl.static_range(STRIPS):
            first = (i_t + i_r) * LANES - SKEW
            strips = strips + (load_strip(p_l, s_lv, first, V, float("-inf"), LANES, DTYPE, ALIGNED, MASKED),)
        for i_r in tl.static_range(STRIPS):
            first = (i_t + i_r) * LANES - SKEW
            groups = (o_group + (i_t + i_r) * (LANES // 4)).to(tl.uint32, bitcast=True)
            b_n, b_least = strip_noise(groups, row_lo, row_hi, k0, k1, DTYPE, FAST, REFINE)
            b_low = tl.minimum(b_low, b_least)
            # The difference comes first: scaled scores could overflow, and would cancel worse.
            b_w = tl.exp2((tl.fma(b_n, -LN2, strips[i_r]) - pivot) * rate)
            b_sum += b_w
            if WRITE:
                store_strip(p_w, s_wv, first, V, b_w * factor, MASKED)
    return b_sum, b_low


@triton.jit(do_not_specialize=["group_start"])
def softmax_kernel(
    logits, weights, tau, seed, row_ids, score_max, partial, total, s_ln, s_lv, s_wn, s_wv, s_tau, V, group_start,
    SKEW: tl.constexpr, LANES: tl.constexpr, STRIPS: tl.constexpr, TILES: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One split of one row.

    Without `total`, the split's sum goes to `partial` `[N, SPLITS]`, and the weights to `weights` unless it is None.
    With `total`, `partial` is read, and the weights are written divided by the row's sum, which goes to `total`.
    """
    i_p = tl.program_id(0).to(tl.int64)
    i_n, i_s = i_p // SPLITS, (i_p % SPLITS).to(tl.int32)
    WRITE: tl.constexpr = weights is not None
    k0, k1 = load_key(seed)
    row_lo, row_hi = split_row(i_n if row_ids is None else tl.load(row_ids + i_n))
    group_start = group_start.to(tl.uint32)
    p_l = logits + i_n * s_ln
    p_w = weights
    if WRITE:
        p_w = weights + i_n * s_wn
    pivot = tl.load(score_max + i_n) - SHIFT
    rate = LOG2E / tl.load(tau + i_n * s_tau)
    factor = tl.full((), 1.0, DTYPE)
    if total is not None:
        o_s = tl.arange(0, BLOCK_S)
        m_total = tl.sum(tl.load(partial + i_n * SPLITS + o_s, mask=o_s < SPLITS, other=0.0), 0)
        factor = 1.0 / m_total
        tl.store(total + i_n, m_total, mask=i_s == 0)
    lo, full, hi = split_bounds(i_s, V, SKEW, LANES, STRIPS, TILES)
    fresh = (tl.zeros((LANES,), DTYPE), tl.full((LANES // 4,), 0xFFFFFFFF, tl.uint32))
    state = _sweep(
        p_l, p_w, s_lv, s_wv, V, group_start, row_lo, row_hi, k0, k1, pivot, rate, factor, lo, full, fresh,
        SKEW, LANES, STRIPS, DTYPE, FAST, ALIGNED, WRITE, MASKED=False, REFINE=False,
    )  # fmt: skip
    state = _sweep(
        p_l, p_w, s_lv, s_wv, V, group_start, row_lo, row_hi, k0, k1, pivot, rate, factor, full, hi, state,
        SKEW, LANES, 1, DTYPE, FAST, ALIGNED, WRITE, MASKED=True, REFINE=False,
    )  # fmt: skip
    if tl.min(state[1].to(tl.int64), 0) < REFINE_BELOW:
        # One split in two thousand holds such a word. It is done again; the others pay one minimum per word.
        tl.debug_barrier()  # the same addresses are written again, maybe by other threads
        state = _sweep(
            p_l, p_w, s_lv, s_wv, V, group_start, row_lo, row_hi, k0, k1, pivot, rate, factor, lo, hi, fresh,
            SKEW, LANES, 1, DTYPE, FAST, ALIGNED, WRITE, MASKED=True, REFINE=True,
        )  # fmt: skip
    if total is None:
        tl.store(partial + i_p, tl.sum(state[0], 0))


def softmax(
    logits: torch.Tensor,
    tau: torch.Tensor,
    noise: Noise,
    score_max: torch.Tensor,
    *,
    normalize: bool,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Backend.softmax`."""
    rows, vocab = logits.shape
    compute, device = compute_dtype(logits.dtype), logits.device
    weights = torch.empty(rows, vocab, dtype=dtype, device=device) if out is None else out
    total = torch.empty(rows, dtype=compute, device=device)
    if rows == 0:
        return weights, total
    options = launch_options(noise.vocab_start, logits)
    partial = torch.empty(rows, options["SPLITS"], dtype=compute, device=device)
    seed, row_ids = seed_on(noise.seed, device), contiguous(noise.row_ids)
    score_max = score_max.contiguous()

    def launch(to: torch.Tensor | None, out_total: torch.Tensor | None) -> None:
        softmax_kernel[(partial.numel(),)](
            logits, to, tau, seed, row_ids, score_max, partial, out_total, *logits.stride(), *weights.stride(),
            tau.stride(0), BLOCK_S=triton.next_power_of_2(partial.shape[1]), **options,
        )  # fmt: skip

    with launching(logits):
        if normalize:
            launch(None, None)
            launch(weights, total)
        else:
            launch(weights, None)
            sum_splits(partial, total)
    return weights, total
