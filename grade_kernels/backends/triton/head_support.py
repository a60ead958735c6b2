"""From splits to rows: how the vocabulary is scheduled, how statistics combine, and the stochastic support.

A candidate must beat a lower bound of the row's final normaliser. Programs run side by side and share nothing, so the
bound comes from earlier launches: the first covers about `2 / eps` tokens and keeps them all, each further one up to
GROWTH times what came before, knowing the sum of that. So a row collects about `(2 + GROWTH * launches) / eps`
candidates at worst, whatever the vocabulary. A launch takes splits from all over it, for neighbouring ids belong
together (a script, say) and a launch's share should be typical of the rest.

Each split has slots in proportion to what it may collect. A row in which they do not suffice is marked.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from grade_kernels.backends.records import Support
from grade_kernels.backends.triton.head import FLOOR, NOWHERE, SPLIT, RowNoise, nan_max
from grade_kernels.backends.triton.philox import LN2, LOG2E, load_key, philox, split_row

GROWTH = 4
# Slots that exist at a time; rows beyond wait for their turn, in batches of at least LEAST_ROWS. A batch's first launches
# have few programs, so that a GPU wants batches of several tiles of rows.
SLOT_BYTES = 2**27
LEAST_ROWS = 128
FILTER_BLOCK = tl.constexpr(128)
# A candidate's bound is a sum in another order than the final one: a margin keeps rounding from losing a token.
MARGIN = 1.0 - 2.0**-10


class Launch(NamedTuple):
    """A launch's splits (a range of the schedule), and the slots that each has."""

    first: int
    number: int
    slots: int


@functools.cache
def schedule(splits: int, eps: float) -> tuple[Launch, ...]:
    """Launches over all splits: one without a support, a growing sequence with one."""
    if eps == 0:
        return (Launch(0, splits, 0),)
    done = min(splits, triton.cdiv(math.ceil(2 / eps), SPLIT))
    launches = [Launch(0, done, SPLIT)]
    while done < splits:
        count = min(splits - done, (GROWTH - 1) * done)
        # A flat distribution keeps SPLIT / (eps * tokens so far) of a split, and varies.
        slots = min(SPLIT, math.ceil(1.25 / (eps * done)) + 32)
        launches.append(Launch(done, count, slots))
        done += count
    return tuple(launches)


@functools.cache
def stride(splits: int) -> int:
    """Step through the splits that visits all of them, evenly spread at every moment: near the golden section."""
    step = max(1, round(splits * 0.6180339887498949))
    while math.gcd(step, splits) != 1:
        step += 1
    return step


@functools.lru_cache(maxsize=64)
def layout(splits: int, eps: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Of each split, where its slots begin in a row's and how many they are; and a row's slots in all."""
    places, room, total, step = [0] * splits, [0] * splits, 0, stride(splits)
    for launch in schedule(splits, eps):
        for i in range(launch.first, launch.first + launch.number):
            places[i * step % splits], room[i * step % splits] = total, launch.slots
            total += launch.slots
    first, number = (torch.tensor(x, dtype=torch.int32, device=device) for x in (places, room))
    return first, number, total


def batches(rows: int, splits: int, eps: float) -> list[slice]:
    """Rows whose candidates are held at a time."""
    slots = sum(launch.number * launch.slots for launch in schedule(splits, eps))
    size = max(LEAST_ROWS, SLOT_BYTES // (8 * slots) // LEAST_ROWS * LEAST_ROWS) if slots else rows
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]


def slot_arguments(candidates: Candidates | None) -> tuple[Any, ...]:
    """Slots, counts, where each split's slots begin, how many they are, and the stride of a row."""
    if candidates is None:
        return None, None, None, None, 0
    return candidates.slots, candidates.counts, candidates.places, candidates.room, candidates.per_row


@triton.jit
def combined(p_max, p_sum, o, m_s):
    """Maximum, in units of log2, and sum of exp2(x - maximum) of one row from its splits'."""
    b_max = tl.load(p_max + o, mask=m_s, other=FLOOR)
    m_max = tl.reduce(b_max, 0, nan_max)
    b_scale = tl.exp2(b_max - m_max)
    return m_max, tl.sum(tl.load(p_sum + o, mask=m_s, other=0.0) * b_scale, 0), b_max, b_scale


@triton.jit
def relative_to(x, rate, m_max, m_sum):
    """A sum relative to exp2(m_max) as one to exp2(x * rate), where that is nearly the same; by how much, as well."""
    excess = tl.fma(x, rate, -m_max)
    return tl.where(m_sum > 0, m_sum * tl.exp2(-excess), m_sum), excess


@triton.jit(do_not_specialize=["splits"])
def normalizer_kernel(top, total, out_max, out_sum, splits, BLOCK_S: tl.constexpr):
    """Maximum and tempered sum of a row, over the splits that have run."""
    i_n = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BLOCK_S)
    m_max, m_sum, _, _ = combined(top, total, i_n * splits + o_s, o_s < splits)
    tl.store(out_max + i_n, m_max)
    tl.store(out_sum + i_n, m_sum)


@triton.jit(do_not_specialize=["splits", "V"])
def sample_combine_kernel(
    best, index, plain_max, plain_sum, top, total, tau, ids, score_max, out_max, out_sum, out_total, splits, V,
    SHIFT: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """A row's sample from its splits'; ties go to the smaller id."""
    i_n = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BLOCK_S)
    m_s = o_s < splits
    o = i_n * splits + o_s
    b_best = tl.load(best + o, mask=m_s, other=float("-inf"))
    m_best = tl.reduce(b_best, 0, nan_max)
    nan = tl.full((), float("nan"), tl.float32)
    m_best = tl.where(tl.abs(m_best) < float("inf"), m_best, nan)
    i_v = tl.min(tl.where(b_best == m_best, tl.load(index + o, mask=m_s, other=NOWHERE), NOWHERE), 0)
    tl.store(ids + i_n, tl.minimum(i_v, V - 1).to(tl.int64))  # a bad row's lies in the vocabulary as well
    tl.store(score_max + i_n, m_best + SHIFT)
    m_max, m_sum, _, _ = combined(plain_max, plain_sum, o, m_s)
    m_logit = m_max * LN2
    m_sum, _ = relative_to(m_logit, LOG2E, m_max, m_sum)
    is_bad = m_best != m_best
    tl.store(out_max + i_n, tl.where(is_bad, nan, m_logit))
    tl.store(out_sum + i_n, tl.where(is_bad, nan, m_sum))
    if tau is not None:
        m_max, m_sum, _, _ = combined(top, total, o, m_s)
        m_sum, _ = relative_to(m_best, LOG2E / tl.load(tau + i_n), m_max, m_sum)
        tl.store(out_total + i_n, m_sum)


@triton.jit(do_not_specialize=["splits", "group_start", "first_row", "eps"])
def support_kernel(
    slots, counts, places, room, seed, row_ids, tau, score_max, total, kept, offsets, tokens, p,
    s_slots, splits, first_row, group_start, eps,
    SHIFT: tl.constexpr, SKEW: tl.constexpr, DOMAIN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Decide one split's candidates by the final normaliser: count them in `kept`, or with offsets write them out."""
    i_p = tl.program_id(0).to(tl.int64)
    i_n, i_s = i_p // splits, i_p % splits
    k0, k1 = load_key(seed)
    row_lo, row_hi = split_row(first_row + i_n if row_ids is None else tl.load(row_ids + i_n))
    m_max = tl.load(score_max + i_n) - SHIFT
    m_total = tl.load(total + i_n)
    rate = LOG2E / tl.load(tau + i_n)
    p_slots = slots + i_n * s_slots + tl.load(places + i_s)
    count = tl.minimum(tl.load(counts + i_p), tl.load(room + i_s))
    done = tl.zeros((), tl.int32)
    o_in = tl.arange(0, FILTER_BLOCK)
    if offsets is not None:
        start = tl.load(offsets + i_p)
        count = tl.where(tl.load(offsets + i_p + 1) > start, count, 0)  # a row that overflowed has no entries
    for i_b in range(0, tl.cdiv(count, FILTER_BLOCK)):
        o = i_b * FILTER_BLOCK + o_in
        packed = tl.load(p_slots + o, mask=o < count, other=0)
        b_x = (packed >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        o_v = packed.to(tl.int32)
        groups = group_start.to(tl.uint32) + ((o_v + SKEW) >> 2).to(tl.uint32)
        w_0, w_1, w_2, w_3 = philox(groups, row_lo, row_hi, tl.full((), DOMAIN, tl.uint32), k0, k1, FAST)
        i_w = (o_v + SKEW) & 3
        w = tl.where(i_w < 2, tl.where(i_w == 0, w_0, w_1), tl.where(i_w == 2, w_2, w_3))
        uniform = (tl.mul(w, 0x9E3779B1, sanitize_overflow=False).to(tl.float32) + 0.5) * 2.0**-32
        b_p = tl.exp2((b_x - m_max) * rate) / m_total
        m = (b_p > uniform * eps) & (o < count)
        n = m.to(tl.int32)
        if offsets is not None:
            o_out = start + done + tl.cumsum(n, 0) - n
            tl.store(tokens + o_out, o_v.to(tl.int64), mask=m)
            tl.store(p + o_out, b_p, mask=m)
        done += tl.sum(n, 0)
    if offsets is None:
        tl.store(kept + i_p, done)


class Candidates:
    """Slots of some rows, and what has been collected in them."""

    def __init__(self, rows: int, splits: int, eps: float, device: torch.device) -> None:
        self.rows, self.splits, self.eps = rows, splits, eps
        self.places, self.room, self.per_row = layout(splits, eps, device)
        self.slots = torch.empty(rows, self.per_row, dtype=torch.int64, device=device)
        self.counts = torch.empty(rows, splits, dtype=torch.int32, device=device)

    def support(
        self,
        capacity: int,
        tau: torch.Tensor,
        score_max: torch.Tensor,
        total: torch.Tensor,
        drawn: RowNoise,
        shift: float,
        domain: int,
        fast: bool,
    ) -> Support:
        """What the final normaliser leaves of the candidates; a row of more than `capacity` overflows."""
        rows, splits, device = self.rows, self.splits, self.slots.device
        kept = torch.empty(rows, splits, dtype=torch.int32, device=device)

        def launch(offsets: torch.Tensor | None, tokens: torch.Tensor | None, p: torch.Tensor | None) -> None:
            support_kernel[(rows * splits,)](
                self.slots, self.counts, self.places, self.room, drawn.seed, drawn.row_ids, tau, score_max, total,
                kept, offsets, tokens, p, self.per_row, splits, drawn.first_row,
                (drawn.vocab_start >> 2) & 0xFFFFFFFF, self.eps,
                SHIFT=shift, SKEW=drawn.vocab_start & 3, DOMAIN=domain, FAST=fast, num_warps=1,
            )  # fmt: skip

        launch(None, None, None)
        overflow = (self.counts > self.room).any(dim=1) | (kept.sum(dim=1) > capacity)
        kept = kept.masked_fill(overflow[:, None], 0)
        offsets = torch.zeros(rows * splits + 1, dtype=torch.int64, device=device)
        torch.cumsum(kept.view(-1), 0, out=offsets[1:])
        count = int(offsets[-1])
        tokens = torch.empty(count, dtype=torch.int64, device=device)
        p = torch.empty(count, dtype=torch.float32, device=device)
        launch(offsets, tokens, p)
        return Support(offsets[::splits].contiguous(), tokens, p, overflow)


def joined(parts: list[Support]) -> Support:
    """The supports of batches of rows as one."""
    if len(parts) == 1:
        return parts[0]
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + len(part.tokens))
    offsets = [part.offsets[:-1] + start for part, start in zip(parts, starts, strict=False)]
    offsets.append(parts[-1].offsets[-1:] + starts[-2])
    return Support(
        torch.cat(offsets),
        torch.cat([part.tokens for part in parts]),
        torch.cat([part.p for part in parts]),
        torch.cat([part.overflow for part in parts]),
    )
