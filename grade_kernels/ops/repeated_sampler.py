"""`linear_gumbel_sample` for the steps of a decode."""

from __future__ import annotations

from collections.abc import Callable

import torch

from grade_kernels import backends
from grade_kernels.backends import Backend, Head, Noise
from grade_kernels.noise import GumbelNoise
from grade_kernels.ops import checks
from grade_kernels.ops.head import autocasted, check_head
from grade_kernels.ops.linear_gumbel_sample import linear_gumbel_sample

__all__ = ["RepeatedSampler"]


class RepeatedSampler:
    """Ids of `linear_gumbel_sample`, step after step, through one head that stays as it is meanwhile.

    On the CPU a step of few rows takes as long as it takes to read the head. So after some steps the backend makes a copy
    of the head in eight bits. The copy has a known error, within which most tokens can not win. The others are scored with
    the head itself. Ids are therefore those of `linear_gumbel_sample`, up to the rounding of a product. Backends without
    such a copy call that operation.

    Args:
        lm_head: `[V, H]`.
        bias: `[V]`, optional.
        logit_softcap: optional.
        plain_steps: steps before the backend makes its copy, which takes about as long as so many of them.
    """

    def __init__(
        self, lm_head: torch.Tensor, *, bias: torch.Tensor | None, logit_softcap: float | None, plain_steps: int = 8
    ) -> None:
        self.lm_head, self._bias, self._softcap = lm_head, bias, logit_softcap
        self._plain_steps = plain_steps
        self._steps = 0
        self._sampler: Callable[[torch.Tensor, Noise], torch.Tensor | None] | None = None

    def __call__(self, hidden: torch.Tensor, noise: GumbelNoise) -> torch.Tensor:
        """One token per row, int64 `[...]`; see `linear_gumbel_sample` for shapes, dtypes and errors."""
        self._steps += 1
        ids = None
        if self._steps > self._plain_steps and (backend := self._backend_for(hidden)) is not None:
            ids = self._sampled(backend, hidden, noise)
        if ids is None:
            ids, _ = linear_gumbel_sample(
                hidden, self.lm_head, bias=self._bias, logit_softcap=self._softcap, noise=noise
            )
        return ids

    def _backend_for(self, hidden: torch.Tensor) -> Backend | None:
        """The backend that serves these rows if it may have something better for them than the operation."""
        if type(hidden) is not torch.Tensor or type(self.lm_head) not in (torch.Tensor, torch.nn.Parameter):
            return None
        name = backends.select(hidden.device, hidden.dtype, head=True)
        if name == "reference":
            return None
        backend = backends.get(name)
        return backend if 0 < hidden.numel() <= backend.most_repeated_rows * hidden.shape[-1] else None

    def _sampled(self, backend: Backend, hidden: torch.Tensor, noise: GumbelNoise) -> torch.Tensor | None:
        if self._sampler is None:
            example, weight, bias = check_head(hidden.detach(), self.lm_head, self._bias, self._softcap)
            head = Head(example, weight.detach(), None if bias is None else bias.detach(), self._softcap)
            self._sampler = backend.repeated_sampler(head.canonical())
        (rows,) = autocasted(hidden.detach().reshape(-1, hidden.shape[-1]))
        assert rows is not None
        ids = self._sampler(rows, checks.canonical_noise(noise, len(rows), hidden.device))
        return None if ids is None else ids.view(hidden.shape[:-1])
