"""`head_sample` and `head_scores`: one fused pass of product, noise, statistics and candidates through a head.

A program leaves its split's statistics in `[N, splits]` arrays and its candidates in slots of its own; `head_support`
combines them. There are no atomics, so two runs agree bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grade_kernels.backends.records import Head, Noise, Sample, Support
from grade_kernels.backends.triton import head_support
from grade_kernels.backends.triton.head import (
    FLOOR,
    NOWHERE,
    RowNoise,
    after,
    beside,
    collect,
    distances,
    empties,
    head_options,
    identities,
    largest,
    logits,
    nan_max,
    powers,
    row_max,
    row_total,
    split_count,
    total_of,
    uniform,
)
from grade_kernels.backends.triton.head_ptx import REFINE, REFINE_OPERANDS
from grade_kernels.backends.triton.philox import (
    DOMAIN_GUMBEL,
    DOMAIN_REFINE,
    LN2,
    LOG2E,
    REFINE_BELOW,
    SHIFT,
    load_key,
    philox,
    scaled_noise,
)
from grade_kernels.backends.triton.tiles import launching


@triton.jit
def _refined(n, w, group, row_lo, row_hi, k0, k1, TARGET: tl.constexpr):
    """Scaled noise n of a group's words w: for words below REFINE_BELOW by a second word."""
    if TARGET == "cuda":
        n = tl.inline_asm_elementwise(
            REFINE, REFINE_OPERANDS, n + w + (group, row_lo, row_hi, k0, k1), dtype=(tl.float32,) * 4, is_pure=True,
            pack=1,
        )  # fmt: skip
    else:
        least = tl.minimum(tl.minimum(w[0], w[1]), tl.minimum(w[2], w[3]))
        if tl.max((least < REFINE_BELOW).to(tl.int32)) > 0:
            f = philox(group, row_lo, row_hi, tl.full((), DOMAIN_REFINE, tl.uint32), k0, k1, False)
            refined = ()
            for i in tl.static_range(4):
                refined += (n[i] + _refinement(w[i], f[i]),)
            n = refined
    return n


@triton.jit
def _refinement(w, fine):
    """What the second word adds to scaled noise: E is u for words so small, to 3e-8."""
    u = tl.fma(fine.to(tl.float32) + 0.5, 2.0**-32, w.to(tl.float32))
    return tl.where(w < REFINE_BELOW, tl.log2(u) - tl.log2(w.to(tl.float32) + 0.5), 0.0)


@triton.jit(do_not_specialize=["N", "V", "splits", "group_start", "first_row", "first_split", "step", "softcap", "eps"])
def head_scores_kernel(
    hidden, weight, bias, seed, row_ids, tau, before_max, before_sum,
    best, index, plain_max, plain_sum, top, total, slots, counts, places, room,
    s_slots, s_hn, s_hk, s_wv, s_wk, N, V, H, softcap, eps, group_start, first_row, first_split, splits, step,
    SKEW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, MORE: tl.constexpr,
    ORDERED: tl.constexpr, TILES: tl.constexpr, EVEN_K: tl.constexpr, THREADS: tl.constexpr,
    PERMUTED: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """One split of BM rows: best score and its token, plain max and sum; with tau the tempered sum; with slots too.

    before_max, before_sum (with slots): what earlier launches know of the rows' normaliser, a lower bound that candidates
    must beat. The tempered sum is relative to `top`, the larger of before_max and the split's best score.
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
    if ORDERED:
        k0, k1 = uniform(k0, TARGET), uniform(k1, TARGET)
    row_lo, row_hi = identities(row_ids, first_row, o_n)
    p_h = hidden + o_n * s_hn
    o_group = (group_start.to(tl.uint32) + tl.arange(0, THREADS).to(tl.uint32)).to(tl.int32, bitcast=True)

    # By row and thread: a thread keeps the statistics of its tokens, and they meet at the end.
    b_best = tl.full((BM, THREADS), float("-inf"), tl.float32)
    b_id = tl.zeros((BM, THREADS), tl.int32)
    b_max = tl.full((BM, THREADS), FLOOR, tl.float32)
    b_sum = tl.zeros((BM, THREADS), tl.float32)
    if tau is not None:
        rate = LOG2E / tl.load(tau + o_n)[:, None]
        b_top = b_max
        b_bound = b_sum
        if slots is not None:
            b_top = tl.broadcast_to(tl.load(before_max + o_n)[:, None], BM, THREADS)
            b_bound = tl.broadcast_to((eps * tl.load(before_sum + o_n))[:, None], BM, THREADS)
        b_total = tl.zeros((BM, THREADS), tl.float32)
    if slots is not None:
        count = tl.zeros((BM, THREADS), tl.int32)
        slots += tl.load(places + i_s)
        capacity = tl.load(room + i_s)
    WIDTH: tl.constexpr = BN + MORE
    for i_t in tl.range(i_s * TILES, tl.minimum(i_s * TILES + TILES, tl.cdiv(V + SKEW, WIDTH)), disable_licm=True):
        first = i_t * WIDTH - SKEW
        tile = logits(
            p_h, s_hk, weight, s_wv, s_wk, bias, softcap, H, V, first, o_n,
            BM, BN, BK, MORE, EVEN_K, THREADS, PERMUTED,
        )  # fmt: skip
        o_v = (first + 4 * tl.arange(0, THREADS))[None, :]
        if ORDERED:  # ids of a large tile would each be kept from its start
            b_in = tl.full((BM, THREADS), -1, tl.int32)  # the best token's place in the tile, if it lies there
        for i in tl.static_range(WIDTH // (4 * THREADS)):
            x = tile[4 * i : 4 * i + 4]
            b_raised = tl.maximum(b_max, largest(x) * LOG2E)
            b_sum = tl.fma(b_sum, tl.exp2(b_max - b_raised), total_of(powers(distances(x, LOG2E, b_raised))))
            b_max = b_raised

            group = (o_group + (i_t * (WIDTH // 4) + i * THREADS)).to(tl.uint32, bitcast=True)[None, :]
            group = beside(group, x[0], TARGET)
            if ORDERED:
                group = after(group, (b_sum, b_in) if tau is None else (b_sum, b_in, b_total), N >> 31)
            w = philox(group, row_lo, row_hi, tl.full((), DOMAIN_GUMBEL, tl.uint32), k0, k1, FAST)
            n = (
                scaled_noise(w[0], w[0], tl.float32, FAST, False), scaled_noise(w[1], w[1], tl.float32, FAST, False),
                scaled_noise(w[2], w[2], tl.float32, FAST, False), scaled_noise(w[3], w[3], tl.float32, FAST, False),
            )  # fmt: skip
            n = _refined(n, w, group, row_lo, row_hi, k0, k1, TARGET)
            s = (
                tl.fma(n[0], -LN2, x[0]), tl.fma(n[1], -LN2, x[1]), tl.fma(n[2], -LN2, x[2]), tl.fma(n[3], -LN2, x[3]),
            )  # fmt: skip
            b_peak = largest(s)
            if ORDERED:
                o_in = tl.where(s[2] == b_peak, 4 * THREADS * i + 2, 4 * THREADS * i + 3)
                o_in = tl.where(s[1] == b_peak, 4 * THREADS * i + 1, o_in)
                b_in = tl.where(b_peak > b_best, tl.where(s[0] == b_peak, 4 * THREADS * i, o_in), b_in)
            else:
                o_in = tl.where(s[0] == b_peak, 0, tl.where(s[1] == b_peak, 1, tl.where(s[2] == b_peak, 2, 3)))
                b_id = tl.where(b_peak > b_best, o_v + 4 * THREADS * i + o_in, b_id)
            b_best = nan_max(b_best, b_peak)
            if tau is not None:
                b_raised = tl.maximum(b_top, b_best * rate)
                b_scale = tl.exp2(b_top - b_raised)
                e = powers(distances(s, rate, b_raised))
                b_total = tl.fma(b_total, b_scale, total_of(e))
                b_bound *= b_scale
                b_top = b_raised
            if slots is not None:
                threshold = tl.fma(b_total, eps, b_bound)
                count = collect(
                    slots, s_slots, o_n, count, capacity, threshold, w, e, s, o_v + 4 * THREADS * i, THREADS, TARGET
                )
        if ORDERED:
            b_id = tl.where(b_in >= 0, o_v + b_in, b_id)
    o_p = o_n * splits + i_s
    m_best = row_max(b_best)
    tl.store(best + o_p, m_best, mask=m_n)
    tl.store(index + o_p, tl.min(tl.where(b_best == m_best[:, None], b_id, NOWHERE), 1), mask=m_n)
    m_max, m_sum = row_total(b_max, b_sum)
    tl.store(plain_max + o_p, m_max, mask=m_n)
    tl.store(plain_sum + o_p, m_sum, mask=m_n)
    if tau is not None:
        m_max, m_sum = row_total(b_top, b_total)
        tl.store(top + o_p, m_max, mask=m_n)
        tl.store(total + o_p, m_sum, mask=m_n)
    if slots is not None:
        tl.store(counts + o_p, tl.max(count, 1), mask=m_n)


def _run(
    head: Head, tau: torch.Tensor | None, drawn: RowNoise, eps: float, capacity: int
) -> tuple[Sample, torch.Tensor, Support | None]:
    """One batch of rows. Without tau only the sample; without eps no support."""
    rows, vocab, device = head.hidden.shape[0], head.weight.shape[0], head.hidden.device
    splits = split_count(vocab, drawn.vocab_start)
    options = head_options(drawn.vocab_start, head)
    shared = {"splits": splits, "BLOCK_S": triton.next_power_of_2(splits)}
    best, plain_max, plain_sum, top, total = empties(5, rows, splits, device=device)
    index = torch.empty(rows, splits, dtype=torch.int32, device=device)
    before_max, before_sum = None, None
    candidates = head_support.Candidates(rows, splits, eps, device) if eps > 0 else None
    if candidates is not None:
        before_max, before_sum = empties(2, rows, device=device)
        # Splits that have not run yet weigh nothing.
        top.fill_(FLOOR.value)
        total.zero_()
    for launch in head_support.schedule(splits, eps):
        if candidates is not None:
            head_support.normalizer_kernel[(rows,)](top, total, before_max, before_sum, **shared, num_warps=1)
        head_scores_kernel[(triton.cdiv(rows, options["BM"]) * launch.number,)](
            head.hidden, head.weight, head.bias, drawn.seed, drawn.row_ids, tau, before_max, before_sum,
            best, index, plain_max, plain_sum, top, total, *head_support.slot_arguments(candidates),
            *head.hidden.stride(), *head.weight.stride(), eps=eps * head_support.MARGIN * 2.0**-32,
            first_row=drawn.first_row, first_split=launch.first, splits=splits, step=head_support.stride(splits), **options,
        )  # fmt: skip
    ids = torch.empty(rows, dtype=torch.int64, device=device)
    score_max, logit_max, logit_sum, row_total = empties(4, rows, device=device)
    head_support.sample_combine_kernel[(rows,)](
        best, index, plain_max, plain_sum, top, total, tau, ids, score_max, logit_max, logit_sum, row_total,
        V=vocab, SHIFT=SHIFT, **shared, num_warps=1,
    )  # fmt: skip
    support = None
    if candidates is not None and tau is not None:
        support = candidates.support(
            capacity, tau, score_max, row_total, drawn, SHIFT.value, DOMAIN_GUMBEL.value, options["TARGET"] == "cuda"
        )
    return Sample(ids, score_max, logit_max, logit_sum), row_total, support


def head_sample(head: Head, noise: Noise) -> Sample:
    """`Backend.head_sample`, for at least one row."""
    with launching(head.hidden):
        return _run(head, None, RowNoise.of(noise, head.hidden.device), 0.0, 0)[0]


def head_scores(
    head: Head, tau: torch.Tensor, noise: Noise, eps: float, capacity: int
) -> tuple[Sample, torch.Tensor, Support]:
    """`Backend.head_scores`, for at least one row; a row's support may take `capacity` entries."""
    rows = head.hidden.shape[0]
    drawn, tau = RowNoise.of(noise, head.hidden.device), tau.contiguous()
    parts = []
    with launching(head.hidden):
        for batch in head_support.batches(rows, split_count(head.weight.shape[0], noise.vocab_start), eps):
            parts.append(_run(head.rows(batch), tau[batch], drawn.batch(batch), eps, capacity))
    sample = Sample(*(torch.cat(columns) for columns in zip(*(part[0] for part in parts), strict=True)))
    supports = [part[2] for part in parts if part[2] is not None]
    support = head_support.joined(supports) if supports else Support.empty(rows, head.hidden)
    return sample, torch.cat([part[1] for part in parts]), support
