"""A log-sum-exp that grows as the vocabulary comes by in chunks."""

from __future__ import annotations

import torch

from grade_kernels.dtypes import compute_dtype

__all__ = ["LogSumExp"]


class LogSumExp:
    """Running `max(x)` and `sum(exp((x - max) / tau))` of rows whose values come in chunks.

    Args:
        rows: how many.
        like: a tensor whose device and compute precision the sums have.
        tau: `[rows]`; None stands for ones.
    """

    def __init__(self, rows: int, like: torch.Tensor, tau: torch.Tensor | None = None) -> None:
        dtype = compute_dtype(like.dtype)
        self.max = torch.full((rows,), -torch.inf, dtype=dtype, device=like.device)
        self.total = torch.zeros(rows, dtype=dtype, device=like.device)
        self.tau = tau

    def pivot(self) -> torch.Tensor:
        """The maximum so far, 0 before there is one."""
        return torch.where(self.max == -torch.inf, 0.0, self.max)

    def update(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a chunk; returns its `exp((x - max) / tau)` and the factor by which earlier ones have shrunk."""
        scale = self.raise_to(x.amax(dim=1))
        distance = x - self.pivot()[:, None]
        weights = (distance if self.tau is None else distance / self.tau[:, None]).exp()
        self.total = self.total * scale + weights.sum(dim=1)
        return weights, scale

    def raise_to(self, largest: torch.Tensor) -> torch.Tensor:
        """Raise the maximum to a chunk's; returns the factor by which earlier terms shrink. The total is left alone."""
        before, self.max = self.max, torch.maximum(self.max, largest)
        distance = before - self.pivot()
        return (distance if self.tau is None else distance / self.tau).exp()

    def merge(self, largest: torch.Tensor, total: torch.Tensor) -> None:
        """Take a chunk's maximum, and its sum relative to that. Where the maximum is -inf, the sum is not read."""
        scale = self.raise_to(largest)
        distance = largest - self.pivot()
        factor = (distance if self.tau is None else distance / self.tau).exp()
        self.total = self.total * scale + torch.where(largest == -torch.inf, 0.0, total * factor)
