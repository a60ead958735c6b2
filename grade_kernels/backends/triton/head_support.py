"""From splits to rows: launches over the vocabulary, how statistics combine, and the stochastic support.

A candidate must beat a lower bound of the row's final normaliser. Programs run side by side and share nothing, so the
bound comes from earlier launches. The first covers about `2 / eps` tokens and keeps them all. Each further one covers up to
GROWTH times what came before, whose sum it knows. So a row collects about `(2 + GROWTH * launches) / eps` candidates at
worst, whatever the vocabulary.

Neighbouring ids belong together (a script, say). If a launch took neighbouring splits, its sum could tell little about the
rest. So it takes splits from all over the vocabulary.

Each split has slots in proportion to what it may collect. A row in which they do not suffice is marked as overflowed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
import triton
import triton.language as tl

from grade_kernels.backends.records import Support
from grade_kernels.backends.triton.head_tiles import FLOOR, RowNoise, empty_aligned, nan_max, split_count
from grade_kernels.backends.triton.philox import load_key, philox, split_row
from grade_kernels.backends.triton.scores import rate_of, weighted_sum
from grade_kernels.backends.triton.sizes import TritonSizes
from grade_kernels.backends.triton.targets import current_target

GROWTH = 4
FILTER_BLOCK = tl.constexpr(128)
# A candidate's bound is a sum in another order than the final one: a margin keeps rounding from losing a token.
MARGIN = 1.0 - 2.0**-10


class Launch(NamedTuple):
    """A launch's splits (a range of the plan's order), and the slots that each has."""

    first: int
    number: int
    slots: int


class Plan(NamedTuple):
    """How all splits of a vocabulary are spread over launches.

    Attributes:
        eps: of the support; 0 without one.
        splits: their number.
        step: from one split to the next in the order of launches, modulo `splits`.
        launches: one without a support, a growing sequence with one.
        chunked: whether the logits come chunk by chunk (see `head_chunks`). Then splits are taken in their order.
    """

    eps: float
    splits: int
    step: int
    launches: tuple[Launch, ...]
    chunked: bool

    @staticmethod
    def of(vocab: int, vocab_start: int, eps: float, sizes: TritonSizes, chunked: bool) -> Plan:
        """The plan for a vocabulary whose first token has this global id."""
        splits = split_count(vocab, vocab_start, sizes.head_split)
        found = launches(splits, eps, sizes.head_split, sizes.split_slots)
        return Plan(eps, splits, 1 if chunked else step(splits), found, chunked)

    @property
    def slots(self) -> int:
        """Slots of a row."""
        return sum(launch.number * launch.slots for launch in self.launches)

    def batches(self, rows: int, sizes: TritonSizes) -> list[slice]:
        """Rows whose candidates, and chunks of logits, are held at a time; all rows with neither."""
        size, least = rows, sizes.batch_rows
        if self.chunked:
            # A chunk of more columns is a product that takes them all at nearly the same rate.
            size = max(least, sizes.chunk_bytes // (4 * sizes.chunk_least) // least * least)
        if self.slots:
            size = min(size, max(least, sizes.slot_bytes // (8 * self.slots) // least * least))
        return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]


@functools.cache
def launches(splits: int, eps: float, head_split: int, split_slots: int | None) -> tuple[Launch, ...]:
    """Launches over splits of `head_split` tokens, which have `split_slots` slots or as many as they may need."""
    if eps == 0:
        return (Launch(0, splits, 0),)
    done = min(splits, triton.cdiv(math.ceil(2 / eps), head_split))
    found = [Launch(0, done, head_split if split_slots is None else split_slots)]
    while done < splits:
        count = min(splits - done, (GROWTH - 1) * done)
        slots = split_slots
        if slots is None:
            # Under a flat distribution a split of head_split tokens has head_split / (eps * tokens so far) candidates on
            # average; the margin covers their spread.
            slots = min(head_split, math.ceil(1.25 / (eps * done)) + 32)
        found.append(Launch(done, count, slots))
        done += count
    return tuple(found)


@functools.cache
def step(splits: int) -> int:
    """A step coprime to `splits`, so every split is visited.

    It is near `splits` / golden ratio, so those visited so far are evenly spread.
    """
    found = max(1, round(splits * 0.6180339887498949))
    while math.gcd(found, splits) != 1:
        found += 1
    return found


@functools.lru_cache(maxsize=64)
def layout(plan: Plan, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For each split: its first slot within a row, and its number of slots."""
    places, room, total = [0] * plan.splits, [0] * plan.splits, 0
    for launch in plan.launches:
        for i in range(launch.first, launch.first + launch.number):
            places[i * plan.step % plan.splits], room[i * plan.step % plan.splits] = total, launch.slots
            total += launch.slots
    first, number = (torch.tensor(x, dtype=torch.int32, device=device) for x in (places, room))
    return first, number


@triton.jit
def combined(p_max, p_sum, o_p, m_s):
    """Returns four things for one row whose splits are at o_p: the maximum (log2), the sum of exp2(x - maximum), each
    split's maximum, and each split's factor exp2(its maximum - maximum).
    """
    b_max = tl.load(p_max + o_p, mask=m_s, other=FLOOR)  # [BLOCK_S]
    r_max = tl.reduce(b_max, 0, nan_max)
    b_scale = tl.exp2(b_max - r_max)
    b_sum = tl.load(p_sum + o_p, mask=m_s, other=0.0)  # [BLOCK_S]
    return r_max, weighted_sum(b_sum, b_scale, 0), b_max, b_scale


@triton.jit
def relative_to(r_x, r_rate, r_max, r_sum):
    """Rescales r_sum from exp2(r_max) to exp2(r_x * r_rate). The two differ by rounding only. Returns r_x * r_rate - r_max
    as well.
    """
    r_excess = tl.fma(r_x, r_rate, -r_max)
    return tl.where(r_sum > 0, r_sum * tl.exp2(-r_excess), r_sum), r_excess


@triton.jit(do_not_specialize=["splits"])
def normalizer_kernel(top, total, out_max, out_sum, splits, BLOCK_S: tl.constexpr):
    """Maximum and tempered sum of a row, over the splits that have run."""
    i_n = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BLOCK_S)
    r_max, r_sum, _, _ = combined(top, total, i_n * splits + o_s, o_s < splits)
    tl.store(out_max + i_n, r_max)
    tl.store(out_sum + i_n, r_sum)


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
    r_max = tl.load(score_max + i_n) - SHIFT
    r_total = tl.load(total + i_n)
    r_rate = rate_of(tl.load(tau + i_n))
    p_slots = slots + i_n * s_slots + tl.load(places + i_s)
    count = tl.minimum(tl.load(counts + i_p), tl.load(room + i_s))
    done = tl.zeros((), tl.int32)
    o_in = tl.arange(0, FILTER_BLOCK)
    if offsets is not None:
        start = tl.load(offsets + i_p)
        count = tl.where(tl.load(offsets + i_p + 1) > start, count, 0)  # a row that overflowed has no entries
    for i_b in range(0, tl.cdiv(count, FILTER_BLOCK)):
        o_c = i_b * FILTER_BLOCK + o_in
        b_packed = tl.load(p_slots + o_c, mask=o_c < count, other=0)  # [FILTER_BLOCK], score's bits above, token below
        b_x = (b_packed >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        o_v = b_packed.to(tl.int32)
        b_group = group_start.to(tl.uint32) + ((o_v + SKEW) >> 2).to(tl.uint32)
        b_0, b_1, b_2, b_3 = philox(b_group, row_lo, row_hi, tl.full((), DOMAIN, tl.uint32), k0, k1, FAST)
        b_word = (o_v + SKEW) & 3  # which of the four
        b_w = tl.where(b_word < 2, tl.where(b_word == 0, b_0, b_1), tl.where(b_word == 2, b_2, b_3))
        b_uniform = (tl.mul(b_w, 0x9E3779B1, sanitize_overflow=False).to(tl.float32) + 0.5) * 2.0**-32
        b_p = tl.exp2((b_x - r_max) * r_rate) / r_total
        m_kept = (b_p > b_uniform * eps) & (o_c < count)
        b_number = m_kept.to(tl.int32)
        if offsets is not None:
            o_out = start + done + tl.cumsum(b_number, 0) - b_number
            tl.store(tokens + o_out, o_v.to(tl.int64), mask=m_kept)
            tl.store(p + o_out, b_p, mask=m_kept)
        done += tl.sum(b_number, 0)
    if offsets is None:
        tl.store(kept + i_p, done)


class Product(Protocol):
    """How the kernels come by the logits of a head, or of a head and a reference's."""

    def parts(self, launch: Launch) -> Iterator[tuple[Launch, dict[str, Any]]]:
        """The launch, whole or in parts one after the other, with the kernels' arguments about logits for each."""


class SplitPass:
    """A pass of a kernel over all splits, for a batch of rows: launch by launch, collecting candidates if eps > 0.

    Attributes:
        top, total: `[N, splits]`, each split's maximum of what is relaxed, in units of log2, and its tempered sum.
    """

    def __init__(self, rows: int, plan: Plan, drawn: RowNoise, device: torch.device) -> None:
        self.plan, self.drawn = plan, drawn
        self.top, self.total = empty_aligned(2, rows, plan.splits, device=device)
        self._before: dict[str, torch.Tensor | None] = {"before_max": None, "before_sum": None}
        self._slots: dict[str, Any] = {"slots": None, "counts": None, "places": None, "room": None, "s_slots": 0}
        if plan.eps > 0:
            before_max, before_sum = empty_aligned(2, rows, device=device)
            self._before = {"before_max": before_max, "before_sum": before_sum}
            places, room = layout(plan, device)
            self._slots = {
                "slots": torch.empty(rows, plan.slots, dtype=torch.int64, device=device),
                "counts": torch.empty(rows, plan.splits, dtype=torch.int32, device=device),
                "places": places,
                "room": room,
                "s_slots": plan.slots,
            }
            # Splits that have not run yet weigh nothing.
            self.top.fill_(FLOOR.value)
            self.total.zero_()

    def launch(self, kernel: Any, product: Product, **arguments: Any) -> None:
        """Run the kernel over all splits of a product, with these arguments and those that every pass has."""
        for launch in self.plan.launches:
            if self.plan.eps > 0:
                self.combine(normalizer_kernel, out_max=self._before["before_max"], out_sum=self._before["before_sum"])
            for part, logits in product.parts(launch):
                blocks = triton.cdiv(len(self.top), logits["BM"])
                kernel[(blocks * part.number,)](
                    top=self.top, total=self.total, **self._before, **self._slots, **self.drawn.arguments(),
                    eps=self.plan.eps * MARGIN * 2.0**-32, first_split=part.first, splits=self.plan.splits,
                    step=self.plan.step, **logits, **arguments,
                )  # fmt: skip

    def combine(self, kernel: Any, **arguments: Any) -> None:
        """Run a kernel that makes a row's statistics from its splits'."""
        rows, splits = self.top.shape
        kernel[(rows,)](
            top=self.top, total=self.total, splits=splits, BLOCK_S=triton.next_power_of_2(splits), num_warps=1,
            **arguments,
        )  # fmt: skip

    def support(
        self,
        capacity: int,
        *,
        tau: torch.Tensor,
        score_max: torch.Tensor,
        total: torch.Tensor,
        shift: float,
        domain: int,
    ) -> Support:
        """What the final normaliser leaves of the candidates; a row of more than `capacity` overflows.

        Args:
            capacity: entries that a row's support may take.
            tau, score_max, total: `[N]`, the temperature, and maximum and tempered sum of what is relaxed.
            shift: score_max is the maximum of (a candidate's stored score + shift).
            domain: of the words that decide.
        """
        (rows, splits), device = self.top.shape, self.top.device
        if self.plan.eps == 0:
            return Support.empty(rows, self.top)
        kept = torch.empty(rows, splits, dtype=torch.int32, device=device)
        launch = functools.partial(
            support_kernel[(rows * splits,)],
            **self._slots, **self.drawn.arguments(), tau=tau, score_max=score_max, total=total, kept=kept,
            splits=splits, group_start=(self.drawn.vocab_start >> 2) & 0xFFFFFFFF, eps=self.plan.eps,
            SHIFT=shift, SKEW=self.drawn.vocab_start & 3, DOMAIN=domain,
            FAST=current_target().backend == "cuda", num_warps=1,
        )  # fmt: skip
        launch(offsets=None, tokens=None, p=None)
        overflow = (self._slots["counts"] > self._slots["room"]).any(dim=1) | (kept.sum(dim=1) > capacity)
        kept.masked_fill_(overflow[:, None], 0)
        offsets = torch.zeros(rows * splits + 1, dtype=torch.int64, device=device)
        torch.cumsum(kept.view(-1), 0, out=offsets[1:])
        count = int(offsets[-1])
        tokens = torch.empty(count, dtype=torch.int64, device=device)
        p = torch.empty(count, dtype=torch.float32, device=device)
        launch(offsets=offsets, tokens=tokens, p=p)
        return Support(offsets[::splits].contiguous(), tokens, p, overflow)


def in_batches(
    rows: int, plan: Plan, sizes: TritonSizes, run: Callable[[slice], tuple[tuple[torch.Tensor, ...], Support]]
) -> tuple[tuple[torch.Tensor, ...], Support]:
    """What `run` finds of batches of rows, statistics `[batch]` and a support, as one of all rows."""
    parts = [run(batch) for batch in plan.batches(rows, sizes)]
    statistics = tuple(torch.cat(columns) for columns in zip(*(part[0] for part in parts), strict=True))
    return statistics, joined([part[1] for part in parts])


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
