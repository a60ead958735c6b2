"""The stochastic support of rows whose vocabulary comes by in chunks."""

from __future__ import annotations

import torch

from grade_kernels.backends.log_sum_exp import LogSumExp
from grade_kernels.backends.records import Support, offsets_of

__all__ = ["Candidates"]


class Candidates:
    """Tokens that may be in the support.

    Whether a token is in the support depends on the normaliser of the whole row. The normaliser so far is a lower bound of
    it, so tokens that it leaves out are out for good. Those that it keeps are kept until the final one is known.

    Args:
        sums: the normaliser.
        tau: `[N]`, its temperature.
        eps: of the support.
        capacity: entries that a row may take.
    """

    def __init__(self, sums: LogSumExp, tau: torch.Tensor, eps: float, capacity: int) -> None:
        self.sums, self.tau, self.eps, self.capacity = sums, tau, eps, capacity
        self.rows: list[torch.Tensor] = []
        self.tokens: list[torch.Tensor] = []
        self.scores: list[torch.Tensor] = []
        self.uniforms: list[torch.Tensor] = []

    def take(self, columns: slice, weights: torch.Tensor, scores: torch.Tensor, uniform: torch.Tensor) -> None:
        """Take a chunk, whose weights the normaliser already counts."""
        kept = weights > uniform * self.eps * self.sums.total[:, None]
        rows, tokens = kept.nonzero(as_tuple=True)
        self.rows.append(rows)
        self.tokens.append(tokens + columns.start)
        self.scores.append(scores[rows, tokens])
        self.uniforms.append(uniform[rows, tokens])
        if sum(len(part) for part in self.rows[1:]) > 4 * self.capacity * len(weights):
            self._filter()

    def _filter(self) -> torch.Tensor:
        """Drop what the normaliser so far rules out; returns the probabilities of the rest under it."""
        rows, tokens = torch.cat(self.rows), torch.cat(self.tokens)
        scores, uniforms = torch.cat(self.scores), torch.cat(self.uniforms)
        p = ((scores - self.sums.max[rows]) / self.tau[rows]).exp() / self.sums.total[rows]
        kept = p > uniforms * self.eps
        self.rows, self.tokens = [rows[kept]], [tokens[kept]]
        self.scores, self.uniforms = [scores[kept]], [uniforms[kept]]
        return p[kept]

    def support(self) -> Support:
        """What the final normaliser leaves."""
        p, rows, tokens = self._filter(), self.rows[0], self.tokens[0]
        overflow = torch.bincount(rows, minlength=len(self.sums.max)) > self.capacity
        fits = ~overflow[rows]
        p, rows, tokens = p[fits], rows[fits], tokens[fits]
        order = rows.argsort(stable=True)  # chunks came in token order
        counts = torch.bincount(rows, minlength=len(self.sums.max))
        return Support(offsets_of(counts), tokens[order], p[order], overflow)
