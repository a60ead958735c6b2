"""The `triton` backend. Its functions import Triton when they are first called."""

from __future__ import annotations

import torch
from typing_extensions import override

from grade_kernels.backends.records import GradientRule, Head, Noise, Rows, Sample, Softmax, Support
from grade_kernels.backends.torch.backend import TorchBackend
from grade_kernels.backends.triton import availability
from grade_kernels.backends.triton.parts import parts
from grade_kernels.backends.triton.sizes import TritonSizes
from grade_kernels.estimators import is_noisy

__all__ = ["TritonBackend"]


class TritonBackend(TorchBackend):
    """Triton's kernels. What goes through a head in float64 is the torch backend's."""

    name = "triton"
    sizes: TritonSizes

    def __init__(self, sizes: TritonSizes | None = None, head_way: str = "auto") -> None:
        super().__init__(TritonSizes() if sizes is None else sizes)
        self.head_way = head_way

    @override
    def why_unavailable(self) -> str | None:
        """None if Triton is installed and has a driver or its interpreter is on, else the reason."""
        return availability.why_unavailable()

    @override
    def why_not_device(self, device: torch.device) -> str | None:
        """None for a device that the active Triton driver (or the interpreter) serves, else the reason."""
        return availability.why_not_device(device)

    @override
    def serves(self, *dtypes: torch.dtype, head: bool) -> bool:
        """The `cuda` backend, which inherits what goes through a head, may run where Triton does not."""
        return not head or (torch.float64 not in dtypes and availability.why_unavailable() is None)

    # Rows of given logits

    @override
    def sample(self, logits: torch.Tensor, noise: Noise, logsumexp: bool) -> Sample:
        from grade_kernels.backends.triton.sampling import sample

        return sample(logits, noise, logsumexp, self.sizes)

    @override
    def gumbel_softmax(self, rows: Rows, hard: bool, out: torch.Tensor) -> torch.Tensor:
        if rows.noise.posterior is not None:
            return super().gumbel_softmax(rows, hard, out)
        from grade_kernels.backends.triton import relaxation, row_relaxation, row_tiles

        how = row_tiles.way(self.sizes, rows.noise.vocab_start, rows.logits, out)
        if how == "strips" and hard:
            return super().gumbel_softmax(rows, hard, out)
        if how == "tile" or hard:
            return row_relaxation.gumbel_softmax(rows, hard, out, self.sizes)
        score_max = torch.empty_like(rows.tau, memory_format=torch.contiguous_format)
        for part in parts([rows.logits], self.sizes.reread_bytes):
            few, place = part.given(rows), part.of(out)
            if how == "strips":
                score_max[part.rows] = relaxation.relax(few, place, self.sizes)
            else:
                score_max[part.rows] = row_relaxation.gumbel_softmax(few, hard, place, self.sizes)
        return score_max

    @override
    def one_hot(self, sample: Sample, vocab: int, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        from grade_kernels.backends.triton.onehot import one_hot

        return one_hot(sample, vocab, dtype, out)

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
        if rows.noise.posterior is not None:
            return super().softmax(rows, score_max, normalize=normalize, dtype=dtype, out=out)
        from grade_kernels.backends.triton.relaxation import softmax

        return softmax(rows, score_max, normalize=normalize, dtype=dtype, out=out, sizes=self.sizes)

    @override
    def softmax_backward(
        self, dy: torch.Tensor, rows: Rows, sample: Sample, rule: GradientRule, out: torch.Tensor
    ) -> torch.Tensor:
        if rows.noise.posterior is not None and is_noisy(rule.estimator):
            return super().softmax_backward(dy, rows, sample, rule, out)
        rows = rows._replace(noise=rows.noise.prior())  # which other rules do not read
        from grade_kernels.backends.triton import row_gradient, row_tiles
        from grade_kernels.backends.triton.gradient import softmax_backward

        how = row_tiles.way(self.sizes, rows.noise.vocab_start, rows.logits, dy, out)
        if rule.dlogprobs is not None or not is_noisy(rule.estimator):
            how = "strips"
        if how == "tile":
            return row_gradient.softmax_backward(dy, rows, sample.score_max, rule.needs_dtau, out, self.sizes)
        dtau = torch.empty_like(rows.tau, memory_format=torch.contiguous_format)
        for part in parts([rows.logits, dy], self.sizes.reread_bytes):
            few, upstream, place = part.given(rows), part.of(dy), part.of(out)
            if how == "strips":
                sampled, asked = part.sampled(sample), part.rule(rule)
                dtau[part.rows] = softmax_backward(upstream, few, sampled, asked, place, self.sizes)
            else:
                score_max = part.numbers(sample.score_max)
                dtau[part.rows] = row_gradient.softmax_backward(
                    upstream, few, score_max, rule.needs_dtau, place, self.sizes
                )
        return dtau

    # Through a head

    @override
    def head_sample(self, head: Head, noise: Noise) -> Sample:
        if not self._fused(head):
            return super().head_sample(head, noise)
        from grade_kernels.backends.triton.head_sampling import head_sample

        return head_sample(head, noise, self.sizes, self._chunked(head))

    @override
    def head_scores(
        self, head: Head, tau: torch.Tensor, noise: Noise, eps: float
    ) -> tuple[Sample, torch.Tensor, Support]:
        if noise.posterior is not None or not self._fused(head):
            return super().head_scores(head, tau, noise, eps)
        from grade_kernels.backends.triton.head_sampling import head_scores

        capacity = self.support_capacity(eps, len(head.weight))
        return head_scores(head, tau, noise, eps, capacity, self.sizes, self._chunked(head))

    @override
    def head_softmax(
        self, head: Head, tau: torch.Tensor, noise: Noise, eps: float, ref: Head | None = None
    ) -> tuple[Softmax, Support]:
        heads = (head,) if ref is None else (head, ref)
        if not self._fused(*heads):
            return super().head_softmax(head, tau, noise, eps, ref)
        from grade_kernels.backends.triton.head_relaxation import head_softmax

        capacity = self.support_capacity(eps, len(head.weight))
        return head_softmax(head, tau, noise, eps, ref, capacity, self.sizes, self._chunked(*heads))

    def _fused(self, *heads: Head) -> bool:
        """Whether kernels take these heads: they have none for an empty grid."""
        return len(heads[0].hidden) > 0 and self.serves(*(h.hidden.dtype for h in heads), head=True)

    def _chunked(self, *heads: Head) -> bool:
        """Whether the library multiplies, chunk by chunk, or the kernels do, tile by tile."""
        if self.head_way != "auto":
            return self.head_way == "chunks"
        from grade_kernels.backends.triton import head_relaxation, head_sampling
        from grade_kernels.backends.triton.head_choice import choose

        def run(way: str) -> None:
            """A pass without candidates, whose product and statistics every pass has."""
            noise, rows = Noise(torch.zeros((), dtype=torch.int64), None, 0), len(heads[0].hidden)
            if len(heads) == 1:
                head_sampling.head_sample(heads[0], noise, self.sizes, way == "chunks")
            else:
                tau = torch.ones(rows, device=heads[0].hidden.device)
                head_relaxation.head_softmax(heads[0], tau, noise, 0.0, heads[1], 0, self.sizes, way == "chunks")

        return choose(heads, self.sizes.chunk_bytes, run) == "chunks"

    # Products with rows of a table

    @override
    def gather_dot(
        self, x: torch.Tensor, table: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        if x.shape[1] == 0 or not self.serves(x.dtype, table.dtype, head=True):
            return super().gather_dot(x, table, rows, tokens)
        from grade_kernels.backends.triton.gather import gather_dot

        return gather_dot(x, table, rows, tokens)

    @override
    def gather_sum(
        self, values: torch.Tensor, table: torch.Tensor, offsets: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        if table.shape[1] == 0 or not self.serves(values.dtype, table.dtype, head=True):
            return super().gather_sum(values, table, offsets, tokens)
        from grade_kernels.backends.triton.gather import gather_sum

        return gather_sum(values, table, offsets, tokens)
