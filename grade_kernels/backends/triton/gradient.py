"""`softmax_backward`: the gradient of the logits for every estimator, and of tau, given the gradient of the relaxation.

Two passes over the logits and the incoming gradient, one program per row and split in each. The first leaves the sums
that the softmax's Jacobian needs, `[4, N, SPLITS]`; the second reads its row's in a fixed order and writes the result,
which may take the place of the incoming gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grade_kernels.backends.layouts import flat, written_flat
from grade_kernels.backends.native import contiguous
from grade_kernels.backends.records import GradientRule, Rows, Sample
from grade_kernels.backends.triton.philox import LOG2E, REFINE_BELOW, SHIFT, row_stream, strip_noise
from grade_kernels.backends.triton.scores import rate_of, score
from grade_kernels.backends.triton.sizes import TritonSizes
from grade_kernels.backends.triton.strips import launch_options, load_strip, split_bounds, store_strip, sum_splits
from grade_kernels.backends.triton.targets import launching
from grade_kernels.dtypes import compute_dtype
from grade_kernels.estimators import is_noisy
from grade_kernels.noise import seed_on


@triton.jit
def _sums(
    p_l, p_dy, s_lv, s_dyv, V, group_start, stream, r_pivot, r_rate, strip_lo, strip_hi, state,
    SKEW: tl.constexpr, LANES: tl.constexpr, STRIPS: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
    ALIGNED: tl.constexpr, NOISY: tl.constexpr, REINMAX: tl.constexpr, MASKED: tl.constexpr, REFINE: tl.constexpr,
):  # fmt: skip
    """Fold strips into the lanes' state: sums of w, w * dy and, untempered, exp(l - max) * dy; least word."""
    b_total, b_dot, b_plain, b_low = state
    o_group = (group_start + tl.arange(0, LANES // 4).to(tl.uint32)).to(tl.int32, bitcast=True)
    for i_t in range(strip_lo, strip_hi, STRIPS):
        for i_r in tl.static_range(STRIPS):
            first = (i_t + i_r) * LANES - SKEW
            b_l = load_strip(p_l, s_lv, first, V, float("-inf"), LANES, DTYPE, ALIGNED, MASKED)  # [LANES]
            b_dy = load_strip(p_dy, s_dyv, first, V, 0.0, LANES, DTYPE, ALIGNED, MASKED)  # [LANES]
            b_dy = tl.where(b_l == float("-inf"), 0.0, b_dy)  # a masked token's may be infinite
            b_s = b_l
            if NOISY:
                b_group = (o_group + (i_t + i_r) * (LANES // 4)).to(tl.uint32, bitcast=True)
                b_n, b_least = strip_noise(b_group, stream, DTYPE, FAST, REFINE)
                b_low = tl.minimum(b_low, b_least)
                b_s = score(b_n, b_l)
            b_w = tl.exp2((b_s - r_pivot) * r_rate)
            b_total += b_w
            b_dot = tl.fma(b_w, b_dy, b_dot)
            if REINMAX:
                b_plain = tl.fma(tl.exp2((b_l - r_pivot) * LOG2E), b_dy, b_plain)
    return b_total, b_dot, b_plain, b_low


@triton.jit(do_not_specialize=["N", "group_start"])
def softmax_backward_sums_kernel(
    dy, logits, tau, seed, row_ids, pivots, ids, partial, s_dyn, s_dyv, s_ln, s_lv, s_tau, N, V, group_start,
    SKEW: tl.constexpr, LANES: tl.constexpr, STRIPS: tl.constexpr, TILES: tl.constexpr, SPLITS: tl.constexpr,
    DTYPE: tl.constexpr, FAST: tl.constexpr, ALIGNED: tl.constexpr, NOISY: tl.constexpr,
    REINMAX: tl.constexpr,
):  # fmt: skip
    """One split of one row into `partial` `[4, N, SPLITS]`.

    Its four planes: sum of w, sum of w * dy, then for reinmax the sum of exp(l - max) * dy and dy of the token, else
    whether the noise needs refinement.
    """
    i_p = tl.program_id(0).to(tl.int64)
    i_n, i_s = i_p // SPLITS, (i_p % SPLITS).to(tl.int32)
    stream = row_stream(seed, row_ids, i_n)
    group_start = group_start.to(tl.uint32)
    p_l = logits + i_n * s_ln
    p_dy = dy + i_n * s_dyn
    r_pivot = tl.load(pivots + i_n)
    if NOISY:
        r_pivot -= SHIFT
    r_rate = rate_of(tl.load(tau + i_n * s_tau))
    lo, full, hi = split_bounds(i_s, V, SKEW, LANES, STRIPS, TILES)
    b_zero = tl.zeros((LANES,), DTYPE)
    fresh = (b_zero, b_zero, b_zero, tl.full((LANES // 4,), 0xFFFFFFFF, tl.uint32))
    state = _sums(
        p_l, p_dy, s_lv, s_dyv, V, group_start, stream, r_pivot, r_rate, strip_lo=lo, strip_hi=full, state=fresh,
        SKEW=SKEW, LANES=LANES, STRIPS=STRIPS, DTYPE=DTYPE, FAST=FAST, ALIGNED=ALIGNED, NOISY=NOISY, REINMAX=REINMAX,
        MASKED=False, REFINE=False,
    )  # fmt: skip
    state = _sums(
        p_l, p_dy, s_lv, s_dyv, V, group_start, stream, r_pivot, r_rate, strip_lo=full, strip_hi=hi, state=state,
        SKEW=SKEW, LANES=LANES, STRIPS=1, DTYPE=DTYPE, FAST=FAST, ALIGNED=ALIGNED, NOISY=NOISY, REINMAX=REINMAX,
        MASKED=True, REFINE=False,
    )  # fmt: skip
    plane = N.to(tl.int64) * SPLITS
    if NOISY:
        is_fine = tl.min(state[3].to(tl.int64), 0) < REFINE_BELOW
        tl.store(partial + 2 * plane + i_p, is_fine.to(DTYPE))
        if is_fine:
            # One split in two thousand holds such a word. It is done again; the others pay one minimum per word.
            state = _sums(
                p_l, p_dy, s_lv, s_dyv, V, group_start, stream, r_pivot, r_rate, strip_lo=lo, strip_hi=hi, state=fresh,
                SKEW=SKEW, LANES=LANES, STRIPS=1, DTYPE=DTYPE, FAST=FAST, ALIGNED=ALIGNED, NOISY=NOISY,
                REINMAX=REINMAX, MASKED=True, REFINE=True,
            )  # fmt: skip
    tl.store(partial + i_p, tl.sum(state[0], 0))
    tl.store(partial + plane + i_p, tl.sum(state[1], 0))
    if REINMAX:
        tl.store(partial + 2 * plane + i_p, tl.sum(state[2], 0))
        # The second pass may overwrite it. So it is read here.
        tl.store(partial + 3 * plane + i_p, tl.load(p_dy + tl.load(ids + i_n) * s_dyv).to(DTYPE))


@triton.jit
def _apply(
    p_l, p_dy, p_out, s_lv, s_dyv, s_outv, V, group_start, stream, rule, strip_lo, strip_hi, b_dtau,
    SKEW: tl.constexpr, LANES: tl.constexpr, STRIPS: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr,
    ALIGNED: tl.constexpr, NOISY: tl.constexpr, REINMAX: tl.constexpr, LOGPROB: tl.constexpr, DTAU: tl.constexpr,
    MASKED: tl.constexpr, REFINE: tl.constexpr,
):  # fmt: skip
    """Write the gradient of some strips, and fold its product with the scores' distance from the best into b_dtau.

    rule: what a row's gradient needs besides logits, noise and dy, as `softmax_backward_apply_kernel` puts it together.
    """
    r_pivot, r_rate, r_dot, r_factor, i_id, r_top, r_plain_dot, r_plain_factor, r_dlogprob = rule
    o_group = (group_start + tl.arange(0, LANES // 4).to(tl.uint32)).to(tl.int32, bitcast=True)
    for i_t in range(strip_lo, strip_hi, STRIPS):
        # out may be dy, and no load may move above a store. So all loads come first.
        b_l = ()
        b_dy = ()
        for i_r in tl.static_range(STRIPS):
            first = (i_t + i_r) * LANES - SKEW
            b_l = b_l + (load_strip(p_l, s_lv, first, V, float("-inf"), LANES, DTYPE, ALIGNED, MASKED),)  # [LANES]
            b_dy = b_dy + (load_strip(p_dy, s_dyv, first, V, 0.0, LANES, DTYPE, ALIGNED, MASKED),)  # [LANES]
        for i_r in tl.static_range(STRIPS):
            first = (i_t + i_r) * LANES - SKEW
            b_s = b_l[i_r]
            if NOISY:
                b_group = (o_group + (i_t + i_r) * (LANES // 4)).to(tl.uint32, bitcast=True)
                b_n, _ = strip_noise(b_group, stream, DTYPE, FAST, REFINE)
                b_s = score(b_n, b_l[i_r])
            b_s -= r_pivot
            b_w = tl.exp2(b_s * r_rate) * r_factor
            if REINMAX or LOGPROB:
                b_hit = (first + tl.arange(0, LANES) == i_id).to(DTYPE)
                b_p = tl.exp2((b_l[i_r] - r_top) * LOG2E) * r_plain_factor
            if REINMAX:
                # 2 J((O + w) / 2) dy - J(p) dy / 2, where O is the one-hot vector of the token
                b_dl = (b_w + b_hit) * (b_dy[i_r] - r_dot) - 0.5 * b_p * (b_dy[i_r] - r_plain_dot)
            else:
                b_dl = b_w * (b_dy[i_r] - r_dot)
            m_v = b_l[i_r] == float("-inf")
            if DTAU:
                b_dtau += tl.where(b_s == float("-inf"), 0.0, b_dl * b_s)  # masked, or as good as
            if LOGPROB:
                b_dl += r_dlogprob * (b_hit - b_p)
            # A masked token's dy may be anything, yet its gradient is exactly 0. In a row without a distribution it is NaN.
            b_dl = tl.where(m_v, r_pivot * 0.0, b_dl)
            store_strip(p_out, s_outv, first, V, b_dl, MASKED)
    return b_dtau


@triton.jit(do_not_specialize=["N", "group_start"])
def softmax_backward_apply_kernel(
    dy, logits, tau, seed, row_ids, pivots, ids, logit_max, logit_sum, dlogprobs, partial, partial_dtau, out,
    s_dyn, s_dyv, s_ln, s_lv, s_outn, s_outv, s_tau, N, V, group_start,
    SKEW: tl.constexpr, LANES: tl.constexpr, STRIPS: tl.constexpr, TILES: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr, ALIGNED: tl.constexpr, NOISY: tl.constexpr,
    REINMAX: tl.constexpr,
):  # fmt: skip
    """One split of one row of the gradient, and of dtau (`partial_dtau` `[N, SPLITS]`) unless that is None."""
    i_p = tl.program_id(0).to(tl.int64)
    i_n, i_s = i_p // SPLITS, (i_p % SPLITS).to(tl.int32)
    LOGPROB: tl.constexpr = dlogprobs is not None
    DTAU: tl.constexpr = partial_dtau is not None
    stream = row_stream(seed, row_ids, i_n)
    group_start = group_start.to(tl.uint32)
    p_l = logits + i_n * s_ln
    p_dy = dy + i_n * s_dyn
    p_out = out + i_n * s_outn
    r_pivot = tl.load(pivots + i_n)
    if NOISY:
        r_pivot -= SHIFT
    r_tau = tl.load(tau + i_n * s_tau)
    r_rate = rate_of(r_tau)

    plane = N.to(tl.int64) * SPLITS
    o_s = tl.arange(0, BLOCK_S)
    m_s = o_s < SPLITS
    p_partial = partial + i_n * SPLITS + o_s
    r_total = tl.sum(tl.load(p_partial, mask=m_s, other=0.0), 0)  # of [BLOCK_S], as those below
    r_dot = tl.sum(tl.load(p_partial + plane, mask=m_s, other=0.0), 0) / r_total
    r_factor = 1.0 / r_total
    # Where a rule does not read one of these, any value will do.
    i_id = i_s
    r_top = r_pivot
    r_plain_dot = r_dot
    r_plain_factor = r_factor
    r_dlogprob = r_pivot
    if REINMAX or LOGPROB:
        i_id = tl.load(ids + i_n).to(tl.int32)
        r_top = tl.load(logit_max + i_n)
        r_plain_factor = 1.0 / tl.load(logit_sum + i_n)
    if LOGPROB:
        r_dlogprob = tl.load(dlogprobs + i_n)
    if REINMAX:
        r_plain_dot = tl.sum(tl.load(p_partial + 2 * plane, mask=m_s, other=0.0), 0) * r_plain_factor
        r_dot = 0.5 * (r_dot + tl.load(partial + 3 * plane + i_p))
    else:
        r_factor = r_factor / r_tau
    rule = (r_pivot, r_rate, r_dot, r_factor, i_id, r_top, r_plain_dot, r_plain_factor, r_dlogprob)

    lo, full, hi = split_bounds(i_s, V, SKEW, LANES, STRIPS, TILES)
    b_dtau = tl.zeros((LANES,), DTYPE)
    is_fine = False
    if NOISY:
        is_fine = tl.load(partial + 2 * plane + i_p) > 0
    if is_fine:
        b_dtau = _apply(
            p_l, p_dy, p_out, s_lv, s_dyv, s_outv, V, group_start, stream, rule, strip_lo=lo, strip_hi=hi,
            b_dtau=b_dtau, SKEW=SKEW, LANES=LANES, STRIPS=1, DTYPE=DTYPE, FAST=FAST, ALIGNED=ALIGNED, NOISY=NOISY,
            REINMAX=REINMAX, LOGPROB=LOGPROB, DTAU=DTAU, MASKED=True, REFINE=True,
        )  # fmt: skip
    else:
        b_dtau = _apply(
            p_l, p_dy, p_out, s_lv, s_dyv, s_outv, V, group_start, stream, rule, strip_lo=lo, strip_hi=full,
            b_dtau=b_dtau, SKEW=SKEW, LANES=LANES, STRIPS=STRIPS, DTYPE=DTYPE, FAST=FAST, ALIGNED=ALIGNED, NOISY=NOISY,
            REINMAX=REINMAX, LOGPROB=LOGPROB, DTAU=DTAU, MASKED=False, REFINE=False,
        )  # fmt: skip
        b_dtau = _apply(
            p_l, p_dy, p_out, s_lv, s_dyv, s_outv, V, group_start, stream, rule, strip_lo=full, strip_hi=hi,
            b_dtau=b_dtau, SKEW=SKEW, LANES=LANES, STRIPS=1, DTYPE=DTYPE, FAST=FAST, ALIGNED=ALIGNED, NOISY=NOISY,
            REINMAX=REINMAX, LOGPROB=LOGPROB, DTAU=DTAU, MASKED=True, REFINE=False,
        )  # fmt: skip
    if DTAU:
        tl.store(partial_dtau + i_p, -tl.sum(b_dtau, 0) / r_tau)


def softmax_backward(
    dy: torch.Tensor, rows: Rows, sample: Sample, rule: GradientRule, out: torch.Tensor, sizes: TritonSizes
) -> torch.Tensor:
    """`Backend.softmax_backward`."""
    logits, upstream, (_, tau, noise) = flat(rows.logits), flat(dy), rows
    count, device = len(logits), logits.device
    dtype = compute_dtype(logits.dtype)
    noisy, reinmax = is_noisy(rule.estimator), rule.estimator == "reinmax"
    needs_dtau = rule.needs_dtau and not reinmax
    dtau = (torch.empty if needs_dtau else torch.zeros)(count, dtype=dtype, device=device)
    if count == 0:
        return dtau
    options = launch_options(sizes, noise.vocab_start, logits, upstream)
    splits = options["SPLITS"]
    partial_dtau = torch.empty(count, splits, dtype=dtype, device=device) if needs_dtau else None
    shared = {
        "dy": upstream, "s_dyn": upstream.stride(0), "s_dyv": upstream.stride(1),
        "logits": logits, "s_ln": logits.stride(0), "s_lv": logits.stride(1), "tau": tau, "s_tau": tau.stride(0),
        "seed": seed_on(noise.seed, device), "row_ids": contiguous(noise.row_ids),
        "pivots": (sample.score_max if noisy else sample.logit_max).contiguous(), "ids": sample.ids.contiguous(),
        "partial": torch.empty(4, count, splits, dtype=dtype, device=device),
        "N": count, "NOISY": noisy, "REINMAX": reinmax, **options,
    }  # fmt: skip
    with launching(logits), written_flat(out) as gradient:
        softmax_backward_sums_kernel[(count * splits,)](**shared)
        softmax_backward_apply_kernel[(count * splits,)](
            **shared, logit_max=sample.logit_max.contiguous(), logit_sum=sample.logit_sum.contiguous(),
            dlogprobs=contiguous(rule.dlogprobs), partial_dtau=partial_dtau, out=gradient, s_outn=gradient.stride(0),
            s_outv=gradient.stride(1), BLOCK_S=triton.next_power_of_2(splits),
        )  # fmt: skip
        if partial_dtau is not None:
            sum_splits(partial_dtau, dtau)
    return dtau
