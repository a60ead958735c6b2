"""What completions count that were not drawn from the policy: ratios of probabilities, bounded under TRL's names.

An engine draws from a distribution mu near the policy's pi: its arithmetic rounds otherwise, its weights are a step older,
or its temperature is another. The mean of `pi / mu` times anything over mu is the mean of that over pi. Ratios of unlikely
tokens have no bound, so they are clipped or cut off, as in truncated importance sampling.

* At the level of a **sequence** the ratio is that of the whole completion, and weighs all that it does to the loss.
* At the level of a **token** each relaxed sample is weighed by its own token's ratio. Where a gradient is fed back through
  several samples, it is weighed by each of theirs. This has less variance and leaves out how the tokens before came about.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from grade_kernels.training.numbers import plain

__all__ = ["MODES", "ImportanceSampling", "Mismatch"]

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclass(frozen=True)
class ImportanceSampling:
    """How ratios become weights; the defaults are TRL's.

    Attributes:
        mode: `token_*` or `sequence_*` says whose ratio it is; `*_truncate` clips ratios to the bounds, `*_mask` sets those
            outside to 0.
        clip_max: the upper bound; None for none.
        clip_min: the lower bound; None for none.

    Raises:
        TypeError: a bound that is no number.
        ValueError: an unknown mode, bounds that are negative or the wrong way round, or none where ratios are clipped.
    """

    mode: str = "sequence_mask"
    clip_max: float | None = 3.0
    clip_min: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"vllm_importance_sampling_mode must be one of {MODES}, got {self.mode!r}")
        for name in ("clip_max", "clip_min"):
            value = plain(getattr(self, name))
            object.__setattr__(self, name, value)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"vllm_importance_sampling_{name} must be a number or None, got {value!r}")
            if not 0.0 <= value < math.inf:
                raise ValueError(f"vllm_importance_sampling_{name} must not be negative, and finite, got {value}")
        if self.clip_max is not None and self.clip_min is not None and self.clip_min >= self.clip_max:
            raise ValueError(
                f"vllm_importance_sampling_clip_min ({self.clip_min}) must be less than "
                f"vllm_importance_sampling_clip_max ({self.clip_max})"
            )
        if self.clip_max is None and self.clip_min is None and self.mode.endswith("truncate"):
            raise ValueError(
                f"vllm_importance_sampling_mode = {self.mode!r} needs vllm_importance_sampling_clip_max or _clip_min"
            )

    @property
    def by_token(self) -> bool:
        """Whether each token has a weight of its own."""
        return self.mode.startswith("token")

    def weights(self, difference: torch.Tensor) -> torch.Tensor:
        """Weights `[B, T]` of tokens, or `[B, 1]` of sequences.

        Args:
            difference: `[B, T]`, log pi - log mu of each token; 0 behind the end.
        """
        ratio = (difference if self.by_token else difference.sum(dim=1, keepdim=True)).exp()
        low = -math.inf if self.clip_min is None else self.clip_min
        high = math.inf if self.clip_max is None else self.clip_max
        if self.mode.endswith("truncate"):
            return ratio.clamp(low, high)
        return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


@dataclass(frozen=True)
class Mismatch:
    """How far the distribution that completions were drawn from is from the policy's.

    Attributes:
        difference: `[B, T]`, log pi - log mu of each token; 0 behind the end.
        weights: `[B, T]` of tokens or `[B, 1]` of sequences, what they count; None where nothing was corrected.
    """

    difference: torch.Tensor
    weights: torch.Tensor | None = None

    def metrics(self, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Numbers of each completion by TRL's names, `[B]`.

        `sampling/kl` estimates KL(mu || pi) of a token by the mean of `r - 1 - log r` over the tokens of a completion, with
        r = pi / mu: it is never negative, and its mean over mu is the KL.

        Args:
            mask: `[B, T]`, 1 at the completions' tokens.
        """
        real, lengths = mask.bool(), mask.sum(dim=1)
        size = self.difference.abs()
        found = {
            "sampling/sampling_logp_difference/mean": size.sum(dim=1) / lengths,
            "sampling/sampling_logp_difference/max": size.amax(dim=1),
            "sampling/kl": (self.difference.expm1() - self.difference).sum(dim=1) / lengths,
        }
        if self.weights is not None:
            weights = self.weights.expand_as(self.difference)
            found |= {
                "sampling/importance_sampling_ratio/min": weights.masked_fill(~real, math.inf).amin(dim=1),
                "sampling/importance_sampling_ratio/mean": (weights * mask).sum(dim=1) / lengths,
                "sampling/importance_sampling_ratio/max": weights.masked_fill(~real, 0.0).amax(dim=1),
            }
        return found
