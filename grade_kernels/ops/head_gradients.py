"""Gradients of a head's tensors, given gradients of its logits: sparse ones, or dense ones chunk by chunk."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from typing_extensions import NamedTuple

from grade_kernels.backends import Backend, Head
from grade_kernels.backends.records import offsets_of
from grade_kernels.dtypes import compute_dtype

__all__ = ["Entries", "HeadGradients", "PerHead", "softcap_slope"]

T = TypeVar("T")


class PerHead(NamedTuple, Generic[T]):
    """One thing for each tensor of a head that has a gradient."""

    hidden: T
    weight: T
    bias: T


class Entries(NamedTuple):
    """A sparse gradient of the logits: values at (row, token), repeated places adding up."""

    rows: torch.Tensor
    tokens: torch.Tensor
    values: torch.Tensor
    offsets: torch.Tensor | None = None  # [N + 1] where each row's entries begin, if they are sorted by row

    @staticmethod
    def joined(parts: list["Entries"]) -> "Entries":
        """All entries of several."""
        if len(parts) == 1:
            return parts[0]
        return Entries(
            torch.cat([part.rows for part in parts]),
            torch.cat([part.tokens for part in parts]),
            torch.cat([part.values for part in parts]),
        )

    def sorted(self, num_rows: int) -> "Entries":
        """The same, in the order of rows."""
        if self.offsets is not None:
            return self
        order = self.rows.argsort(stable=True)
        counts = torch.bincount(self.rows, minlength=num_rows)
        return Entries(self.rows[order], self.tokens[order], self.values[order], offsets_of(counts))


class HeadGradients:
    """Gradients of a head's tensors, of those that are asked for, gathered from sparse and from dense parts.

    Args:
        backend: whose kernels find them.
        head: the head.
        wanted: whether hidden, weight and bias want one.
    """

    def __init__(self, backend: Backend, head: Head, wanted: PerHead[bool]) -> None:
        self.backend, self.head, self.wanted = backend, head, wanted
        self.dtype = compute_dtype(head.hidden.dtype)
        hidden, weight = head.hidden, head.weight
        self.hidden = torch.zeros(hidden.shape, dtype=self.dtype, device=hidden.device) if wanted.hidden else None
        self.weight: torch.Tensor | None = None
        self.bias = torch.zeros(weight.shape[0], dtype=self.dtype, device=hidden.device) if wanted.bias else None

    def add_entries(self, entries: Entries) -> None:
        """Take a sparse gradient with respect to the (capped) logits."""
        rows, tokens, values, offsets = entries.sorted(len(self.head.hidden))
        assert offsets is not None
        if self.head.softcap is not None:
            logits = self.backend.head_logits_at(self.head, rows, tokens)
            values = values * softcap_slope(logits, self.head.softcap)
        if self.hidden is not None:
            self.hidden += self.backend.gather_sum(values, self.head.weight, offsets, tokens)
        if self.wanted.weight:
            part = self.backend.scatter_sum(values, self.head.hidden, rows, tokens, self.head.weight)
            self.weight = part if self.weight is None else self.weight.add_(part)
        if self.bias is not None:
            column = torch.ones(len(self.head.hidden), 1, dtype=self.dtype, device=values.device)
            self.bias += self.backend.scatter_sum(values, column, rows, tokens, self.bias[:, None]).squeeze(1)

    def add_dense(self, rows: torch.Tensor, rule: Callable[[slice, torch.Tensor], torch.Tensor]) -> None:
        """Take `rule(columns, logits)`, the gradient of some rows' (capped) logits, chunk by chunk."""
        head = self.head.rows(rows)
        hidden = torch.zeros(head.hidden.shape, dtype=self.dtype, device=rows.device)
        if self.wanted.weight and self.weight is None:
            self.weight = self._no_weight()
        for columns, logits in self.backend.head_chunks(head):
            dlogits = rule(columns, logits)
            if head.softcap is not None:
                dlogits = dlogits * softcap_slope(logits, head.softcap)
            if self.hidden is not None:
                hidden += self.backend.weighted_sum(dlogits, head.weight[columns])
            if self.weight is not None:
                self.weight[columns] += dlogits.to(head.hidden.dtype).T @ head.hidden
            if self.bias is not None:
                self.bias[columns] += dlogits.sum(dim=0)
        if self.hidden is not None:
            self.hidden[rows] += hidden

    def _no_weight(self) -> torch.Tensor:
        weight = self.head.weight
        return torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)

    def results(self, bias: torch.Tensor | None) -> PerHead[torch.Tensor | None]:
        """Gradients in the dtypes of hidden, weight and the given bias; None where none was asked for."""
        if self.wanted.weight and self.weight is None:
            self.weight = self._no_weight()
        hidden = None if self.hidden is None else self.hidden.to(self.head.hidden.dtype)
        return PerHead(hidden, self.weight, None if self.bias is None or bias is None else self.bias.to(bias.dtype))


def softcap_slope(capped: torch.Tensor, softcap: float) -> torch.Tensor:
    """Derivative of `c tanh(l / c)` given its value; zero for a masked logit."""
    return torch.where(capped == -torch.inf, 0.0, 1.0 - (capped / softcap) ** 2)
