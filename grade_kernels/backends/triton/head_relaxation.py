"""`head_softmax`: statistics and support of a head's noise-free softmax, alone or beside a reference's, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grade_kernels import noise
from grade_kernels.backends import Head, Softmax, Support
from grade_kernels.backends.torch import head as fallback
from grade_kernels.backends.triton import head_support
from grade_kernels.backends.triton.head import (
    LOWEST,
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
from grade_kernels.backends.triton.philox import LN2, LOG2E, load_key, philox, split_row
from grade_kernels.backends.triton.tiles import launching

DOMAIN_SUPPORT = tl.constexpr(noise.DOMAIN_SUPPORT)


@triton.jit
def _tile_max(b_0, b_1, b_2, b_3):
    return row_max(nan_max(nan_max(b_0, b_1), nan_max(b_2, b_3)))


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
    SKEW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_R: tl.constexpr, PERMUTED: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """One split of BM rows: max, tempered sum and moment, with a reference its max and sum, with slots candidates.

    Sums are relative to `top`, the larger of before_max and the split's largest logit. The moment is the sum of weight
    times (l - top), less (r - ref_top) with a reference r, in units of tau.
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
    rate = LOG2E / tl.load(tau + o_n)

    b_bad = tl.full((BM,), float("-inf"), tl.float32)  # the largest logit, NaN if any is
    b_top = tl.full((BM,), LOWEST, tl.float32)
    b_before = tl.zeros((BM,), tl.float32)
    if before_max is not None:
        b_top = tl.load(before_max + o_n)
        b_before = tl.load(before_sum + o_n)
    b_total = tl.zeros((BM,), tl.float32)
    b_moment = tl.zeros((BM,), tl.float32)
    if ref_hidden is not None:
        p_r = ref_hidden + o_n * s_rn
        b_ref_top = tl.full((BM,), LOWEST, tl.float32)
        b_ref_total = tl.zeros((BM,), tl.float32)
    if slots is not None:
        k0, k1 = load_key(seed)
        row_lo, row_hi = split_row(first_row + o_n if row_ids is None else tl.load(row_ids + o_n))
        o_group = (group_start.to(tl.uint32) + tl.arange(0, BN // 4).to(tl.uint32)).to(tl.int32, bitcast=True)
        count = tl.zeros((BM,), tl.int32)
        p_slots = slots + o_n * s_slots + tl.load(places + i_s)
        capacity = tl.load(room + i_s)
    for i_t in tl.range(i_s * TILES, tl.minimum(i_s * TILES + TILES, tl.cdiv(V + SKEW, BN)), disable_licm=True):
        first = i_t * BN - SKEW
        l_0, l_1, l_2, l_3 = logits(
            p_h, s_hk, weight, s_wv, s_wk, bias, softcap, H, V, first, o_n, BM, BN, BK, EVEN_K, PERMUTED
        )
        m_max = _tile_max(l_0, l_1, l_2, l_3)
        b_bad = nan_max(b_bad, m_max)
        b_raised = tl.maximum(b_top, m_max)
        shift = (b_top - b_raised) * rate
        scale = tl.exp2(shift)
        b_before *= scale
        e_0, e_1, e_2, e_3 = weights(l_0, l_1, l_2, l_3, b_raised, rate[:, None])
        c = b_raised[:, None]
        d_0, d_1, d_2, d_3 = l_0 - c, l_1 - c, l_2 - c, l_3 - c
        # The moment counts from the maxima, which have moved.
        b_moment = scale * (b_moment + _weighted(b_total, shift))
        if ref_hidden is None:
            x = _weighted(e_0, d_0) + _weighted(e_1, d_1) + _weighted(e_2, d_2) + _weighted(e_3, d_3)
        else:
            r_0, r_1, r_2, r_3 = logits(
                p_r, s_rk, ref_weight, s_uv, s_uk, ref_bias, ref_softcap, R, V, first, o_n, BM, BN, BK, EVEN_R, PERMUTED
            )
            m_max = _tile_max(r_0, r_1, r_2, r_3)
            b_ref_raised = nan_max(b_ref_top, m_max)  # NaN and +inf of the reference show in its own statistics
            ref_shift = (b_ref_top - b_ref_raised) * rate
            b_moment -= _weighted(b_total * scale, ref_shift)
            c = b_ref_raised[:, None]
            x = (_weighted(e_0, d_0 - (r_0 - c)) + _weighted(e_1, d_1 - (r_1 - c))) + (
                _weighted(e_2, d_2 - (r_2 - c)) + _weighted(e_3, d_3 - (r_3 - c))
            )
            r_0, r_1, r_2, r_3 = weights(r_0, r_1, r_2, r_3, b_ref_raised, rate[:, None])
            b_ref_total = b_ref_total * tl.exp2(ref_shift)
            b_ref_total += tl.sum((r_0 + r_1) + (r_2 + r_3), 1)
            b_ref_top = b_ref_raised
        b_moment += tl.sum(x, 1) * rate
        b_total = b_total * scale + tl.sum((e_0 + e_1) + (e_2 + e_3), 1)
        b_top = b_raised
        if slots is not None:
            o_g = first + 4 * tl.arange(0, BN // 4)
            groups = (o_group + i_t * (BN // 4)).to(tl.uint32, bitcast=True)[None, :]
            w_0, w_1, w_2, w_3 = philox(
                beside(groups, l_0, TARGET), row_lo[:, None], row_hi[:, None],
                tl.full((), DOMAIN_SUPPORT, tl.uint32), k0, k1, FAST,
            )  # fmt: skip
            count = collect(
                p_slots, count, capacity, eps * (b_before + b_total), w_0, w_1, w_2, w_3, e_0, e_1, e_2, e_3,
                l_0, l_1, l_2, l_3, o_g, TARGET,
            )  # fmt: skip
    o_p = o_n * splits + i_s
    # NaN, +inf and only -inf in this split show in its maximum.
    b_top = tl.where(b_bad < float("inf"), b_top, float("nan"))
    tl.store(top + o_p, b_top, mask=m_n)
    tl.store(total + o_p, b_total, mask=m_n)
    tl.store(moment + o_p, b_moment * LN2, mask=m_n)
    if ref_hidden is not None:
        tl.store(ref_top + o_p, b_ref_top, mask=m_n)
        tl.store(ref_total + o_p, b_ref_total, mask=m_n)
    if slots is not None:
        tl.store(counts + o_p, count, mask=m_n)


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
    m_max, m_sum, b_max, b_scale = head_support.combined(top, total, o, m_s, rate)
    m_max = tl.where(m_sum > 0, m_max, float("nan"))
    b_moment = tl.load(moment + o, mask=m_s, other=0.0)
    b_shift = b_max - m_max
    if ref_top is not None:
        m_ref_max, m_ref_sum, b_ref_max, _ = head_support.combined(ref_top, ref_total, o, m_s, rate)
        tl.store(out_ref_max + i_n, m_ref_max)
        tl.store(out_ref_sum + i_n, m_ref_sum)
        b_shift -= b_ref_max - m_ref_max
    b_moment += _weighted(tl.load(total + o, mask=m_s, other=0.0), b_shift * (rate * LN2))
    tl.store(out_max + i_n, m_max)
    tl.store(out_sum + i_n, m_sum)
    tl.store(out_moment + i_n, tl.sum(_weighted(b_scale, b_moment), 0) / m_sum)


def _run(
    head: Head,
    tau: torch.Tensor,
    seed: torch.Tensor,
    row_ids: torch.Tensor | None,
    first_row: int,
    vocab_start: int,
    eps: float,
    ref: Head | None,
) -> tuple[Softmax, Support | None]:
    """One batch of rows."""
    rows, vocab, device = head.hidden.shape[0], head.weight.shape[0], head.hidden.device
    splits = split_count(vocab, vocab_start)
    options = head_options(head, vocab_start, 1 if ref is None else 2)
    shared = {"splits": splits, "BLOCK_S": triton.next_power_of_2(splits)}
    top, total, moment = torch.empty(3, rows, splits, device=device)
    ref_top, ref_total = (None, None) if ref is None else torch.empty(2, rows, splits, device=device)
    before_max, before_sum = torch.empty(2, rows, device=device)
    candidates = head_support.Candidates(rows, splits, eps, device) if eps > 0 else None
    if candidates is not None:  # splits that have not run yet weigh nothing
        top.fill_(torch.finfo(torch.float32).min)
        total.zero_()
    ref_tensors = (None, None, None) if ref is None else ref[:3]
    ref_strides = (0, 0, 0, 0) if ref is None else (*ref.hidden.stride(), *ref.weight.stride())
    width = 0 if ref is None else ref.hidden.shape[1]
    for launch in head_support.schedule(splits, eps):
        if launch.first > 0:
            head_support.normalizer_kernel[(rows,)](top, total, tau, before_max, before_sum, **shared, num_warps=1)
        head_softmax_kernel[(triton.cdiv(rows, options["BM"]) * launch.number,)](
            *head[:3], *ref_tensors, seed, row_ids, tau,
            before_max if launch.first > 0 else None, before_sum if launch.first > 0 else None,
            top, total, moment, ref_top, ref_total, *head_support.slot_arguments(candidates),
            *head.hidden.stride(), *head.weight.stride(), *ref_strides, R=width,
            ref_softcap=None if ref is None else ref.softcap, eps=eps * head_support.MARGIN * 2.0**-32,
            first_row=first_row, first_split=launch.first, splits=splits, step=head_support.stride(splits),
            EVEN_R=width % options["BK"] == 0, **options,
        )  # fmt: skip
    row_max, row_total, row_moment = torch.empty(3, rows, device=device)
    ref_max, ref_sum = torch.empty(2, 0 if ref is None else rows, device=device)
    softmax_combine_kernel[(rows,)](
        top, total, moment, ref_top, ref_total, tau, row_max, row_total, row_moment, ref_max, ref_sum,
        **shared, num_warps=1,
    )  # fmt: skip
    support = None
    if candidates is not None:
        support = candidates.support(
            vocab, tau, row_max, row_total, seed, row_ids, first_row, vocab_start, 0.0, noise.DOMAIN_SUPPORT,
            options["TARGET"] == "cuda",
        )  # fmt: skip
    return Softmax(row_max, row_total, row_moment, ref_max, ref_sum), support


def head_softmax(
    head: Head,
    tau: torch.Tensor,
    seed: torch.Tensor,
    row_ids: torch.Tensor | None,
    vocab_start: int,
    eps: float,
    ref: Head | None,
) -> tuple[Softmax, Support]:
    """See `grade_kernels.backends`."""
    rows = head.hidden.shape[0]
    dtypes = {head.hidden.dtype, head.hidden.dtype if ref is None else ref.hidden.dtype}
    if torch.float64 in dtypes or rows == 0:
        return fallback.head_softmax(head, tau, seed, row_ids, vocab_start, eps, ref)
    if ref is not None and len(dtypes) > 1:  # one set of tiles serves both
        head, ref = (h._replace(hidden=h.hidden.float(), weight=h.weight.float()) for h in (head, ref))
    seed, row_ids = noise_arguments(head, seed, row_ids)
    tau = tau.contiguous()
    parts = []
    with launching(head.hidden):
        for batch in head_support.batches(rows, split_count(head.weight.shape[0], vocab_start), eps):
            parts.append(
                _run(
                    head._replace(hidden=head.hidden[batch]), tau[batch], seed,
                    None if row_ids is None else row_ids[batch], batch.start, vocab_start, eps,
                    None if ref is None else ref._replace(hidden=ref.hidden[batch]),
                )
            )  # fmt: skip
    sums = Softmax(*(torch.cat(columns) for columns in zip(*(part[0] for part in parts), strict=True)))
    supports = [part[1] for part in parts if part[1] is not None]
    return sums, head_support.joined(supports) if supports else fallback.empty_support(rows, head.hidden)
