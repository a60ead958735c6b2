"""The exact gradient of some rows: of those whose support overflowed, or of all where eps is 0."""

from __future__ import annotations

import torch

from grade_kernels.backends import Rows
from grade_kernels.backends.chunks import Scratch
from grade_kernels.estimators import Rule, is_noisy
from grade_kernels.ops.head_gradients import Entries, HeadGradients, softcap_slope
from grade_kernels.ops.linear_gumbel_ste.records import Draw, Statistics
from grade_kernels.ops.linear_gumbel_ste.upstream import DenseUpstream, Upstream

__all__ = ["DenseRows"]


class DenseRows:
    """An estimator's rule over the whole vocabulary, chunk by chunk, for some rows.

    Args:
        draw: the arguments of the operation.
        rows: `[M]`, which rows.
        gradients: of the head, to which theirs are added.
        upstream: dY of all rows.
        ids: `[N]`, the tokens that were returned.
        statistics: of the forward pass, for all rows.
        dlogprobs: `[N]`, the gradient of the log-probabilities, if there is one.
    """

    def __init__(
        self,
        draw: Draw,
        rows: torch.Tensor,
        gradients: HeadGradients,
        upstream: Upstream,
        ids: torch.Tensor,
        statistics: Statistics,
        dlogprobs: torch.Tensor | None,
    ) -> None:
        self.backend, self.gradients, self.rows, self.estimator = upstream.backend, gradients, rows, draw.estimator
        self.head, self.noise, self.tau = gradients.head.rows(rows), draw.noise.rows(rows), draw.tau[rows, None]
        self.ids, self.of = ids[rows, None], Statistics(*(x[rows, None] for x in statistics))
        self.dlogprobs = None if dlogprobs is None else dlogprobs[rows, None]
        self.all_upstream, self.upstream = upstream, DenseUpstream(upstream, rows, self.head.hidden.dtype)
        self._scratch = Scratch(len(rows), draw.tau.dtype, draw.tau.device)

    def add(self, dtau: torch.Tensor | None, dtables: list[torch.Tensor | None]) -> None:
        """Add everything: to the head's gradients, to dtau `[N]`, and with `soft` to those of the tables, where given.

        The gradient of the logits is `p (dY - mean)`, and the mean of dY is known only at the end of the vocabulary. So in
        general it takes two rounds over the vocabulary. The gradient of the hidden states is linear in the mean. Where no
        other tensor of the head wants a gradient, one round is enough: it sums `p dY W` and `p W` separately, and the mean
        multiplies the second at the end. The result is then a difference of two sums that are nearly equal. If the backend
        rounds weights to 16 bits, their difference would be mostly rounding, so then two rounds run.
        """
        exact = self.backend.exact_weights(self.head.weight.dtype)
        wanted = self.gradients.wanted
        if exact and not (self.estimator == "reinmax" or wanted.weight or wanted.bias):
            self._in_one_round(dtau, dtables)
        else:
            self._in_two_rounds(dtau, dtables)

    def _weights(self, columns: slice, logits: torch.Tensor) -> torch.Tensor:
        """Unnormalised probabilities of the relaxation, until the next chunk's are asked for."""
        out = self._scratch(logits.shape[1])
        if not is_noisy(self.estimator):
            return torch.sub(logits, self.of.logit_max, out=out).div_(self.tau).exp_()
        rows = Rows.of(logits, self.tau.squeeze(1), self.noise.at(columns))
        pivot = self.of.score_max.squeeze(1)
        self.backend.softmax(rows, pivot, normalize=False, dtype=out.dtype, out=out.unsqueeze(2))
        return out

    def _untempered(self, logits: torch.Tensor) -> torch.Tensor:
        """softmax(l)."""
        return (logits - self.of.logit_max).exp() / self.of.logit_sum

    def _add_to_tables(self, columns: slice, p: torch.Tensor, dtables: list[torch.Tensor | None]) -> None:
        """The gradient of a chunk of the tables, which with `soft` is `p.T @ de`."""
        for part, dtable in zip(self.upstream.parts, dtables, strict=True):
            if dtable is not None:
                dtable[columns] += p.to(part.dtype).T @ part

    def _in_two_rounds(self, dtau: torch.Tensor | None, dtables: list[torch.Tensor | None]) -> None:
        """The first finds the mean of dY, the second makes the gradient."""
        reinmax = self.estimator == "reinmax"
        rule = Rule(self.estimator, self.tau, self.ids)
        for columns, logits in self.backend.head_chunks(self.head):
            weights, dy = self._weights(columns, logits), self.upstream.chunk(columns)
            rule.measure(weights, dy, self._untempered(logits) if reinmax else None)
        rule.settle(self.all_upstream.at(self.rows, self.ids.squeeze(1))[:, None] if reinmax else None)
        row_dtau = torch.zeros_like(self.tau)

        def gradient(columns: slice, logits: torch.Tensor) -> torch.Tensor:
            p, dy = self._weights(columns, logits).div_(rule.total), self.upstream.chunk(columns)
            dl = rule.gradient(p, dy, columns, self._untempered(logits) if reinmax else None)
            if dtau is not None and not reinmax:
                row_dtau.sub_(torch.where(p > 0, dl * p.log(), 0.0).sum(dim=1, keepdim=True))
            if self.dlogprobs is not None:
                dl = rule.with_logprobs(dl, self.dlogprobs, columns, self._untempered(logits))
            if self.estimator == "soft":
                self._add_to_tables(columns, p, dtables)
            return torch.where(logits == -torch.inf, 0.0, dl)

        self.gradients.add_dense(self.rows, gradient)
        if dtau is not None:
            dtau[self.rows] += row_dtau.squeeze(1)

    def _in_one_round(self, dtau: torch.Tensor | None, dtables: list[torch.Tensor | None]) -> None:
        """For the gradients of hidden states, tau and, with `soft`, tables.

        It accumulates `sum p (dY - m)` with the mean m of dY so far; when m moves by d, it subtracts `d * sum p` from what
        has been summed. So terms are nearly as small as the gradient's own. A head in bfloat16 rounds them to bfloat16, which
        loses no more than rounding the gradient would.
        """
        tau, head = self.tau, self.head
        moment, moment_dot = (torch.zeros_like(tau) for _ in range(2))
        totals = tau.new_zeros(2, len(self.rows))
        kinds = 2 if self.dlogprobs is None else 3
        sums = torch.zeros(kinds, len(self.rows), head.hidden.shape[1], dtype=tau.dtype, device=tau.device)
        # Large terms would overflow float16.
        dtype = head.weight.dtype if head.weight.dtype == torch.bfloat16 else tau.dtype
        scratch = Scratch(kinds * len(self.rows), dtype, tau.device)
        for columns, logits in self.backend.head_chunks(head):
            stacked = scratch(logits.shape[1])
            terms = stacked.view(kinds, *logits.shape)
            weights, dy = self._weights(columns, logits), self.upstream.chunk(columns)
            slope = None if head.softcap is None else softcap_slope(logits, head.softcap)
            moved = self.backend.weight_terms(weights, dy, slope, terms[:2], totals)[:, None]
            if dtau is not None:
                logp = torch.where(weights > 0, weights.log(), 0.0)
                mean = torch.where(totals[0] > 0, totals[1] / totals[0], 0.0)[:, None]
                moment_dot += (weights * (dy - mean) * logp).sum(dim=1, keepdim=True) - moved * moment
                moment += (weights * logp).sum(dim=1, keepdim=True)
            if self.estimator == "soft":
                self._add_to_tables(columns, weights / self.of.relaxed_sum, dtables)
            if self.gradients.hidden is None:
                continue
            if self.dlogprobs is not None:
                untempered = self._untempered(logits)
                terms[2].copy_(untempered if slope is None else untempered * slope)
            sums[0] -= moved * sums[1]
            sums += self.backend.weighted_sum(stacked, head.weight[columns]).view_as(sums)
        total = totals[0, :, None]
        if dtau is not None:
            dtau[self.rows] -= (moment_dot / (total * tau)).squeeze(1)
        if self.gradients.hidden is not None:
            self.gradients.hidden[self.rows] += sums[0] / (total * tau)
            if self.dlogprobs is not None:
                self.gradients.hidden[self.rows] -= self.dlogprobs * sums[2]
        if self.dlogprobs is not None:
            self.gradients.add_entries(self._sampled(self.dlogprobs))

    def _sampled(self, dlogprobs: torch.Tensor) -> Entries:
        """What the returned tokens' own logits get from the log-probabilities; a masked one gets exactly zero."""
        values = torch.where(self.of.chosen == -torch.inf, 0.0, dlogprobs)
        return Entries(self.rows, self.ids.squeeze(1), values.squeeze(1))
