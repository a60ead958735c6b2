"""`head_sample` and `head_scores`: one fused pass of product, noise, statistics and candidates through a head.

A program leaves its split's statistics in `[N, splits]` arrays and its candidates in slots of its own; `head_support`
combines them. There are no atomics, so two runs agree bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grade_kernels.backends.records import Head, Noise, Sample, Support
from grade_kernels.backends.triton.head_chunks import buffered_logits, product_of
from grade_kernels.backends.triton.head_ptx import REFINE, REFINE_OPERANDS
from grade_kernels.backends.triton.head_support import Plan, SplitPass, combined, in_batches, relative_to
from grade_kernels.backends.triton.head_tiles import (
    FLOOR,
    NOWHERE,
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
    row_total,
    total_of,
    warp_scalar,
    with_dependency,
)
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
from grade_kernels.backends.triton.scores import rate_of, score
from grade_kernels.backends.triton.sizes import TritonSizes
from grade_kernels.backends.triton.targets import launching


@triton.jit
def _refined(b_n, b_w, b_group, stream, TARGET: tl.constexpr):
    """Scaled noise n of a group's words w: for words below REFINE_BELOW by a second word."""
    if TARGET == "cuda":
        b_n = tl.inline_asm_elementwise(
            REFINE, REFINE_OPERANDS, b_n + b_w + (b_group,) + stream, dtype=(tl.float32,) * 4, is_pure=True, pack=1
        )
    else:
        row_lo, row_hi, k0, k1 = stream
        b_least = tl.minimum(tl.minimum(b_w[0], b_w[1]), tl.minimum(b_w[2], b_w[3]))
        if tl.max((b_least < REFINE_BELOW).to(tl.int32)) > 0:
            b_fine = philox(b_group, row_lo, row_hi, tl.full((), DOMAIN_REFINE, tl.uint32), k0, k1, False)
            b_refined = ()
            for i in tl.static_range(4):
                b_refined += (b_n[i] + _refinement(b_w[i], b_fine[i]),)
            b_n = b_refined
    return b_n


@triton.jit
def _refinement(b_w, b_fine):
    """What the second word adds to scaled noise. For w < 256, E = -log1p(-u) is u within 3e-8 of it."""
    b_u = tl.fma(b_fine.to(tl.float32) + 0.5, 2.0**-32, b_w.to(tl.float32))
    return tl.where(b_w < REFINE_BELOW, tl.log2(b_u) - tl.log2(b_w.to(tl.float32) + 0.5), 0.0)


@triton.jit(
    do_not_specialize=["N", "V", "splits", "group_start", "first_row", "first_split", "start", "step", "softcap", "eps"]
)
def head_scores_kernel(
    hidden, weight, bias, seed, row_ids, tau, before_max, before_sum,
    best, index, plain_max, plain_sum, top, total, slots, counts, places, room,
    s_slots, s_hn, s_hk, s_wv, s_wk, N, V, H, softcap, eps, group_start, first_row, first_split, start, splits, step,
    SKEW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BN2: tl.constexpr,
    SERIALISE: tl.constexpr, TILES: tl.constexpr, EVEN_K: tl.constexpr, THREADS: tl.constexpr,
    PERMUTED: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """One split of BM rows: best score and its token, and of the logits ("plain") max and sum.

    Without a weight, `hidden` is a buffer that holds the product of the splits from `start` on (see `head_chunks`).
    With tau also the tempered sum of the scores, relative to `top`: the larger of before_max and the split's best score.
    With slots also candidates. They must beat a lower bound of the row's normaliser: before_max and before_sum are what
    earlier launches know of it.
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
    if SERIALISE:
        k0, k1 = warp_scalar(k0, TARGET), warp_scalar(k1, TARGET)
    row_lo, row_hi = identities(row_ids, first_row, o_n)
    p_h = hidden + o_n * s_hn
    o_group = (group_start.to(tl.uint32) + tl.arange(0, THREADS).to(tl.uint32)).to(tl.int32, bitcast=True)

    # By row and thread: a thread keeps the statistics of its tokens, and they meet at the end.
    b_best = tl.full((BM, THREADS), float("-inf"), tl.float32)
    b_id = tl.zeros((BM, THREADS), tl.int32)
    b_max = tl.full((BM, THREADS), FLOOR, tl.float32)
    b_sum = tl.zeros((BM, THREADS), tl.float32)
    if tau is not None:
        r_rate = rate_of(tl.load(tau + o_n))[:, None]  # [BM, 1]
        b_top = b_max
        b_bound = b_sum
        if slots is not None:
            b_top = tl.broadcast_to(tl.load(before_max + o_n)[:, None], BM, THREADS)
            b_bound = lower_bound(before_sum, o_n, m_n, eps, THREADS)
        b_total = tl.zeros((BM, THREADS), tl.float32)
    if slots is not None:
        b_count = tl.zeros((BM, THREADS), tl.int32)
        slots += tl.load(places + i_s)
        capacity = tl.load(room + i_s)
    WIDTH: tl.constexpr = BN + BN2
    for i_t in tl.range(i_s * TILES, tl.minimum(i_s * TILES + TILES, tl.cdiv(V + SKEW, WIDTH)), disable_licm=True):
        first = i_t * WIDTH - SKEW
        if weight is None:
            b_tile = buffered_logits(
                p_h, (i_t - start * TILES) * WIDTH, bias, softcap, V, first, WIDTH=WIDTH, THREADS=THREADS
            )
        else:
            b_tile = logits(
                p_h, s_hk, weight, s_wv, s_wk, bias, softcap, H, V, first, o_n, BM=BM, BN=BN, BK=BK, BN2=BN2,
                EVEN_K=EVEN_K, THREADS=THREADS, PERMUTED=PERMUTED,
            )  # fmt: skip
        o_v = (first + 4 * tl.arange(0, THREADS))[None, :]
        if SERIALISE:
            # Ids of a large tile's tokens would each be computed before the tile, and take a register until their turn. So
            # the best token is known by its place in the tile, -1 if it lies in an earlier one.
            b_in = tl.full((BM, THREADS), -1, tl.int32)
        for i in tl.static_range(WIDTH // (4 * THREADS)):
            b_l = b_tile[4 * i : 4 * i + 4]  # four of [BM, THREADS]
            b_raised = tl.maximum(b_max, largest(b_l) * LOG2E)
            b_sum = tl.fma(b_sum, tl.exp2(b_max - b_raised), total_of(powers(distances(b_l, LOG2E, b_raised))))
            b_max = b_raised

            b_group = (o_group + (i_t * (WIDTH // 4) + i * THREADS)).to(tl.uint32, bitcast=True)[None, :]
            b_group = in_layout_of(b_group, b_l[0], TARGET)
            if SERIALISE:
                b_group = with_dependency(
                    b_group, (b_sum, b_in) if tau is None else (b_sum, b_in, b_total), zero=N >> 31
                )  # fmt: skip
            b_w = philox(b_group, row_lo, row_hi, tl.full((), DOMAIN_GUMBEL, tl.uint32), k0, k1, FAST)
            b_n = (
                scaled_noise(b_w[0], b_w[0], tl.float32, FAST, False),
                scaled_noise(b_w[1], b_w[1], tl.float32, FAST, False),
                scaled_noise(b_w[2], b_w[2], tl.float32, FAST, False),
                scaled_noise(b_w[3], b_w[3], tl.float32, FAST, False),
            )
            b_n = _refined(b_n, b_w, b_group, (row_lo, row_hi, k0, k1), TARGET)
            b_s = (
                score(b_n[0], b_l[0]),
                score(b_n[1], b_l[1]),
                score(b_n[2], b_l[2]),
                score(b_n[3], b_l[3]),
            )
            b_peak = largest(b_s)
            if SERIALISE:
                b_at = tl.where(b_s[2] == b_peak, 4 * THREADS * i + 2, 4 * THREADS * i + 3)
                b_at = tl.where(b_s[1] == b_peak, 4 * THREADS * i + 1, b_at)
                b_in = tl.where(b_peak > b_best, tl.where(b_s[0] == b_peak, 4 * THREADS * i, b_at), b_in)
            else:
                b_at = tl.where(b_s[0] == b_peak, 0, tl.where(b_s[1] == b_peak, 1, tl.where(b_s[2] == b_peak, 2, 3)))
                b_id = tl.where(b_peak > b_best, o_v + 4 * THREADS * i + b_at, b_id)
            b_best = nan_max(b_best, b_peak)
            if tau is not None:
                b_raised = tl.maximum(b_top, b_best * r_rate)
                b_scale = tl.exp2(b_top - b_raised)
                b_e = powers(distances(b_s, r_rate, b_raised))
                b_total = tl.fma(b_total, b_scale, total_of(b_e))
                b_bound *= b_scale
                b_top = b_raised
            if slots is not None:
                b_threshold = tl.fma(b_total, eps, b_bound)
                b_count = collect(
                    slots, s_slots, o_n, b_count, capacity, b_threshold, b_w, b_e, b_s, o_v + 4 * THREADS * i,
                    THREADS=THREADS, TARGET=TARGET,
                )  # fmt: skip
        if SERIALISE:
            b_id = tl.where(b_in >= 0, o_v + b_in, b_id)
    o_p = o_n * splits + i_s
    r_best = row_max(b_best)
    tl.store(best + o_p, r_best, mask=m_n)
    tl.store(index + o_p, tl.min(tl.where(b_best == r_best[:, None], b_id, NOWHERE), 1), mask=m_n)
    r_max, r_sum = row_total(b_max, b_sum)
    tl.store(plain_max + o_p, r_max, mask=m_n)
    tl.store(plain_sum + o_p, r_sum, mask=m_n)
    if tau is not None:
        r_max, r_sum = row_total(b_top, b_total)
        tl.store(top + o_p, r_max, mask=m_n)
        tl.store(total + o_p, r_sum, mask=m_n)
    if slots is not None:
        tl.store(counts + o_p, tl.max(b_count, 1), mask=m_n)


@triton.jit(do_not_specialize=["splits", "V"])
def sample_combine_kernel(
    best, index, plain_max, plain_sum, top, total, tau, ids, score_max, out_max, out_sum, out_total, splits, V,
    SHIFT: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """A row's sample from its splits'; ties go to the smaller id."""
    i_n = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BLOCK_S)
    m_s = o_s < splits
    o_p = i_n * splits + o_s
    b_best = tl.load(best + o_p, mask=m_s, other=float("-inf"))  # [BLOCK_S]
    r_best = tl.reduce(b_best, 0, nan_max)
    nan = tl.full((), float("nan"), tl.float32)
    r_best = tl.where(tl.abs(r_best) < float("inf"), r_best, nan)
    i_v = tl.min(tl.where(b_best == r_best, tl.load(index + o_p, mask=m_s, other=NOWHERE), NOWHERE), 0)
    tl.store(ids + i_n, tl.minimum(i_v, V - 1).to(tl.int64))  # a bad row's lies in the vocabulary as well
    tl.store(score_max + i_n, r_best + SHIFT)
    r_max, r_sum, _, _ = combined(plain_max, plain_sum, o_p, m_s)
    r_logit = r_max * LN2
    r_sum, _ = relative_to(r_logit, LOG2E, r_max, r_sum)
    is_bad = r_best != r_best
    tl.store(out_max + i_n, tl.where(is_bad, nan, r_logit))
    tl.store(out_sum + i_n, tl.where(is_bad, nan, r_sum))
    if tau is not None:
        r_max, r_sum, _, _ = combined(top, total, o_p, m_s)
        r_sum, _ = relative_to(r_best, rate_of(tl.load(tau + i_n)), r_max, r_sum)
        tl.store(out_total + i_n, r_sum)


def _sample(
    head: Head, tau: torch.Tensor | None, drawn: RowNoise, plan: Plan, sizes: TritonSizes
) -> tuple[Sample, torch.Tensor, SplitPass]:
    """The sample of a batch of rows, with tau their tempered sum `[N]`, and the pass that has collected candidates."""
    rows, device = head.hidden.shape[0], head.hidden.device
    split_pass = SplitPass(rows, plan, drawn, device)
    best, plain_max, plain_sum = empty_aligned(3, rows, plan.splits, device=device)
    index = torch.empty(rows, plan.splits, dtype=torch.int32, device=device)
    shared = {"best": best, "index": index, "plain_max": plain_max, "plain_sum": plain_sum, "tau": tau}
    split_pass.launch(head_scores_kernel, product_of(plan, sizes, drawn.vocab_start, head), **shared)
    ids = torch.empty(rows, dtype=torch.int64, device=device)
    score_max, logit_max, logit_sum, score_total = empty_aligned(4, rows, device=device)
    split_pass.combine(
        sample_combine_kernel, **shared, ids=ids, score_max=score_max, out_max=logit_max, out_sum=logit_sum,
        out_total=score_total, V=head.weight.shape[0], SHIFT=SHIFT,
    )  # fmt: skip
    return Sample(ids, score_max, logit_max, logit_sum), score_total, split_pass


def head_sample(head: Head, noise: Noise, sizes: TritonSizes, chunked: bool = False) -> Sample:
    """`Backend.head_sample`, for at least one row, by tiles or `chunked`."""
    drawn = RowNoise.of(noise, head.hidden.device)
    plan = Plan.of(head.weight.shape[0], noise.vocab_start, 0.0, sizes, chunked)

    def run(batch: slice) -> tuple[tuple[torch.Tensor, ...], Support]:
        sample, _, _ = _sample(head.rows(batch), None, drawn.batch(batch), plan, sizes)
        return sample, Support.empty(len(sample.ids), head.hidden)

    with launching(head.hidden):
        return Sample(*in_batches(head.hidden.shape[0], plan, sizes, run)[0])


def head_scores(
    head: Head, tau: torch.Tensor, noise: Noise, eps: float, capacity: int, sizes: TritonSizes, chunked: bool = False
) -> tuple[Sample, torch.Tensor, Support]:
    """`Backend.head_scores`, for at least one row, by tiles or `chunked`; a row's support may take `capacity` entries."""
    drawn, tau = RowNoise.of(noise, head.hidden.device), tau.contiguous()
    plan = Plan.of(head.weight.shape[0], noise.vocab_start, eps, sizes, chunked)

    def run(batch: slice) -> tuple[tuple[torch.Tensor, ...], Support]:
        sample, total, split_pass = _sample(head.rows(batch), tau[batch], drawn.batch(batch), plan, sizes)
        support = split_pass.support(
            capacity, tau=tau[batch], score_max=sample.score_max, total=total, shift=SHIFT.value,
            domain=DOMAIN_GUMBEL.value,
        )  # fmt: skip
        return (*sample, total), support

    with launching(head.hidden):
        (*sample, total), support = in_batches(head.hidden.shape[0], plan, sizes, run)
    return Sample(*sample), total, support
