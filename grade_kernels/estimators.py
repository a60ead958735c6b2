"""The estimators of a sampled token's gradient, and their rule in PyTorch for logits that come by in chunks.

The table of what each computes is in `ops.gumbel_ste_embedding`. A new estimator begins here: its name, whether its
relaxation sees the noise, and its rule. Other places know rules, too. Kernels have rules of their own:
`ops/linear_gumbel_ste/sparse.py` on a stochastic support, `backends/triton/gradient.py`, and `csrc`, whose number of each
estimator is in `backends/native.py`. `forward.py`, `backward.py` and `dense.py` of `ops/linear_gumbel_ste/` decide what runs
for which estimator. CONTRIBUTING.md has the steps.
"""

from __future__ import annotations

import torch

__all__ = ["ESTIMATORS", "RAO", "Rule", "is_noisy"]

ESTIMATORS = ("ste", "soft", "st", "reinmax")
RAO = (
    "gumbel_rao"  # the mean of `ste` over draws of posterior noise, made of the rule `ste` by the operations that embed
)


def is_noisy(estimator: str) -> bool:
    """Whether the relaxation is of `l + g`, not of l."""
    return estimator in ("ste", "soft")


class Rule:
    """The gradient of logits, `p (dY - mean)` and its like, with a mean of dY over the whole vocabulary.

    So the vocabulary comes by twice: `measure` sees every chunk, `settle` makes means of what it found, and then
    `gradient` and `with_logprobs` see every chunk again.

    Args:
        estimator: its name.
        tau: `[N, 1]`.
        ids: `[N, 1]`, the tokens that were returned.
    """

    def __init__(self, estimator: str, tau: torch.Tensor, ids: torch.Tensor) -> None:
        self.reinmax = estimator == "reinmax"
        self.tau, self.ids = tau, ids
        self.total, self.mean, self.untempered_mean = (torch.zeros_like(tau) for _ in range(3))

    def measure(self, weights: torch.Tensor, dy: torch.Tensor, untempered: torch.Tensor | None) -> None:
        """Take a chunk: the relaxation's weights, dY, and with `reinmax` softmax(l)."""
        self.total += weights.sum(dim=1, keepdim=True)
        self.mean += (weights * dy).sum(dim=1, keepdim=True)
        if untempered is not None:
            self.untempered_mean += (untempered * dy).sum(dim=1, keepdim=True)

    def settle(self, dy_at_ids: torch.Tensor | None) -> None:
        """The vocabulary has come by; `dy_at_ids` `[N, 1]` is dY at the returned tokens, needed with `reinmax`."""
        self.mean /= self.total
        if dy_at_ids is not None:
            self.mean = 0.5 * (self.mean + dy_at_ids)

    def hit(self, columns: slice) -> torch.Tensor:
        """Where a chunk holds the returned tokens."""
        return self.ids == torch.arange(columns.start, columns.stop, device=self.ids.device)

    def gradient(
        self, p: torch.Tensor, dy: torch.Tensor, columns: slice, untempered: torch.Tensor | None
    ) -> torch.Tensor:
        """The gradient of a chunk from its probabilities; dY is overwritten unless the estimator is `reinmax`."""
        if untempered is None:
            return dy.sub_(self.mean).mul_(p).div_(self.tau)
        # 2 J((O + p) / 2) dY - J(softmax(l)) dY / 2, where O is the one-hot vector of ids
        return (p + self.hit(columns)) * (dy - self.mean) - 0.5 * untempered * (dy - self.untempered_mean)

    def with_logprobs(
        self, dl: torch.Tensor, dlogprobs: torch.Tensor, columns: slice, untempered: torch.Tensor
    ) -> torch.Tensor:
        """A chunk's gradient with that of `logprobs`, given theirs `[N, 1]` and softmax(l)."""
        return dl + dlogprobs * (self.hit(columns).to(dl.dtype) - untempered)
