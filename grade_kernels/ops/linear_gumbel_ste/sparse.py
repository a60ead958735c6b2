"""The gradient of logits on a stochastic support.

The support keeps token v with probability `min(1, p_v / eps)`, and `q_v = max(p_v, eps)` stands for the p of a kept token,
so that a sum of q over the support has the expectation of the sum of p over the vocabulary.
"""

from __future__ import annotations

import torch

from grade_kernels.backends import Support
from grade_kernels.ops.head_gradients import Entries
from grade_kernels.ops.linear_gumbel_ste.records import Statistics
from grade_kernels.ops.linear_gumbel_ste.upstream import Upstream

__all__ = ["SparseRows"]


class SparseRows:
    """An estimator's rule on supports.

    Args:
        upstream: dY.
        tau: `[N]`.
        ids: `[N]`, the tokens that were returned.
        statistics: of the forward pass.
        eps: of the supports.
        dtau: `[N]`, to which the gradient of tau is added.
    """

    def __init__(
        self,
        upstream: Upstream,
        tau: torch.Tensor,
        ids: torch.Tensor,
        statistics: Statistics,
        eps: float,
        dtau: torch.Tensor,
    ) -> None:
        self.upstream, self.tau, self.ids, self.statistics = upstream, tau, ids, statistics
        self.eps, self.dtau = eps, dtau
        self.everyone = torch.arange(len(ids), device=ids.device)

    def entries(
        self, estimator: str, support: Support, untempered: Support, dlogprobs: torch.Tensor | None
    ) -> list[Entries]:
        """The gradient of the logits.

        Args:
            estimator: its name.
            support: of the relaxation.
            untempered: of softmax(l); needed by `reinmax`, and where dlogprobs is given.
            dlogprobs: `[N]`, the gradient of the returned tokens' log-probabilities.
        """
        if estimator == "reinmax":
            parts = self.reinmax(support, untempered)
        else:
            parts = [self.relaxed(support, 1.0 / self.tau, tempered=True)]
        if dlogprobs is not None:
            rows = untempered.rows()
            parts.append(Entries(rows, untempered.tokens, -dlogprobs[rows] * untempered.p.clamp_min(self.eps)))
            parts.append(Entries(self.everyone, self.ids, self.zero_if_masked(dlogprobs)))
        return parts

    def zero_if_masked(self, values: torch.Tensor) -> torch.Tensor:
        """Values `[N]` at the returned tokens; a given token that is masked gets exactly zero."""
        return torch.where(self.statistics.chosen == -torch.inf, 0.0, values)

    def relaxed(self, support: Support, factor: torch.Tensor, tempered: bool) -> Entries:
        """`factor * J(p) dY`, that is `factor * p_v (dY_v - mean)` with `mean = sum_u p_u dY_u`, on a support.

        A support of M N rows is that of M draws. The result is the mean over these.

        q_v times an estimate of the mean that holds q_v itself would be biased: both share one rounding. So the entry of
        v leaves its own out: in its estimate of the mean, p_v stands in the place of q_v.

        Every draw has a mean of its own, so that of an entry leaves out the only rounding that both share.

        Args:
            support: of p.
            factor: `[N]`.
            tempered: p is softmax(x / tau) of `x = l + g` or `x = l`, and what this adds to the gradient of tau,
                `-sum_v dx_v x_v / tau`, is wanted.
        """
        drawn, q, draws = support.rows(), support.p.clamp_min(self.eps), len(support.overflow) // max(1, len(self.ids))
        rows = drawn if draws == 1 else drawn % len(self.ids)
        dy = self.upstream.at(rows, support.tokens)
        mean = support.row_sums(q * dy)[drawn] + (support.p - q) * dy
        values = (factor if draws == 1 else factor / draws)[rows] * q * (dy - mean)
        if tempered:
            # log p is x / tau up to a constant of the row, which does not count: the gradient of a row sums to zero.
            self.dtau -= support.row_sums(values * support.p.log()).view(draws, len(self.ids)).sum(0)
        return Entries(rows, support.tokens, values, support.offsets if draws == 1 else None)

    def reinmax(self, support: Support, untempered: Support) -> list[Entries]:
        """`2 J((O + p) / 2) dY - J(softmax(l)) dY / 2`, where O is the one-hot vector of ids.

        The sampled token is always visited, at its exact value.
        """
        of = self.statistics
        sampled_p = ((of.chosen - of.logit_max) / self.tau).exp() / of.relaxed_sum
        sampled_dy, sampled_weight = self.upstream.at(self.everyone, self.ids), (1.0 + sampled_p) / 2
        rows = support.rows()
        others = support.tokens != self.ids[rows]
        p = torch.where(others, support.p, 0.0) / 2
        q = torch.where(others, support.p.clamp_min(self.eps), 0.0) / 2
        dy = self.upstream.at(rows, support.tokens)
        mean = support.row_sums(q * dy) + sampled_weight * sampled_dy
        return [
            Entries(rows, support.tokens, 2 * q * (dy - mean[rows] - (p - q) * dy)),
            Entries(self.everyone, self.ids, self.zero_if_masked(2 * sampled_weight * (sampled_dy - mean))),
            self.relaxed(untempered, torch.full_like(self.tau, -0.5), tempered=False),
        ]
