"""`linear_gumbel_sample` for the steps of a decode."""

from __future__ import annotations

import torch

from grade_kernels import backends
from grade_kernels.backends import Head
from grade_kernels.backends.cpu.screen import MOST_ROWS, Screen
from grade_kernels.noise import GumbelNoise
from grade_kernels.ops import checks
from grade_kernels.ops.head import autocasted, check_head, make_head
from grade_kernels.ops.linear_gumbel_sample import linear_gumbel_sample

__all__ = ["RepeatedSampler"]


class RepeatedSampler:
    """Ids of `linear_gumbel_sample`, step after step, through one head that stays as it is meanwhile.

    On the CPU a step of few rows takes as long as the head takes to be read. After some steps a copy of it in eight
    bits rules out all tokens but those that may win within the copy's error, and these are looked at in full: the tokens
    are those of `linear_gumbel_sample`, up to the rounding of a product. Elsewhere this is that operation.

    Args:
        lm_head: `[V, H]`.
        bias: `[V]`, optional.
        logit_softcap: optional.
        plain_steps: steps before that copy is made; by default as many as take as long as making it.
    """

    def __init__(
        self, lm_head: torch.Tensor, *, bias: torch.Tensor | None, logit_softcap: float | None, plain_steps: int = 8
    ) -> None:
        self.lm_head, self._bias, self._softcap = lm_head, bias, logit_softcap
        self._plain_steps = plain_steps
        self._steps = 0
        self._head: Head | None = None  # as the screen was made from it
        self._screen: Screen | None = None

    def __call__(self, hidden: torch.Tensor, noise: GumbelNoise) -> torch.Tensor:
        """One token per row, int64 `[...]`; see `linear_gumbel_sample` for shapes, dtypes and errors."""
        self._steps += 1
        if self._steps > self._plain_steps and self._can_screen(hidden):
            ids = self._screened(hidden, noise)
            if ids is not None:
                return ids
        return linear_gumbel_sample(hidden, self.lm_head, bias=self._bias, logit_softcap=self._softcap, noise=noise)[0]

    def _can_screen(self, hidden: torch.Tensor) -> bool:
        plain = type(hidden) is torch.Tensor and type(self.lm_head) in (torch.Tensor, torch.nn.Parameter)
        if not plain or hidden.dtype == torch.float64 or backends.select(hidden.device, hidden.dtype) != "cpu":
            return False
        return 0 < hidden.numel() <= MOST_ROWS * hidden.shape[-1]

    def _screened(self, hidden: torch.Tensor, noise: GumbelNoise) -> torch.Tensor | None:
        if self._screen is None or self._head is None:
            example, weight, bias = check_head(hidden.detach(), self.lm_head, self._bias, self._softcap)
            self._head = make_head(example, weight.detach(), None if bias is None else bias.detach(), self._softcap)
            self._screen = Screen(self._head.weight)
        (rows,) = autocasted(hidden.detach().reshape(-1, hidden.shape[-1]))
        assert rows is not None
        if (
            not self._screen.usable
            or rows.dtype != self._head.weight.dtype
            or rows.shape[1] != self._head.weight.shape[1]
        ):
            return None
        noise_arguments = checks.canonical_noise(noise, len(rows), hidden.device)
        ids = self._screen.sample(self._head._replace(hidden=rows), *noise_arguments)
        if ids is None:  # a row without a distribution, or a head that eight bits say too little of
            self._screen.usable = False
            return None
        return ids.view(hidden.shape[:-1])
