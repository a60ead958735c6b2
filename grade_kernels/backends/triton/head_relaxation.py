"""`head_softmax`: statistics and support of a head's noise-free softmax, alone or beside a reference's, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grade_kernels.backends.records import Head, Noise, Softmax, Support
from grade_kernels.backends.triton.head_chunks import NO_REF, buffered_logits, product_of
from grade_kernels.backends.triton.head_support import Plan, SplitPass, combined, in_batches, relative_to
from grade_kernels.backends.triton.head_tiles import (
    FLOOR,
    RowNoise,
    collect,
    distances,
    empty_aligned,
    identities,
    in_layout_of,
    largest,
    logits,
    lower_bound,
    nan_max,
    powers,
    row_max,
    total_of,
    warp_scalar,
    with_dependency,
)
from grade_kernels.backends.triton.philox import DOMAIN_SUPPORT, LN2, load_key, philox
from grade_kernels.backends.triton.scores import rate_of, weighted_sum
from grade_kernels.backends.triton.sizes import TritonSizes
from grade_kernels.backends.triton.targets import launching


@triton.jit
def _weighted(b_w, b_x):
    """Product that is 0 where the weight is, even if x is infinite."""
    return tl.where(b_w > 0, b_w * b_x, 0.0)


@triton.jit(
    do_not_specialize=[
        "N",
        "V",
        "splits",
        "group_start",
        "first_row",
        "first_split",
        "start",
        "step",
        "softcap",
        "ref_softcap",
        "eps",
    ]
)
def head_softmax_kernel(
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, seed, row_ids, tau, before_max, before_sum,
    top, total, moment, ref_top, ref_total, slots, counts, places, room,
    s_slots, s_hn, s_hk, s_wv, s_wk, s_rn, s_rk, s_uv, s_uk,
    N, V, H, R, softcap, ref_softcap, eps, group_start, first_row, first_split, start, splits, step,
    SKEW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BN2: tl.constexpr,
    SERIALISE: tl.constexpr, TILES: tl.constexpr, EVEN_K: tl.constexpr, EVEN_R: tl.constexpr,
    THREADS: tl.constexpr, PERMUTED: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """One split of BM rows: max, tempered sum and moment, with a reference its max and sum, with slots candidates.

    Maxima are of logits times rate, in units of log2, and sums relative to them. The moment is the sum of weight times
    (l - top), less (r - ref_top) with a reference r. Without a weight, `hidden` and `ref_hidden` are buffers that hold the
    products of the splits from `start` on (see `head_chunks`).
    """
    FAST: tl.constexpr = TARGET == "cuda"
    blocks = tl.cdiv(N, BM)
    i_p = tl.program_id(0)
    i_b = i_p % blocks
    i_s = ((first_split + i_p // blocks).to(tl.int64) * step % splits).to(tl.int32)
    o_n = i_b * BM + tl.arange(0, BM)
    m_n = o_n < N
    o_n = tl.minimum(o_n, N - 1).to(tl.int64)
    p_h = hidden + o_n * s_hn
    r_rate = rate_of(tl.load(tau + o_n))[:, None]  # [BM, 1]

    # By row and thread: a thread keeps the statistics of its tokens, and they meet at the end.
    b_bad = tl.full((BM, THREADS), float("-inf"), tl.float32)  # the largest logit, NaN if any is
    b_top = tl.full((BM, THREADS), FLOOR, tl.float32)
    b_bound = tl.zeros((BM, THREADS), tl.float32)
    b_total = b_bound
    b_moment = b_bound
    if slots is not None:
        b_top = tl.broadcast_to(tl.load(before_max + o_n)[:, None], BM, THREADS)
        b_bound = lower_bound(before_sum, o_n, m_n, eps, THREADS)
    if ref_hidden is not None:
        p_r = ref_hidden + o_n * s_rn
        b_ref_top = tl.full((BM, THREADS), FLOOR, tl.float32)
        b_ref_total = tl.zeros((BM, THREADS), tl.float32)
    if slots is not None:
        k0, k1 = load_key(seed)
        if SERIALISE:
            k0, k1 = warp_scalar(k0, TARGET), warp_scalar(k1, TARGET)
        row_lo, row_hi = identities(row_ids, first_row, o_n)
        o_group = (group_start.to(tl.uint32) + tl.arange(0, THREADS).to(tl.uint32)).to(tl.int32, bitcast=True)
        b_count = tl.zeros((BM, THREADS), tl.int32)
        slots += tl.load(places + i_s)
        capacity = tl.load(room + i_s)
    WIDTH: tl.constexpr = BN + BN2
    for i_t in tl.range(i_s * TILES, tl.minimum(i_s * TILES + TILES, tl.cdiv(V + SKEW, WIDTH)), disable_licm=True):
        first = i_t * WIDTH - SKEW
        o_v = (first + 4 * tl.arange(0, THREADS))[None, :]
        if weight is None:
            column = (i_t - start * TILES) * WIDTH
            b_tile = buffered_logits(p_h, column, bias, softcap, V, first, WIDTH=WIDTH, THREADS=THREADS)
            if ref_hidden is not None:
                b_ref_tile = buffered_logits(p_r, column, ref_bias, ref_softcap, V, first, WIDTH=WIDTH, THREADS=THREADS)
        else:
            b_tile = logits(
                p_h, s_hk, weight, s_wv, s_wk, bias, softcap, H, V, first, o_n, BM=BM, BN=BN, BK=BK, BN2=BN2,
                EVEN_K=EVEN_K, THREADS=THREADS, PERMUTED=PERMUTED,
            )  # fmt: skip
            if ref_hidden is not None:
                b_ref_tile = logits(
                    p_r, s_rk, ref_weight, s_uv, s_uk, ref_bias, ref_softcap, R, V, first, o_n, BM=BM, BN=BN, BK=BK,
                    BN2=BN2, EVEN_K=EVEN_R, THREADS=THREADS, PERMUTED=PERMUTED,
                )  # fmt: skip
        for i in tl.static_range(WIDTH // (4 * THREADS)):
            b_l = b_tile[4 * i : 4 * i + 4]  # four of [BM, THREADS]
            b_peak = largest(b_l)
            b_bad = nan_max(b_bad, b_peak)
            b_raised = tl.maximum(b_top, b_peak * r_rate)
            b_shift = b_top - b_raised
            b_scale = tl.exp2(b_shift)
            b_d = distances(b_l, r_rate, b_raised)
            b_e = powers(b_d)
            # The moment counts from the maxima. They have moved by b_shift, and the moment with them.
            b_moment = b_scale * (b_moment + _weighted(b_total, b_shift))
            if ref_hidden is not None:
                b_ref_l = b_ref_tile[4 * i : 4 * i + 4]
                b_ref_raised = nan_max(b_ref_top, largest(b_ref_l) * r_rate)  # NaN and +inf show in its own statistics
                b_shift = b_ref_top - b_ref_raised
                b_moment -= _weighted(b_total * b_scale, b_shift)
                b_ref_d = distances(b_ref_l, r_rate, b_ref_raised)
                b_ref_total = tl.fma(b_ref_total, tl.exp2(b_shift), total_of(powers(b_ref_d)))
                b_ref_top = b_ref_raised
            for j in tl.static_range(4):
                b_moment += _weighted(b_e[j], b_d[j] if ref_hidden is None else b_d[j] - b_ref_d[j])
            b_total = tl.fma(b_total, b_scale, total_of(b_e))
            b_top = b_raised
            if slots is not None:
                b_bound *= b_scale
                b_group = (o_group + (i_t * (WIDTH // 4) + i * THREADS)).to(tl.uint32, bitcast=True)[None, :]
                b_group = in_layout_of(b_group, b_l[0], TARGET)
                if SERIALISE:
                    b_group = with_dependency(b_group, (b_total, b_moment, b_bad), zero=N >> 31)
                b_w = philox(b_group, row_lo, row_hi, tl.full((), DOMAIN_SUPPORT, tl.uint32), k0, k1, FAST)
                b_threshold = tl.fma(b_total, eps, b_bound)
                b_count = collect(
                    slots, s_slots, o_n, b_count, capacity, b_threshold, b_w, b_e, b_l, o_v + 4 * THREADS * i,
                    THREADS=THREADS, TARGET=TARGET,
                )  # fmt: skip
    o_p = o_n * splits + i_s
    r_top = tl.max(b_top, 1)
    b_shift = b_top - r_top[:, None]
    b_scale = tl.exp2(b_shift)
    tl.store(total + o_p, weighted_sum(b_total, b_scale, 1), mask=m_n)
    if ref_hidden is not None:
        r_ref_top = row_max(b_ref_top)
        b_ref_shift = b_ref_top - r_ref_top[:, None]
        b_shift -= b_ref_shift
        tl.store(ref_top + o_p, r_ref_top, mask=m_n)
        tl.store(ref_total + o_p, weighted_sum(b_ref_total, tl.exp2(b_ref_shift), 1), mask=m_n)
    tl.store(moment + o_p, tl.sum(_weighted(b_scale, b_moment + _weighted(b_total, b_shift)), 1), mask=m_n)
    # NaN, +inf and only -inf in this split show in its maximum.
    tl.store(top + o_p, tl.where(row_max(b_bad) < float("inf"), r_top, float("nan")), mask=m_n)
    if slots is not None:
        tl.store(counts + o_p, tl.max(b_count, 1), mask=m_n)


@triton.jit(do_not_specialize=["splits"])
def softmax_combine_kernel(
    top, total, moment, ref_top, ref_total, tau, out_max, out_sum, out_moment, out_ref_max, out_ref_sum, splits,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """A row's statistics from its splits'; NaN for a row without a distribution."""
    i_n = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BLOCK_S)
    m_s = o_s < splits
    o_p = i_n * splits + o_s
    r_rate = rate_of(tl.load(tau + i_n))
    r_max, r_sum, b_max, b_scale = combined(top, total, o_p, m_s)
    b_moment = tl.load(moment + o_p, mask=m_s, other=0.0)  # [BLOCK_S]
    b_shift = b_max - r_max
    r_logit = r_max / r_rate
    r_total, r_excess = relative_to(r_logit, r_rate, r_max, r_sum)
    tl.store(out_max + i_n, tl.where(r_sum > 0, r_logit, float("nan")))
    tl.store(out_sum + i_n, r_total)
    if ref_top is not None:
        r_ref_max, r_ref_sum, b_ref_max, _ = combined(ref_top, ref_total, o_p, m_s)
        b_shift -= b_ref_max - r_ref_max
        r_logit = r_ref_max / r_rate
        r_ref_sum, r_ref_excess = relative_to(r_logit, r_rate, r_ref_max, r_ref_sum)
        r_excess -= r_ref_excess
        tl.store(out_ref_max + i_n, r_logit)
        tl.store(out_ref_sum + i_n, r_ref_sum)
    b_moment += _weighted(tl.load(total + o_p, mask=m_s, other=0.0), b_shift)
    tl.store(out_moment + i_n, (tl.sum(_weighted(b_scale, b_moment), 0) / r_sum - r_excess) * LN2)


def _softmax(
    head: Head, tau: torch.Tensor, drawn: RowNoise, ref: Head | None, plan: Plan, sizes: TritonSizes
) -> tuple[Softmax, SplitPass]:
    """The statistics of a batch of rows, and the pass that has collected candidates."""
    rows, device = head.hidden.shape[0], head.hidden.device
    split_pass = SplitPass(rows, plan, drawn, device)
    (moment,) = empty_aligned(1, rows, plan.splits, device=device)
    ref_top, ref_total = (None, None) if ref is None else empty_aligned(2, rows, plan.splits, device=device)
    shared = {"moment": moment, "ref_top": ref_top, "ref_total": ref_total, "tau": tau}
    heads, no_ref = ((head,), NO_REF) if ref is None else ((head, ref), {})
    split_pass.launch(
        head_softmax_kernel, product_of(plan, sizes, drawn.vocab_start, *heads), **shared, **no_ref
    )  # fmt: skip
    logit_max, relaxed_total, row_moment = empty_aligned(3, rows, device=device)
    ref_max, ref_sum = empty_aligned(2, 0 if ref is None else rows, device=device)
    split_pass.combine(
        softmax_combine_kernel, **shared, out_max=logit_max, out_sum=relaxed_total, out_moment=row_moment,
        out_ref_max=ref_max, out_ref_sum=ref_sum,
    )  # fmt: skip
    return Softmax(logit_max, relaxed_total, row_moment, ref_max, ref_sum), split_pass


def head_softmax(
    head: Head,
    tau: torch.Tensor,
    noise: Noise,
    eps: float,
    ref: Head | None,
    capacity: int,
    sizes: TritonSizes,
    chunked: bool = False,
) -> tuple[Softmax, Support]:
    """`Backend.head_softmax`, for at least one row, by tiles or `chunked`; a row's support may take `capacity` entries."""
    if ref is not None and ref.hidden.dtype != head.hidden.dtype and not chunked:  # one tile serves both
        head, ref = (h._replace(hidden=h.hidden.float(), weight=h.weight.float()) for h in (head, ref))
    drawn, tau = RowNoise.of(noise, head.hidden.device), tau.contiguous()
    plan = Plan.of(head.weight.shape[0], noise.vocab_start, eps, sizes, chunked)

    def run(batch: slice) -> tuple[Softmax, Support]:
        ref_rows = None if ref is None else ref.rows(batch)
        found, split_pass = _softmax(head.rows(batch), tau[batch], drawn.batch(batch), ref_rows, plan, sizes)
        support = split_pass.support(
            capacity, tau=tau[batch], score_max=found.logit_max, total=found.total, shift=0.0,
            domain=DOMAIN_SUPPORT.value,
        )  # fmt: skip
        return found, support

    with launching(head.hidden):
        statistics, support = in_batches(head.hidden.shape[0], plan, sizes, run)
    return Softmax(*statistics), support
