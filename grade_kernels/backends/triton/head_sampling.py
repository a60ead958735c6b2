"""`head_sample` and `head_scores`: one fused pass of product, noise, statistics and candidates through a head.

A program leaves its split's statistics in `[N, splits]` arrays and its candidates in slots of its own; `head_support`
combines them. There are no atomics, so two runs agree bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grade_kernels import noise
from grade_kernels.backends import Head, Sample, Support
from grade_kernels.backends.torch import head as fallback
from grade_kernels.backends.triton import head_support
from grade_kernels.backends.triton.head import (
    LOWEST,
    NOWHERE,
    beside,
    collect,
    head_options,
    logits,
    nan_max,
    noise_arguments,
    row_max,
    split_count,
    weights,
)
from grade_kernels.backends.triton.philox import (
    DOMAIN_GUMBEL,
    DOMAIN_REFINE,
    LN2,
    LOG2E,
    REFINE_BELOW,
    SHIFT,
    load_key,
    log2,
    philox,
    scaled_noise,
    split_row,
)
from grade_kernels.backends.triton.tiles import launching


@triton.jit
def _best(b_0, b_1, b_2, b_3, o_g):
    """Maximum `[BM]` of a tile of scores and its token, the smallest of several."""
    b_peak = nan_max(nan_max(b_0, b_1), nan_max(b_2, b_3))
    m_best = row_max(b_peak)
    o_in = tl.where(b_0 == b_peak, 0, tl.where(b_1 == b_peak, 1, tl.where(b_2 == b_peak, 2, 3)))
    i_v = tl.min(tl.where(b_peak == m_best[:, None], o_g[None, :] + o_in, NOWHERE), 1)
    return m_best, i_v


@triton.jit
def _refinement(w, fine, FAST: tl.constexpr):
    """What the second word adds to the noise of words below REFINE_BELOW, 0 for others: E is u there, to 3e-8."""
    u = tl.fma(fine.to(tl.float32) + 0.5, 2.0**-32, w.to(tl.float32))
    return tl.where(w < REFINE_BELOW, -LN2 * (log2(u, FAST) - log2(w.to(tl.float32) + 0.5, FAST)), 0.0)


@triton.jit(do_not_specialize=["N", "V", "splits", "group_start", "first_row", "first_split", "step", "softcap", "eps"])
def head_scores_kernel(
    hidden, weight, bias, seed, row_ids, tau, before_max, before_sum,
    best, index, plain_max, plain_sum, top, total, slots, counts, places, room,
    s_slots, s_hn, s_hk, s_wv, s_wk, N, V, H, softcap, eps, group_start, first_row, first_split, splits, step,
    SKEW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr,
    EVEN_K: tl.constexpr, PERMUTED: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """One split of BM rows: best score and its token, plain max and sum; with tau the tempered sum; with slots too.

    before_max, before_sum: what earlier launches know of the rows' normaliser, a lower bound that candidates must beat.
    The tempered sum is relative to `top`, the larger of before_max and the split's best score.
    """
    FAST: tl.constexpr = TARGET == "cuda"
    blocks = tl.cdiv(N, BM)
    i_p = tl.program_id(0)
    i_b = i_p % blocks
    i_s = ((first_split + i_p // blocks).to(tl.int64) * step % splits).to(tl.int32)
    o_n = i_b * BM + tl.arange(0, BM)
    m_n = o_n < N
    o_n = tl.minimum(o_n, N - 1).to(tl.int64)
    k0, k1 = load_key(seed)
    row_lo, row_hi = split_row(first_row + o_n if row_ids is None else tl.load(row_ids + o_n))
    p_h = hidden + o_n * s_hn
    o_group = (group_start.to(tl.uint32) + tl.arange(0, BN // 4).to(tl.uint32)).to(tl.int32, bitcast=True)

    b_best = tl.full((BM,), float("-inf"), tl.float32)
    b_id = tl.zeros((BM,), tl.int32)
    b_max = tl.full((BM,), LOWEST, tl.float32)
    b_sum = tl.zeros((BM,), tl.float32)
    if tau is not None:
        rate = LOG2E / tl.load(tau + o_n)
        b_top = b_max
        b_before = b_sum
        if before_max is not None:
            b_top = tl.load(before_max + o_n)
            b_before = tl.load(before_sum + o_n)
        b_total = tl.zeros((BM,), tl.float32)
    if slots is not None:
        count = tl.zeros((BM,), tl.int32)
        p_slots = slots + o_n * s_slots + tl.load(places + i_s)
        capacity = tl.load(room + i_s)
    for i_t in tl.range(i_s * TILES, tl.minimum(i_s * TILES + TILES, tl.cdiv(V + SKEW, BN)), disable_licm=True):
        first = i_t * BN - SKEW
        l_0, l_1, l_2, l_3 = logits(
            p_h, s_hk, weight, s_wv, s_wk, bias, softcap, H, V, first, o_n, BM, BN, BK, EVEN_K, PERMUTED
        )
        b_raised = tl.maximum(b_max, tl.max(tl.maximum(tl.maximum(l_0, l_1), tl.maximum(l_2, l_3)), 1))
        e_0, e_1, e_2, e_3 = weights(l_0, l_1, l_2, l_3, b_raised, LOG2E)
        b_sum = b_sum * tl.exp2((b_max - b_raised) * LOG2E) + tl.sum((e_0 + e_1) + (e_2 + e_3), 1)
        b_max = b_raised

        o_g = first + 4 * tl.arange(0, BN // 4)
        groups = (o_group + i_t * (BN // 4)).to(tl.uint32, bitcast=True)[None, :]
        c_lo, c_hi = row_lo[:, None], row_hi[:, None]
        w_0, w_1, w_2, w_3 = philox(
            beside(groups, l_0, TARGET), c_lo, c_hi, tl.full((), DOMAIN_GUMBEL, tl.uint32), k0, k1, FAST
        )
        s_0 = tl.fma(scaled_noise(w_0, w_0, tl.float32, FAST, False), -LN2, l_0)
        s_1 = tl.fma(scaled_noise(w_1, w_1, tl.float32, FAST, False), -LN2, l_1)
        s_2 = tl.fma(scaled_noise(w_2, w_2, tl.float32, FAST, False), -LN2, l_2)
        s_3 = tl.fma(scaled_noise(w_3, w_3, tl.float32, FAST, False), -LN2, l_3)
        least = tl.minimum(tl.minimum(w_0, w_1), tl.minimum(w_2, w_3))
        if tl.max((least < REFINE_BELOW).to(tl.int32)) > 0:
            # One tile in a thousand. The key is loaded anew so that the words are drawn anew: kept for this, they would
            # cost every tile their registers.
            c0, c1 = load_key(seed, volatile=True)
            again = beside(groups, s_0, TARGET)
            w_0, w_1, w_2, w_3 = philox(again, c_lo, c_hi, tl.full((), DOMAIN_GUMBEL, tl.uint32), c0, c1, FAST)
            f_0, f_1, f_2, f_3 = philox(again, c_lo, c_hi, tl.full((), DOMAIN_REFINE, tl.uint32), c0, c1, FAST)
            s_0 += _refinement(w_0, f_0, FAST)
            s_1 += _refinement(w_1, f_1, FAST)
            s_2 += _refinement(w_2, f_2, FAST)
            s_3 += _refinement(w_3, f_3, FAST)
        m_best, i_v = _best(s_0, s_1, s_2, s_3, o_g)
        b_id = tl.where(m_best > b_best, i_v, b_id)
        b_best = nan_max(b_best, m_best)
        if tau is not None:
            b_raised = tl.maximum(b_top, m_best)
            scale = tl.exp2((b_top - b_raised) * rate)
            b_top = b_raised
            e_0, e_1, e_2, e_3 = weights(s_0, s_1, s_2, s_3, b_top, rate[:, None])
            b_total = b_total * scale + tl.sum((e_0 + e_1) + (e_2 + e_3), 1)
            b_before *= scale
        if slots is not None:
            threshold = eps * (b_before + b_total)
            count = collect(
                p_slots, count, capacity, threshold, w_0, w_1, w_2, w_3, e_0, e_1, e_2, e_3, s_0, s_1, s_2, s_3, o_g,
                TARGET,
            )  # fmt: skip
    o_p = o_n * splits + i_s
    tl.store(best + o_p, b_best, mask=m_n)
    tl.store(index + o_p, b_id, mask=m_n)
    tl.store(plain_max + o_p, b_max, mask=m_n)
    tl.store(plain_sum + o_p, b_sum, mask=m_n)
    if tau is not None:
        tl.store(top + o_p, b_top, mask=m_n)
        tl.store(total + o_p, b_total, mask=m_n)
    if slots is not None:
        tl.store(counts + o_p, count, mask=m_n)


def _run(
    head: Head,
    tau: torch.Tensor | None,
    seed: torch.Tensor,
    row_ids: torch.Tensor | None,
    first_row: int,
    vocab_start: int,
    eps: float,
) -> tuple[Sample, torch.Tensor, Support | None]:
    """One batch of rows. Without tau only the sample; without eps no support."""
    rows, vocab, device = head.hidden.shape[0], head.weight.shape[0], head.hidden.device
    splits = split_count(vocab, vocab_start)
    options = head_options(head, vocab_start)
    shared = {"splits": splits, "BLOCK_S": triton.next_power_of_2(splits)}
    best, plain_max, plain_sum, top, total = torch.empty(5, rows, splits, device=device)
    index = torch.empty(rows, splits, dtype=torch.int32, device=device)
    before_max, before_sum = torch.empty(2, rows, device=device)
    candidates = head_support.Candidates(rows, splits, eps, device) if eps > 0 else None
    if candidates is not None:  # splits that have not run yet weigh nothing
        top.fill_(torch.finfo(torch.float32).min)
        total.zero_()
    for launch in head_support.schedule(splits, eps):
        if launch.first > 0:
            head_support.normalizer_kernel[(rows,)](top, total, tau, before_max, before_sum, **shared, num_warps=1)
        head_scores_kernel[(triton.cdiv(rows, options["BM"]) * launch.number,)](
            head.hidden, head.weight, head.bias, seed, row_ids, tau,
            before_max if launch.first > 0 else None, before_sum if launch.first > 0 else None,
            best, index, plain_max, plain_sum, top, total, *head_support.slot_arguments(candidates),
            *head.hidden.stride(), *head.weight.stride(), eps=eps * head_support.MARGIN * 2.0**-32,
            first_row=first_row, first_split=launch.first, splits=splits, step=head_support.stride(splits), **options,
        )  # fmt: skip
    ids = torch.empty(rows, dtype=torch.int64, device=device)
    score_max, logit_max, logit_sum, row_total = torch.empty(4, rows, device=device)
    head_support.sample_combine_kernel[(rows,)](
        best, index, plain_max, plain_sum, top, total, tau, ids, score_max, logit_max, logit_sum, row_total,
        V=vocab, SHIFT=SHIFT, **shared, num_warps=1,
    )  # fmt: skip
    support = None
    if candidates is not None and tau is not None:
        support = candidates.support(
            vocab, tau, score_max, row_total, seed, row_ids, first_row, vocab_start, SHIFT.value, noise.DOMAIN_GUMBEL,
            options["TARGET"] == "cuda",
        )  # fmt: skip
    return Sample(ids, score_max, logit_max, logit_sum), row_total, support


def head_sample(head: Head, seed: torch.Tensor, row_ids: torch.Tensor | None, vocab_start: int) -> Sample:
    """See `grade_kernels.backends`."""
    if head.hidden.dtype == torch.float64 or head.hidden.shape[0] == 0:
        return fallback.head_sample(head, seed, row_ids, vocab_start)
    with launching(head.hidden):
        return _run(head, None, *noise_arguments(head, seed, row_ids), 0, vocab_start, 0.0)[0]


def head_scores(
    head: Head, tau: torch.Tensor, seed: torch.Tensor, row_ids: torch.Tensor | None, vocab_start: int, eps: float
) -> tuple[Sample, torch.Tensor, Support]:
    """See `grade_kernels.backends`."""
    rows = head.hidden.shape[0]
    if head.hidden.dtype == torch.float64 or rows == 0:
        return fallback.head_scores(head, tau, seed, row_ids, vocab_start, eps)
    seed, row_ids = noise_arguments(head, seed, row_ids)
    tau = tau.contiguous()
    parts = []
    with launching(head.hidden):
        for batch in head_support.batches(rows, split_count(head.weight.shape[0], vocab_start), eps):
            parts.append(
                _run(
                    head._replace(hidden=head.hidden[batch]), tau[batch], seed,
                    None if row_ids is None else row_ids[batch], batch.start, vocab_start, eps,
                )
            )  # fmt: skip
    sample = Sample(*(torch.cat(columns) for columns in zip(*(part[0] for part in parts), strict=True)))
    supports = [part[2] for part in parts if part[2] is not None]
    support = head_support.joined(supports) if supports else fallback.empty_support(rows, head.hidden)
    return sample, torch.cat([part[1] for part in parts]), support
