"""`head_softmax`: statistics and support of a head's noise-free softmax, alone or beside a reference's, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grade_kernels.backends.records import Head, Noise, Softmax, Support
from grade_kernels.backends.triton import head_support
from grade_kernels.backends.triton.head import (
    FLOOR,
    RowNoise,
    after,
    beside,
    collect,
    distances,
    empties,
    head_options,
    identities,
    is_even,
    largest,
    logits,
    nan_max,
    powers,
    row_max,
    split_count,
    total_of,
    uniform,
)
from grade_kernels.backends.triton.philox import DOMAIN_SUPPORT, LN2, LOG2E, load_key, philox
from grade_kernels.backends.triton.tiles import launching


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
    N, V, H, R, softcap, ref_softcap, eps, group_start, first_row, first_split, splits, step,
    SKEW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, MORE: tl.constexpr,
    ORDERED: tl.constexpr, TILES: tl.constexpr, EVEN_K: tl.constexpr, EVEN_R: tl.constexpr,
    THREADS: tl.constexpr, PERMUTED: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """One split of BM rows: max, tempered sum and moment, with a reference its max and sum, with slots candidates.

    Maxima are of logits times rate, in units of log2, and sums relative to them. The moment is the sum of weight times
    (l - top), less (r - ref_top) with a reference r.
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
    rate = LOG2E / tl.load(tau + o_n)[:, None]

    # By row and thread: a thread keeps the statistics of its tokens, and they meet at the end.
    b_bad = tl.full((BM, THREADS), float("-inf"), tl.float32)  # the largest logit, NaN if any is
    b_top = tl.full((BM, THREADS), FLOOR, tl.float32)
    b_bound = tl.zeros((BM, THREADS), tl.float32)
    b_total = b_bound
    b_moment = b_bound
    if slots is not None:
        b_top = tl.broadcast_to(tl.load(before_max + o_n)[:, None], BM, THREADS)
        b_bound = tl.broadcast_to((eps * tl.load(before_sum + o_n))[:, None], BM, THREADS)
    if ref_hidden is not None:
        p_r = ref_hidden + o_n * s_rn
        b_ref_top = tl.full((BM, THREADS), FLOOR, tl.float32)
        b_ref_total = tl.zeros((BM, THREADS), tl.float32)
    if slots is not None:
        k0, k1 = load_key(seed)
        if ORDERED:
            k0, k1 = uniform(k0, TARGET), uniform(k1, TARGET)
        row_lo, row_hi = identities(row_ids, first_row, o_n)
        o_group = (group_start.to(tl.uint32) + tl.arange(0, THREADS).to(tl.uint32)).to(tl.int32, bitcast=True)
        count = tl.zeros((BM, THREADS), tl.int32)
        slots += tl.load(places + i_s)
        capacity = tl.load(room + i_s)
    WIDTH: tl.constexpr = BN + MORE
    for i_t in tl.range(i_s * TILES, tl.minimum(i_s * TILES + TILES, tl.cdiv(V + SKEW, WIDTH)), disable_licm=True):
        first = i_t * WIDTH - SKEW
        o_v = (first + 4 * tl.arange(0, THREADS))[None, :]
        tile = logits(
            p_h, s_hk, weight, s_wv, s_wk, bias, softcap, H, V, first, o_n,
            BM, BN, BK, MORE, EVEN_K, THREADS, PERMUTED,
        )  # fmt: skip
        if ref_hidden is not None:
            ref_tile = logits(
                p_r, s_rk, ref_weight, s_uv, s_uk, ref_bias, ref_softcap, R, V, first, o_n,
                BM, BN, BK, MORE, EVEN_R, THREADS, PERMUTED,
            )  # fmt: skip
        for i in tl.static_range(WIDTH // (4 * THREADS)):
            x = tile[4 * i : 4 * i + 4]
            b_peak = largest(x)
            b_bad = nan_max(b_bad, b_peak)
            b_raised = tl.maximum(b_top, b_peak * rate)
            b_shift = b_top - b_raised
            b_scale = tl.exp2(b_shift)
            d = distances(x, rate, b_raised)
            e = powers(d)
            # The moment counts from the maxima, which have moved.
            b_moment = b_scale * (b_moment + _weighted(b_total, b_shift))
            if ref_hidden is not None:
                r = ref_tile[4 * i : 4 * i + 4]
                b_ref_raised = nan_max(b_ref_top, largest(r) * rate)  # NaN and +inf show in its own statistics
                b_shift = b_ref_top - b_ref_raised
                b_moment -= _weighted(b_total * b_scale, b_shift)
                r = distances(r, rate, b_ref_raised)
                b_ref_total = tl.fma(b_ref_total, tl.exp2(b_shift), total_of(powers(r)))
                b_ref_top = b_ref_raised
            for j in tl.static_range(4):
                b_moment += _weighted(e[j], d[j] if ref_hidden is None else d[j] - r[j])
            b_total = tl.fma(b_total, b_scale, total_of(e))
            b_top = b_raised
            if slots is not None:
                b_bound *= b_scale
                group = (o_group + (i_t * (WIDTH // 4) + i * THREADS)).to(tl.uint32, bitcast=True)[None, :]
                group = beside(group, x[0], TARGET)
                if ORDERED:
                    group = after(group, (b_total, b_moment, b_bad), N >> 31)
                w = philox(group, row_lo, row_hi, tl.full((), DOMAIN_SUPPORT, tl.uint32), k0, k1, FAST)
                threshold = tl.fma(b_total, eps, b_bound)
                count = collect(
                    slots, s_slots, o_n, count, capacity, threshold, w, e, x, o_v + 4 * THREADS * i, THREADS, TARGET
                )
    o_p = o_n * splits + i_s
    m_top = tl.max(b_top, 1)
    b_shift = b_top - m_top[:, None]
    b_scale = tl.exp2(b_shift)
    tl.store(total + o_p, tl.sum(b_total * b_scale, 1), mask=m_n)
    if ref_hidden is not None:
        m_ref_top = row_max(b_ref_top)
        b_ref_shift = b_ref_top - m_ref_top[:, None]
        b_shift -= b_ref_shift
        tl.store(ref_top + o_p, m_ref_top, mask=m_n)
        tl.store(ref_total + o_p, tl.sum(b_ref_total * tl.exp2(b_ref_shift), 1), mask=m_n)
    tl.store(moment + o_p, tl.sum(_weighted(b_scale, b_moment + _weighted(b_total, b_shift)), 1), mask=m_n)
    # NaN, +inf and only -inf in this split show in its maximum.
    tl.store(top + o_p, tl.where(row_max(b_bad) < float("inf"), m_top, float("nan")), mask=m_n)
    if slots is not None:
        tl.store(counts + o_p, tl.max(count, 1), mask=m_n)


@triton.jit(do_not_specialize=["splits"])
def softmax_combine_kernel(
    top, total, moment, ref_top, ref_total, tau, out_max, out_sum, out_moment, out_ref_max, out_ref_sum, splits,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """A row's statistics from its splits'; NaN for a row without a distribution."""
    i_n = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BLOCK_S)
    m_s = o_s < splits
    o = i_n * splits + o_s
    rate = LOG2E / tl.load(tau + i_n)
    m_max, m_sum, b_max, b_scale = head_support.combined(top, total, o, m_s)
    b_moment = tl.load(moment + o, mask=m_s, other=0.0)
    b_shift = b_max - m_max
    m_logit = m_max / rate
    m_total, m_excess = head_support.relative_to(m_logit, rate, m_max, m_sum)
    tl.store(out_max + i_n, tl.where(m_sum > 0, m_logit, float("nan")))
    tl.store(out_sum + i_n, m_total)
    if ref_top is not None:
        m_ref_max, m_ref_sum, b_ref_max, _ = head_support.combined(ref_top, ref_total, o, m_s)
        b_shift -= b_ref_max - m_ref_max
        m_logit = m_ref_max / rate
        m_ref_sum, m_ref_excess = head_support.relative_to(m_logit, rate, m_ref_max, m_ref_sum)
        m_excess -= m_ref_excess
        tl.store(out_ref_max + i_n, m_logit)
        tl.store(out_ref_sum + i_n, m_ref_sum)
    b_moment += _weighted(tl.load(total + o, mask=m_s, other=0.0), b_shift)
    tl.store(out_moment + i_n, (tl.sum(_weighted(b_scale, b_moment), 0) / m_sum - m_excess) * LN2)


def _run(
    head: Head, tau: torch.Tensor, drawn: RowNoise, eps: float, ref: Head | None, capacity: int
) -> tuple[Softmax, Support | None]:
    """One batch of rows."""
    rows, vocab, device = head.hidden.shape[0], head.weight.shape[0], head.hidden.device
    splits = split_count(vocab, drawn.vocab_start)
    options = head_options(drawn.vocab_start, head, *(() if ref is None else (ref,)))
    shared = {"splits": splits, "BLOCK_S": triton.next_power_of_2(splits)}
    top, total, moment = empties(3, rows, splits, device=device)
    ref_top, ref_total = (None, None) if ref is None else empties(2, rows, splits, device=device)
    before_max, before_sum = None, None
    candidates = head_support.Candidates(rows, splits, eps, device) if eps > 0 else None
    if candidates is not None:
        before_max, before_sum = empties(2, rows, device=device)
        # Splits that have not run yet weigh nothing.
        top.fill_(FLOOR.value)
        total.zero_()
    ref_tensors = (None, None, None) if ref is None else ref[:3]
    ref_strides = (0, 0, 0, 0) if ref is None else (*ref.hidden.stride(), *ref.weight.stride())
    width = 0 if ref is None else ref.hidden.shape[1]
    for launch in head_support.schedule(splits, eps):
        if candidates is not None:
            head_support.normalizer_kernel[(rows,)](top, total, before_max, before_sum, **shared, num_warps=1)
        head_softmax_kernel[(triton.cdiv(rows, options["BM"]) * launch.number,)](
            *head[:3], *ref_tensors, drawn.seed, drawn.row_ids, tau, before_max, before_sum,
            top, total, moment, ref_top, ref_total, *head_support.slot_arguments(candidates),
            *head.hidden.stride(), *head.weight.stride(), *ref_strides, R=width,
            ref_softcap=None if ref is None else ref.softcap, eps=eps * head_support.MARGIN * 2.0**-32,
            first_row=drawn.first_row, first_split=launch.first, splits=splits, step=head_support.stride(splits),
            EVEN_R=is_even(width, options["BK"]), **options,
        )  # fmt: skip
    row_max, row_total, row_moment = empties(3, rows, device=device)
    ref_max, ref_sum = empties(2, 0 if ref is None else rows, device=device)
    softmax_combine_kernel[(rows,)](
        top, total, moment, ref_top, ref_total, tau, row_max, row_total, row_moment, ref_max, ref_sum,
        **shared, num_warps=1,
    )  # fmt: skip
    support = None
    if candidates is not None:
        support = candidates.support(
            capacity, tau, row_max, row_total, drawn, 0.0, DOMAIN_SUPPORT.value, options["TARGET"] == "cuda"
        )
    return Softmax(row_max, row_total, row_moment, ref_max, ref_sum), support


def head_softmax(
    head: Head, tau: torch.Tensor, noise: Noise, eps: float, ref: Head | None, capacity: int
) -> tuple[Softmax, Support]:
    """`Backend.head_softmax`, for at least one row; a row's support may take `capacity` entries."""
    rows = head.hidden.shape[0]
    if ref is not None and ref.hidden.dtype != head.hidden.dtype:  # one set of tiles serves both
        head, ref = (h._replace(hidden=h.hidden.float(), weight=h.weight.float()) for h in (head, ref))
    drawn, tau = RowNoise.of(noise, head.hidden.device), tau.contiguous()
    parts = []
    with launching(head.hidden):
        for batch in head_support.batches(rows, split_count(head.weight.shape[0], noise.vocab_start), eps):
            ref_batch = None if ref is None else ref.rows(batch)
            parts.append(_run(head.rows(batch), tau[batch], drawn.batch(batch), eps, ref_batch, capacity))
    sums = Softmax(*(torch.cat(columns) for columns in zip(*(part[0] for part in parts), strict=True)))
    supports = [part[1] for part in parts if part[1] is not None]
    return sums, head_support.joined(supports) if supports else Support.empty(rows, head.hidden)
