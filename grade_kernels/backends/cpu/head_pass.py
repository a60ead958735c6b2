"""One pass over the vocabulary: a matrix product per chunk, then the kernels of csrc/cpu/head.inl."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from grade_kernels.backends.chunks import Sizes
from grade_kernels.backends.cpu.products import head_products, padded
from grade_kernels.backends.native import contiguous, cpu_kernels
from grade_kernels.backends.records import Head, Noise, Posterior, Sample, Softmax, Support
from grade_kernels.noise import posterior_domain

__all__ = ["SAMPLE", "SCORES", "SOFTMAX", "HeadPass"]

SAMPLE, SCORES, SOFTMAX = range(3)  # Kind of csrc/cpu/head_ops.cpp
_PIECES = 8  # kPieces of csrc/cpu/head_ops.cpp
_CANDIDATE_WORDS = 3  # int32 words of csrc/cpu/head.h's Candidate and of its Hit


def _chunks(vocab: int, width: int) -> Iterator[slice]:
    """Chunks of the vocabulary.

    A token is a candidate if it may be in the support under the normaliser so far. In the first chunk that is every token,
    so the first chunks are short.
    """
    start, step = 0, max(256, width // 32)
    while start < vocab:
        stop = min(start + min(step, width), vocab)
        yield slice(start, stop)
        start, step = stop, 4 * step


class HeadPass:
    """One pass over the vocabulary, and what it leaves behind.

    Args:
        kind: SAMPLE, SCORES or SOFTMAX.
        head: the head.
        tau: `[N]`.
        eps: of the support; 0 for none.
        capacity: entries that a row's support may take.
        sizes: how much is held at a time.
    """

    def __init__(self, kind: int, head: Head, tau: torch.Tensor, eps: float, capacity: int, sizes: Sizes) -> None:
        rows = head.hidden.shape[0]
        self.kind, self.head, self.tau, self.eps, self.sizes = kind, head, tau.contiguous(), eps, sizes
        # The rows that PassRows of csrc/cpu/head_ops.cpp reads: maximum and sum of the scores, maximum and sum of the
        # logits, the moment. In a SOFTMAX pass the first two are the logits' and the next two the reference's.
        self.state = tau.new_zeros(5, rows)
        self.state[0:3:2] = torch.finfo(torch.float32).min
        self.ids = tau.new_full((rows,), -1, dtype=torch.int64)
        self.flags = tau.new_zeros(3, rows, dtype=torch.int32)  # bad, entries, overflow
        self.given: Posterior | None = None
        self.candidates = tau.new_empty(rows, capacity * _CANDIDATE_WORDS, dtype=torch.int32)

    def run(self, noise: Noise, ref: Head | None = None) -> HeadPass:
        """Take the whole vocabulary; returns the pass itself."""
        head, rows = self.head, self.head.hidden.shape[0]
        ids, scores, domain = None, None, 0
        if self.kind == SCORES and noise.posterior is not None:
            self.given = noise.posterior
            ids, scores = contiguous(self.given.ids), contiguous(self.given.score_max)
            domain = posterior_domain(self.given.draw)
            self.state[0] = 0.0  # scores count from the given token's
        lanes, vocab = padded(rows), head.weight.shape[0]
        # The product's kernels take blocks of up to 48 tokens. 192 tokens are four of them, which two threads share evenly.
        width = max(192, self.sizes.tile_buffer // lanes // 192 * 192)
        products = head_products(head, ref, width, self.sizes.product)
        # All tokens of a chunk may be candidates. Memory that no candidate is written to is reserved, but takes no page.
        room = lanes * (width + _PIECES) * _CANDIDATE_WORDS if self.eps > 0 else 0
        scratch = self.flags.new_empty(room)
        row_ids = contiguous(noise.row_ids)
        for chunk in _chunks(vocab, width):
            out, ref_out = products(chunk)
            bias = None if head.bias is None else head.bias[chunk]
            ref_bias = None if ref is None or ref.bias is None else ref.bias[chunk].float()
            cpu_kernels().head_chunk(
                self.kind, out, ref_out, bias, ref_bias, head.softcap or 0.0, rows, self.tau, noise.seed, row_ids,
                noise.vocab_start, chunk.start, self.eps, self.state, self.ids, self.flags, self.candidates, scratch,
                ids, scores, domain,
            )  # fmt: skip
        return self

    def bad(self) -> torch.Tensor:
        """Rows that have no distribution."""
        largest = self.state[0 if self.given is None else 2]
        return (self.flags[0] & 1 != 0) | (largest == torch.finfo(torch.float32).min)

    def sample(self) -> Sample:
        """Of a SAMPLE or SCORES pass."""
        bad, ids, score_max = self.bad(), self.ids, self.state[0]
        if self.given is not None and self.given.score_max is not None:
            ids, score_max = self.given.ids, self.given.score_max
        score_max = torch.where(bad, torch.nan, score_max)
        return Sample(torch.where(bad, -1, ids), score_max, self.state[2], self.state[3])

    def softmax(self, with_ref: bool) -> Softmax:
        """Of a SOFTMAX pass."""
        largest, total, ref_max, ref_total, moment = self.state
        largest = torch.where(self.bad(), torch.nan, largest)
        if with_ref:
            ref_max = torch.where(self.flags[0] & 2 != 0, torch.nan, ref_max)
        else:
            ref_max = ref_total = moment.new_empty(0)
        return Softmax(largest, total, moment / total, ref_max, ref_total)

    def support(self) -> Support:
        """The support of a SCORES or SOFTMAX pass."""
        rows = self.head.hidden.shape[0]
        if self.eps == 0:
            return Support.empty(rows, self.head.hidden)
        cpu_kernels().head_finish(self.tau, self.eps, self.state, self.flags, self.candidates)
        offsets = self.ids.new_zeros(rows + 1)
        torch.cumsum(self.flags[1], 0, out=offsets[1:])
        count = int(offsets[-1])
        tokens, p = self.ids.new_empty(count), self.state.new_empty(count)
        cpu_kernels().head_support(self.candidates, offsets, tokens, p)
        return Support(offsets, tokens, p, self.flags[2] != 0)
