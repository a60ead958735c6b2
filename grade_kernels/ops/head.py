"""What the operations through the LM head share: checks of a head, and gradients from its support or from all of it."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import torch

from grade_kernels import reference
from grade_kernels.backends import Head, Support
from grade_kernels.backends.torch.head import head_chunks, offsets_of
from grade_kernels.ops import checks
from grade_kernels.ops.transforms import without_wrappers

LEAST_EPS = 2.0**-64


def autocasted(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Under autocast the operands of the head's product are cast as those of `F.linear` are."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def check_head(
    hidden: object, lm_head: object, bias: object, logit_softcap: object, prefix: str = ""
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A head's tensors, checked against each other, and cast as autocast asks; errors name `{prefix}hidden` etc."""
    for name, value in ((f"{prefix}hidden", hidden), (f"{prefix}lm_head", lm_head)):
        checks.check_floating(name, value)
    assert isinstance(hidden, torch.Tensor)
    assert isinstance(lm_head, torch.Tensor)
    if hidden.dim() == 0:
        raise ValueError(f"{prefix}hidden must have shape [..., H], got a 0-d tensor")
    if lm_head.dim() != 2:
        raise ValueError(f"{prefix}lm_head must be two-dimensional [V, H], got shape {tuple(lm_head.shape)}")
    if 0 in lm_head.shape:
        raise ValueError(f"{prefix}lm_head must have at least one token and one feature, got {tuple(lm_head.shape)}")
    if hidden.shape[-1] != lm_head.shape[1]:
        raise ValueError(f"{prefix}hidden has H = {hidden.shape[-1]}, but {prefix}lm_head has H = {lm_head.shape[1]}")
    checks.check_same_device(f"{prefix}lm_head", lm_head, f"{prefix}hidden", hidden)
    if bias is not None:
        checks.check_floating(f"{prefix}bias", bias)
        assert isinstance(bias, torch.Tensor)
        if tuple(bias.shape) != (lm_head.shape[0],):
            raise ValueError(f"{prefix}bias must have shape ({lm_head.shape[0]},), got {tuple(bias.shape)}")
        checks.check_same_device(f"{prefix}bias", bias, f"{prefix}hidden", hidden)
    if logit_softcap is not None:
        compute = checks.compute_dtype(hidden.dtype)
        checks.positive_number("logit_softcap", logit_softcap, compute, "a number or None")
    hidden, lm_head = autocasted(hidden, lm_head)
    assert hidden is not None
    assert lm_head is not None
    if hidden.dtype != lm_head.dtype:
        raise TypeError(
            f"{prefix}hidden and {prefix}lm_head must have one dtype, got {hidden.dtype} and {lm_head.dtype}"
        )
    return hidden, lm_head, bias


def check_reference_rows(
    hidden: torch.Tensor, lm_head: torch.Tensor, bias: torch.Tensor | None, softcap: float | None, prefix: str = ""
) -> None:
    """The error of a row without a distribution, for the `reference` backend, which would compute with it."""
    if not checks.reads_values_here(hidden):
        return
    with torch.no_grad():
        logits = reference.head_logits(hidden.reshape(-1, hidden.shape[-1]), lm_head, bias, softcap)
        checks.check_head_rows(checks.bad_rows(without_wrappers(logits)), prefix)


def canonical_eps(eps: object) -> float:
    """A probability in [0, 1): 0, or one that float32 holds. What is below the least of these has no weight to save."""
    if isinstance(eps, bool) or not isinstance(eps, Real):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not 0.0 <= float(eps) < 1.0:
        raise ValueError(f"eps must lie in [0, 1), got {eps}")
    return 0.0 if eps == 0 else max(float(eps), LEAST_EPS)


def needs_graph(*tensors: torch.Tensor | None) -> bool:
    """Whether a backward pass can follow, so that its support is worth collecting. Meta tensors have none to collect."""
    return torch.is_grad_enabled() and any(
        t is not None and t.requires_grad and t.device.type != "meta" for t in tensors
    )


def select_backend(choice: str, dtype: torch.dtype) -> str:
    """Float64 through a head is for checking: `reference` and `torch` serve it, whatever else was chosen."""
    return "torch" if dtype == torch.float64 and choice != "reference" else choice


def make_head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float | None) -> Head:
    """A head with its bias in compute precision and in plain layout, which kernels read it in."""
    bias = None if bias is None else bias.to(checks.compute_dtype(hidden.dtype)).contiguous()
    return Head(hidden, weight, bias, softcap)


def row_of_entries(support: Support) -> torch.Tensor:
    """The row `[K]` that each entry of a support belongs to."""
    counts = support.offsets.diff()
    rows = torch.arange(len(counts), device=counts.device)
    return rows.repeat_interleave(counts, output_size=len(support.tokens))


def row_sums(values: torch.Tensor, support: Support) -> torch.Tensor:
    """Sum of entries' values per row, in a fixed order."""
    return torch.segment_reduce(values, "sum", offsets=support.offsets, initial=0)


class Entries(NamedTuple):
    """A sparse gradient of the logits: values at (row, token), repeated places adding up."""

    rows: torch.Tensor
    tokens: torch.Tensor
    values: torch.Tensor
    offsets: torch.Tensor | None = None  # [N + 1] where each row's entries begin, if they are sorted by row

    @staticmethod
    def joined(parts: list[Entries]) -> Entries:
        """All entries of several."""
        if len(parts) == 1:
            return parts[0]
        return Entries(
            torch.cat([part.rows for part in parts]),
            torch.cat([part.tokens for part in parts]),
            torch.cat([part.values for part in parts]),
        )

    def sorted(self, num_rows: int) -> Entries:
        """The same, in the order of rows."""
        if self.offsets is not None:
            return self
        order = self.rows.argsort(stable=True)
        counts = torch.bincount(self.rows, minlength=num_rows)
        return Entries(self.rows[order], self.tokens[order], self.values[order], offsets_of(counts))


class HeadGradients:
    """Gradients of a head's tensors, of those that are asked for, gathered from sparse and from dense parts.

    Args:
        implementation: the backend's module.
        head: the head.
        needs: whether hidden, weight and bias want one.
    """

    def __init__(self, implementation: Any, head: Head, needs: tuple[bool, bool, bool]) -> None:
        self.implementation, self.head, self.needs = implementation, head, needs
        self.dtype = checks.compute_dtype(head.hidden.dtype)
        hidden, weight = head.hidden, head.weight
        self.hidden = torch.zeros(hidden.shape, dtype=self.dtype, device=hidden.device) if needs[0] else None
        self.weight: torch.Tensor | None = None
        self.bias = torch.zeros(weight.shape[0], dtype=self.dtype, device=hidden.device) if needs[2] else None

    def add_entries(self, entries: Entries) -> None:
        """Take a sparse gradient with respect to the (capped) logits."""
        rows, tokens, values, offsets = entries.sorted(len(self.head.hidden))
        assert offsets is not None
        if self.head.softcap is not None:
            logits = self.implementation.head_logits_at(self.head, rows, tokens)
            values = values * softcap_slope(logits, self.head.softcap)
        if self.hidden is not None:
            self.hidden += self.implementation.gather_sum(values, self.head.weight, offsets, tokens)
        if self.needs[1]:
            part = self.implementation.scatter_sum(values, self.head.hidden, rows, tokens, self.head.weight)
            self.weight = part if self.weight is None else self.weight.add_(part)
        if self.bias is not None:
            column = torch.ones(len(self.head.hidden), 1, dtype=self.dtype, device=values.device)
            self.bias += self.implementation.scatter_sum(values, column, rows, tokens, self.bias[:, None]).squeeze(1)

    def add_dense(self, rows: torch.Tensor, rule: Callable[[slice, torch.Tensor], torch.Tensor]) -> None:
        """Take `rule(columns, logits)`, the gradient of some rows' (capped) logits, chunk by chunk."""
        head = self.head._replace(hidden=self.head.hidden[rows])
        hidden = torch.zeros(head.hidden.shape, dtype=self.dtype, device=rows.device)
        if self.needs[1] and self.weight is None:
            self.weight = torch.zeros_like(head.weight)
        for columns, logits in head_chunks(head, self.implementation.product):
            dlogits = rule(columns, logits)
            if head.softcap is not None:
                dlogits = dlogits * softcap_slope(logits, head.softcap)
            if self.hidden is not None:
                hidden += self.implementation.weighted_sum(dlogits, head.weight[columns])
            if self.weight is not None:
                self.weight[columns] += dlogits.to(head.hidden.dtype).T @ head.hidden
            if self.bias is not None:
                self.bias[columns] += dlogits.sum(dim=0)
        if self.hidden is not None:
            self.hidden[rows] += hidden

    def results(self, bias: torch.Tensor | None) -> list[torch.Tensor]:
        """Gradients of hidden, weight and bias in their dtypes; empty where none was asked for."""
        hidden, weight = self.head.hidden, self.head.weight
        if self.needs[1] and self.weight is None:
            self.weight = torch.zeros_like(weight)
        return [
            hidden.new_empty(0) if self.hidden is None else self.hidden.to(hidden.dtype),
            weight.new_empty(0) if self.weight is None else self.weight,
            hidden.new_empty(0) if self.bias is None or bias is None else self.bias.to(bias.dtype),
        ]


def softcap_slope(capped: torch.Tensor, softcap: float) -> torch.Tensor:
    """Derivative of `c tanh(l / c)` given its value; zero for a masked logit."""
    return torch.where(capped == -torch.inf, 0.0, 1.0 - (capped / softcap) ** 2)


def fake_gradients(
    hidden: torch.Tensor, lm_head: torch.Tensor, bias: torch.Tensor | None, needs: list[bool]
) -> list[torch.Tensor]:
    """Shapes of `HeadGradients.results`."""
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if x is not None and needed else hidden.new_empty(0)
        for x, needed in zip((hidden, lm_head, bias), needs, strict=False)
    ]
