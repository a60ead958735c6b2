"""The `cpu` backend."""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
from collections.abc import Callable, Iterator, Sequence

import torch
from typing_extensions import override

from grade_kernels import _build
from grade_kernels.backends.cpu.head_pass import SAMPLE, SCORES, SOFTMAX, HeadPass
from grade_kernels.backends.cpu.products import LANES, HeadProduct, has_product, packed
from grade_kernels.backends.cpu.screen import MOST_ROWS, Screen
from grade_kernels.backends.interface import softcapped
from grade_kernels.backends.layouts import flat, written_flat
from grade_kernels.backends.native import ESTIMATOR, contiguous, cpu_kernels, unit_stride
from grade_kernels.backends.records import GradientRule, Head, Noise, Rows, Sample, Softmax, Support, offsets_of
from grade_kernels.backends.torch.backend import TorchBackend
from grade_kernels.dtypes import compute_dtype
from grade_kernels.estimators import is_noisy
from grade_kernels.noise import posterior_domain

__all__ = ["CpuBackend"]

_FEW_ROWS = 8  # a product of so few hidden rows, padded to 16 lanes, would be mostly padding
_FRESH_MEMORY = 2**21  # a sparse result of so many bytes is faster in a memory mapping of its own
_PAGE = 2**12  # bytes


@functools.cache
def _why_unavailable() -> str | None:
    path = _build.library_path()
    if path is None:
        return _build.missing_reason()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the C++ kernels do not load: {error}"
    return None


def _stays_empty(like: torch.Tensor, vocab: int) -> bool:
    """Whether a one-hot result of these rows is large, and most of its pages hold no one."""
    return like.nbytes >= _FRESH_MEMORY and vocab * like.itemsize >= _PAGE


def _fresh_zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Zeros of which few will be overwritten.

    Filling a large result with zeros would take longer than sampling, mostly in page faults. Fresh anonymous memory
    reads as zeros already, and the system gives it a real page only where something is written: one number a row.
    """
    # By default a forked process would share the memory.
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):
        # The system would clear a whole huge page for one number in it.
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _given(noise: Noise) -> tuple[torch.Tensor | None, int]:
    """Tokens that won and the domain of their noise's words, as kernels for rows take them."""
    given = noise.posterior
    return (None, 0) if given is None else (given.ids.contiguous(), posterior_domain(given.draw))


class CpuBackend(TorchBackend):
    """Kernels of csrc/cpu, which has none for heads in float64: those calls go to the torch backend."""

    name = "cpu"
    most_repeated_rows = MOST_ROWS

    @override
    def why_unavailable(self) -> str | None:
        """None if the compiled library is present and loads (which this does, once), else the reason."""
        return _why_unavailable()

    @override
    def why_not_device(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else "it runs on the CPU only"

    @override
    def serves(self, *dtypes: torch.dtype, head: bool) -> bool:
        return not head or torch.float64 not in dtypes

    # Rows of given logits

    @override
    def sample(self, logits: torch.Tensor, noise: Noise, logsumexp: bool) -> Sample:
        compute = compute_dtype(logits.dtype)
        rows = logits.shape[0]
        ids, score_max = logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=compute)
        logit_max, logit_sum = (logits.new_empty(rows if logsumexp else 0, dtype=compute) for _ in range(2))
        seed, row_ids, vocab_start, _ = noise
        cpu_kernels().sample(
            unit_stride(logits), seed, contiguous(row_ids), vocab_start, logsumexp, ids, score_max, logit_max, logit_sum
        )
        return Sample(ids, score_max, logit_max, logit_sum)

    @override
    def blank(self, like: torch.Tensor, vocab: int, hard: bool) -> torch.Tensor:
        if hard and _stays_empty(like, vocab):
            return _fresh_zeros(like.shape, like.dtype)
        return super().blank(like, vocab, hard)

    @override
    def gumbel_softmax(self, rows: Rows, hard: bool, out: torch.Tensor) -> torch.Tensor:
        if rows.noise.posterior is not None:
            return super().gumbel_softmax(rows, hard, out)
        tau = rows.tau.contiguous()
        score_max = torch.empty_like(tau)
        seed, row_ids, vocab_start, _ = rows.noise
        zeroed = hard and _stays_empty(out, out.shape[1])  # then `blank` gave zeros
        cpu_kernels().gumbel_softmax(
            rows.logits, tau, seed, contiguous(row_ids), vocab_start, hard, zeroed, out, score_max
        )
        return score_max

    @override
    def relax_at(
        self, logits: torch.Tensor, dim: int, tau: float, seed: int, hard: bool, keeps: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if logits.nbytes >= _FRESH_MEMORY:  # for which there is `blank`
            return None, None
        found: tuple[torch.Tensor | None, torch.Tensor | None] = cpu_kernels().relax_at(
            logits, dim, tau, seed, hard, keeps
        )
        return found

    @override
    def relax_at_backward(
        self,
        dy: torch.Tensor,
        logits: torch.Tensor,
        dim: int,
        tau: float,
        seed: int,
        score_max: torch.Tensor,
    ) -> torch.Tensor | None:
        found: torch.Tensor | None = cpu_kernels().relax_at_backward(dy, logits, dim, tau, seed, score_max)
        return found

    @override
    def softmax(
        self,
        rows: Rows,
        score_max: torch.Tensor,
        *,
        normalize: bool,
        dtype: torch.dtype,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if rows.noise.posterior is not None and rows.tau.dtype == torch.float64:
            return super().softmax(rows, score_max, normalize=normalize, dtype=dtype, out=out)
        out = rows.logits.new_empty(rows.logits.shape, dtype=dtype) if out is None else out
        total = torch.empty_like(score_max)
        seed, row_ids, vocab_start, _ = rows.noise
        with written_flat(out) as weights:
            cpu_kernels().softmax(
                unit_stride(flat(rows.logits)), rows.tau.contiguous(), seed, contiguous(row_ids), vocab_start, score_max,
                normalize, weights, total, *_given(rows.noise),
            )  # fmt: skip
        return out, total

    @override
    def softmax_backward(
        self, dy: torch.Tensor, rows: Rows, sample: Sample, rule: GradientRule, out: torch.Tensor
    ) -> torch.Tensor:
        posterior = rows.noise.posterior is not None and is_noisy(rule.estimator)
        if posterior and rows.tau.dtype == torch.float64:
            return super().softmax_backward(dy, rows, sample, rule, out)
        tau = rows.tau.contiguous()
        dtau = torch.zeros_like(tau) if rule.needs_dtau else tau
        given = _given(rows.noise) if posterior else (None, 0)
        seed, row_ids, vocab_start, _ = rows.noise

        def run(dy: torch.Tensor, logits: torch.Tensor, out: torch.Tensor) -> None:
            cpu_kernels().softmax_backward(
                dy, logits, tau, seed, contiguous(row_ids), vocab_start, ESTIMATOR[rule.estimator], *sample,
                contiguous(rule.dlogprobs), out, dtau if rule.needs_dtau else None, *given,
            )  # fmt: skip

        if tau.dtype == torch.float64 or (is_noisy(rule.estimator) and rule.dlogprobs is None and not posterior):
            run(dy, rows.logits, out)
        else:  # kernels for one row at a time
            with written_flat(out) as gradient:
                run(unit_stride(flat(dy)), unit_stride(flat(rows.logits)), gradient)
        return dtau

    # Through a head

    @override
    def head_sample(self, head: Head, noise: Noise) -> Sample:
        rows = head.hidden.shape[0]
        if head.hidden.dtype == torch.float32 and 0 < rows <= _FEW_ROWS:
            return self._sample_few_rows(head, noise)
        return self._head_pass(SAMPLE, head, head.hidden.new_ones(rows, dtype=torch.float32), 0.0).run(noise).sample()

    @override
    def head_scores(
        self, head: Head, tau: torch.Tensor, noise: Noise, eps: float
    ) -> tuple[Sample, torch.Tensor, Support]:
        found = self._head_pass(SCORES, head, tau, eps).run(noise)
        return found.sample(), found.state[1], found.support()

    @override
    def head_softmax(
        self, head: Head, tau: torch.Tensor, noise: Noise, eps: float, ref: Head | None = None
    ) -> tuple[Softmax, Support]:
        found = self._head_pass(SOFTMAX, head, tau, eps).run(noise, ref)
        return found.softmax(ref is not None), found.support()

    def _head_pass(self, kind: int, head: Head, tau: torch.Tensor, eps: float) -> HeadPass:
        return HeadPass(kind, head, tau, eps, self.support_capacity(eps, head.weight.shape[0]), self.sizes)

    def _few_chunks(self, head: Head) -> Iterator[tuple[slice, torch.Tensor]]:
        """Columns and logits `[N, columns]` of a decoding step's few rows, half a buffer at a time.

        A product padded to whole lanes would compute several times what is needed. This one takes little longer than
        reading the weight. For narrower dtypes PyTorch's own product is as fast.
        """
        hidden, weight = unit_stride(head.hidden), unit_stride(head.weight)
        rows, vocab = hidden.shape[0], weight.shape[0]
        width = max(64, self.sizes.tile_buffer // 2 // rows // 64 * 64)
        buffer = hidden.new_empty(rows, min(width, vocab))
        for start in range(0, vocab, width):
            columns = slice(start, min(start + width, vocab))
            logits = buffer[:, : columns.stop - start]
            cpu_kernels().few_product(hidden, weight[columns], logits)
            if head.bias is not None:
                logits += head.bias[columns]
            yield columns, softcapped(logits, head.softcap)

    def _sample_few_rows(self, head: Head, noise: Noise) -> Sample:
        """`head_sample` of a few rows: each chunk is sampled, and the best of the chunks' tokens wins."""
        parts, bad = [], head.hidden.new_zeros(head.hidden.shape[0], dtype=torch.bool)
        for columns, logits in self._few_chunks(head):
            part = self.sample(logits, noise.at(columns), True)
            # NaN, +inf or only -inf. The last is an error only if all chunks of the row are masked.
            none = part.ids < 0
            if none.any():
                top = logits.amax(dim=1)
                bad |= none & (top != -torch.inf)
                part = part._replace(
                    score_max=torch.where(none, -torch.inf, part.score_max),
                    logit_max=torch.where(none, -torch.inf, part.logit_max),
                    logit_sum=torch.where(none, 0.0, part.logit_sum),
                )
            parts.append(part._replace(ids=part.ids + columns.start))
        ids, score_max, logit_max, logit_sum = (torch.stack(x) for x in zip(*parts, strict=True))
        best, where = score_max.max(dim=0)
        top = logit_max.amax(dim=0)
        bad |= best == -torch.inf
        total = (logit_sum * (logit_max - torch.where(bad, 0.0, top)).exp()).sum(dim=0)
        chosen = ids.gather(0, where[None])[0]
        return Sample(torch.where(bad, -1, chosen), torch.where(bad, torch.nan, best), top, total)

    @override
    def repeated_sampler(self, head: Head) -> Callable[[torch.Tensor, Noise], torch.Tensor | None]:
        return Screen(head).sample

    # Products with rows of a table

    @override
    def gather_dot(
        self, x: torch.Tensor, table: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        if not self.serves(x.dtype, table.dtype, head=True):
            return super().gather_dot(x, table, rows, tokens)
        out = x.new_empty(len(tokens), dtype=torch.float32)
        cpu_kernels().gather_dot(unit_stride(x), unit_stride(table), rows.contiguous(), tokens.contiguous(), out)
        return out

    @override
    def gather_sum(
        self, values: torch.Tensor, table: torch.Tensor, offsets: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        if not self.serves(values.dtype, table.dtype, head=True):
            return super().gather_sum(values, table, offsets, tokens)
        out = values.new_empty(len(offsets) - 1, table.shape[1])
        cpu_kernels().gather_sum(values.contiguous(), unit_stride(table), offsets, tokens.contiguous(), out)
        return out

    @override
    def token_order(self, tokens: torch.Tensor, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As the torch backend's, by counting."""
        order, counts = torch.empty_like(tokens), tokens.new_zeros(vocab)
        cpu_kernels().token_order(tokens.contiguous(), order, counts)
        distinct = counts.nonzero()[:, 0]
        return order, distinct, offsets_of(counts[distinct])

    @override
    def product(self, x: torch.Tensor, table: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        fits = table.dtype == x.dtype and (out is None or out.dtype in (x.dtype, torch.float32))
        if not fits or not has_product(x):
            if out is None and 0 < len(x) < LANES:
                # PyTorch may add few rows up in another order than the padded rows of the passes, so pad them, too.
                whole = HeadProduct(x, table, len(table), self.sizes.product)
                return whole(slice(0, len(table)))[:, : len(x)].T
            return super().product(x, table, out)
        if out is None:
            out = x.new_empty(len(x), len(table), dtype=torch.float32)
        cpu_kernels().packed_product(packed(x), len(x), unit_stride(table), True, out)
        return out

    @override
    def weighted_sum(self, values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        if values.dtype in (torch.float32, table.dtype) and values.numel() > 0 and has_product(table):
            out = values.new_empty(len(values), table.shape[1], dtype=torch.float32)
            if not cpu_kernels().weighted_sum(unit_stride(values), unit_stride(table), out):
                # The kernel splits a number into parts, and an infinity into an infinity and NaN.
                rows = ~out.isfinite().all(dim=1)
                out[rows] = super().weighted_sum(values[rows], table)
            return out
        return super().weighted_sum(values, table)

    @override
    def exact_weights(self, dtype: torch.dtype) -> bool:
        return super().exact_weights(dtype) or bool(cpu_kernels().has_product(torch.empty(0, dtype=dtype)))

    @override
    def weight_terms(
        self, weights: torch.Tensor, dy: torch.Tensor, slope: torch.Tensor | None, out: torch.Tensor, sums: torch.Tensor
    ) -> torch.Tensor:
        if weights.dtype != torch.float32 or out.dtype == torch.float16:
            return super().weight_terms(weights, dy, slope, out, sums)
        moved = sums.new_empty(len(weights))
        slope = None if slope is None else unit_stride(slope)
        cpu_kernels().weight_terms(unit_stride(weights), unit_stride(dy), slope, out, sums, moved)
        return moved
