"""The `triton` backend. Its functions import Triton when they are first called."""

from __future__ import annotations

import torch
from typing_extensions import override

from grade_kernels.backends.interface import softcapped
from grade_kernels.backends.records import GradientRule, Head, Noise, Rows, Sample, Softmax, Support
from grade_kernels.backends.torch.backend import TorchBackend
from grade_kernels.backends.triton import availability
from grade_kernels.backends.triton.parts import parts
from grade_kernels.backends.triton.products import float32_product
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

    @override
    def head_logits_at(self, head: Head, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """See `Backend.head_logits_at`. The passes keep logits in float32, so nothing is rounded here."""
        if not self.serves(head.hidden.dtype, head=True):
            return super().head_logits_at(head, rows, tokens)
        logits = self.gather_dot(head.hidden, head.weight, rows, tokens)
        if head.bias is not None:
            logits = logits + head.bias[tokens]
        return softcapped(logits, head.softcap)

    def _fused(self, *heads: Head) -> bool:
        """Whether kernels take these heads: they have none for an empty grid."""
        return len(heads[0].hidden) > 0 and self.serves(*(h.hidden.dtype for h in heads), head=True)

    def _chunked(self, *heads: Head) -> bool:
        """Whether the library multiplies, chunk by chunk, or the kernels do, tile by tile."""
        return self.head_way == "chunks"

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

    @override
    def product(self, x: torch.Tensor, table: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `Backend.product`. In 16 bits it is kept in float32, as the passes keep their logits."""
        narrow = x.dtype in (torch.bfloat16, torch.float16) and self.serves(x.dtype, head=True)
        if not narrow or (out is not None and out.dtype != torch.float32):
            return super().product(x, table, out)
        out = x.new_empty(len(x), len(table), dtype=torch.float32) if out is None else out
        return float32_product(x, table, out, self.sizes.product)
